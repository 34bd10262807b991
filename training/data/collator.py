"""The data collator of EVACap: batches of clips, with Stochastic Modality Shuffling."""

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from ...modeling_evacap.modeling_evacap import shift_tokens_right
from ...processing.video_processing_evacap import stack_videos


class EVACapDataCollator:
    """Stacks clips into a batch and swaps some of their videos (Stochastic Modality Shuffling; paper, algorithm 1).

    It draws a uniformly random permutation of the batch and replaces the video of each sample by the permuted one with
    probability `p_mix`. Sound and caption stay. The swaps depend on `seed` and on the captions of the batch only (ours),
    not on the state of a generator. So they do not change with the number of workers, with the process that makes the
    batch, or when a training is resumed. Sampling in random order gives other batches, and so other swaps, in each epoch;
    a batch with the same captions in the same order always has the same swaps.

    A process swaps within its own batches (the paper's "within each mini-batch"): two processes with batches of 8 swap
    among 8 clips, not among 16.

    Args:
        p_mix (`float`, *optional*, defaults to 0.05): Probability of a swap, 0 to 1. 0 for evaluation.
        seed (`int`, *optional*, defaults to 0): Seed of the swaps; 0 or more.
        keep_matched (`bool`, *optional*, defaults to `False`): Whether to add the matched videos of the swapped clips,
            which a model with `semantic_consistency_weight` above 0 needs.
        fixed_points (`bool`, *optional*, defaults to `True`): Whether the permutation may leave a video in its place. A
            uniform permutation does so for one in B videos, so the share of swapped samples is p_mix · (1 - 1 / B) in
            batches of B (paper). With `False` the permutation moves every video, and the share is p_mix (ours). The video
            of a batch of one clip always stays.
        whole_batch (`bool`, *optional*, defaults to `False`): Whether one draw decides for all videos of the batch
            instead of one draw for each (ours).
        video_shape (`tuple[int, int, int, int]`, *optional*): Frames, channels, height and width of the zeros in a batch
            without any picture, whose mask is all false. Without it such a batch has no videos and the model skips its
            video tower, which a single process must not do when gradients are exchanged (DDP, FSDP).
        model ([`EVACapForConditionalGeneration`], *optional*): The model that is trained. If given, a batch with
            `labels` has `decoder_input_ids` too, for a loss that is computed outside of the model: `Trainer` with
            `label_smoothing_factor` or `compute_loss_func`.

    Raises:
        ValueError: If `p_mix` is not between 0 and 1, if `seed` is negative, or if `video_shape` is not four positive
            sizes.
    """

    def __init__(
        self,
        p_mix: float = 0.05,
        seed: int = 0,
        keep_matched: bool = False,
        fixed_points: bool = True,
        whole_batch: bool = False,
        video_shape: Sequence[int] | None = None,
        model: PreTrainedModel | None = None,
    ):
        if not 0 <= p_mix <= 1:
            raise ValueError(f"p_mix={p_mix} is not a probability; choose a value from 0 to 1")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative; choose 0 or more")
        if video_shape is not None and (len(video_shape) != 4 or min(video_shape) < 1):
            raise ValueError(f"video_shape={video_shape} must be four sizes: frames, channels, height, width")
        self.p_mix = p_mix
        self.seed = seed
        self.keep_matched = keep_matched
        self.fixed_points = fixed_points
        self.whole_batch = whole_batch
        self.video_shape = None if video_shape is None else tuple(video_shape)
        self.text_tokens = None
        if model is not None:
            # Not the model itself: workers get a copy of the collator.
            self.text_tokens = model.config.text_config.pad_token_id, model.config.decoder_start_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes one batch.

        Args:
            features (sequence of mappings): For each clip, as NumPy arrays, tensors or lists

                * `input_features` (T, M): log-mel frames, equally many in all clips; in all clips or in none;
                * `pixel_values_videos` (F, 3, H, W), `None` or absent for a clip without a picture; clips with fewer
                  frames than others are padded with zeros;
                * `video_features` (F, D) instead, as a video tower gives them; the same holds;
                * `pixel_values_videos_mask` (F,), optional: true for a frame that exists;
                * `labels` (L,): token ids, padded with -100; in all clips or in none;
                * `audio_caption_ids` and `video_caption_ids` (L,), for a model with `enrichment="case"`: left out of the
                  batch if they are missing in one of its clips; a clip without a picture needs none of the picture.

                Other keys are ignored.

        Returns:
            `dict[str, torch.Tensor]`: `input_features` (B, T, M), `pixel_values_videos` (B, F, 3, H, W) or
            `video_features` (B, F, D),
            `pixel_values_videos_mask` (B, F; bool, only where a frame is missing), `labels` (B, L), with a `model`
            `decoder_input_ids` (B, L), `audio_caption_ids` and `video_caption_ids` (B, L), the latter of the videos that the
            samples carry, and

            * `shuffled` (B,), bool: the sample carries another sample's video;
            * `video_index` (B,), long: the sample of the batch that the video comes from.

            With `keep_matched` and at least one swap also `matched_pixel_values_videos` (swapped, F, 3, H, W) and
            `matched_pixel_values_videos_mask` (swapped, F; bool, only where one of their frames is missing).

            A batch without any picture has only `input_features` and `labels`, unless `video_shape` is given.

        Raises:
            ValueError: If some clips lack what others have, if clips differ in the shape of `input_features` or in the size
                of their pictures, or if `video_features` come together with pictures or with `keep_matched`.
        """
        batch: dict[str, torch.Tensor] = {}
        if _in_all(features, "input_features"):
            batch["input_features"] = _stack("input_features", [clip["input_features"] for clip in features])
        if _in_all(features, "labels"):
            batch["labels"] = _pad_ids([clip["labels"] for clip in features])
            if self.text_tokens is not None:
                batch["decoder_input_ids"] = shift_tokens_right(batch["labels"], *self.text_tokens)
        stream = "pixel_values_videos"
        if any(clip.get("video_features") is not None for clip in features):
            stream = "video_features"
            if self.keep_matched or any(clip.get("pixel_values_videos") is not None for clip in features):
                raise ValueError(
                    "video_features stand in the place of all pictures of a batch, and the semantic-consistency term "
                    "(keep_matched) needs pictures"
                )
        videos, masks = self._read_videos(features, stream)
        captions = [clip.get("audio_caption_ids") for clip in features]
        if all(caption is not None for caption in captions):
            batch["audio_caption_ids"] = _pad_ids(captions)
        if videos:
            video_index = self._draw_video_index(features)
            nothing = torch.full((1,), -100)
            captions = [
                clip.get("video_caption_ids", nothing if clip.get(stream) is None else None) for clip in features
            ]
            if all(caption is not None for caption in captions):
                batch["video_caption_ids"] = _pad_ids(captions)[video_index]
            shuffled = video_index != torch.arange(len(features))
            num_frames = max(map(len, videos))
            # Each video is copied once, to its place in the batch.
            stacked = stack_videos(*_select(video_index, videos, masks), num_frames)
            batch[stream] = stacked.pop("pixel_values_videos")
            batch |= stacked
            if self.keep_matched and shuffled.any():
                matched = stack_videos(*_select(shuffled.nonzero().squeeze(1), videos, masks), num_frames)
                batch |= {f"matched_{name}": value for name, value in matched.items()}
            batch |= {"shuffled": shuffled, "video_index": video_index}
        return batch

    def _draw_video_index(self, features: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        own = np.arange(len(features))
        if self.p_mix == 0:
            return torch.from_numpy(own)
        rng = np.random.default_rng([self.seed, _fingerprint(features)])
        permuted = rng.permutation(len(own))
        # About one permutation in e has no fixed point, whatever the size of the batch.
        while not self.fixed_points and len(own) > 1 and (permuted == own).any():
            permuted = rng.permutation(len(own))
        swaps = rng.random(1 if self.whole_batch else len(own)) < self.p_mix
        return torch.from_numpy(np.where(swaps, permuted, own))

    def _read_videos(
        self, features: Sequence[Mapping[str, Any]], stream: str
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The videos, with no frames for a clip without a picture, and their masks; empty if no clip has a picture."""
        videos = [clip.get(stream) for clip in features]
        videos = [None if video is None else torch.as_tensor(video) for video in videos]
        masks = [_frame_mask(place, *pair) for place, pair in enumerate(zip(features, videos, strict=True))]
        like = next((video for video in videos if video is not None), None)
        if like is None:
            if self.video_shape is None:
                return [], []
            like = torch.zeros(self.video_shape)
            videos = [like for _ in videos]
            masks = [torch.zeros(len(like), dtype=torch.bool) for _ in videos]
        elif stream != "video_features" and self.video_shape is not None and like.shape[1:] != self.video_shape[1:]:
            raise ValueError(
                f"pixel_values_videos hold frames of {tuple(like.shape[1:])}, but video_shape={self.video_shape} says "
                f"{self.video_shape[1:]}; give the shape that the video processor makes"
            )
        nothing = like.new_empty(0, *like.shape[1:])
        return [nothing if video is None else video for video in videos], masks


def _select(index: torch.Tensor, *lists: Sequence[Any]) -> list[list[Any]]:
    """The elements of each list at the places of `index`."""
    return [[values[place] for place in index] for values in lists]


def _in_all(features: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether all clips of a batch have `name`; raises if only some have it."""
    missing = [place for place, clip in enumerate(features) if clip.get(name) is None]
    if 0 < len(missing) < len(features):
        raise ValueError(
            f"{name} is missing in {len(missing)} of {len(features)} clips of a batch, first in clip {missing[0]}; "
            "all of them need it, or none may have it"
        )
    return not missing


def _fingerprint(features: Sequence[Mapping[str, Any]]) -> int:
    """A checksum of the captions of a batch, in their order. Augmentation changes sound and picture, but not them."""
    checksum = 0
    for clip in features:
        if clip.get("labels") is not None:
            # Neither the dtype nor the padding is part of the caption.
            content = torch.as_tensor(clip["labels"], dtype=torch.long)
            content = content[content != -100]
        else:
            stream = "pixel_values_videos" if clip.get("input_features") is None else "input_features"
            content = torch.as_tensor(() if clip.get(stream) is None else clip[stream])
        checksum = crc32(content.contiguous().view(torch.uint8).numpy(), checksum)
    return checksum


def _pad_ids(rows: Sequence[Any]) -> torch.Tensor:
    """The token ids (batch_size, length), padded with -100."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def _stack(name: str, values: list[Any]) -> torch.Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"{name} of one batch have the shapes {sorted(shapes)}; make them with one feature extractor")
    # In a worker this writes to shared memory at once, so the other process reads it without another copy.
    return default_collate(tensors)


def _frame_mask(place: int, clip: Mapping[str, Any], video: torch.Tensor | None) -> torch.Tensor:
    """A bool tensor (frames,), `True` for a frame that exists."""
    num_frames = 0 if video is None else len(video)
    given = None if video is None else clip.get("pixel_values_videos_mask")
    mask = torch.ones(num_frames, dtype=torch.bool) if given is None else torch.as_tensor(given, dtype=torch.bool)
    if mask.shape != (num_frames,):
        raise ValueError(
            f"pixel_values_videos_mask of clip {place} has shape {tuple(mask.shape)}, but the clip has {num_frames} "
            "frames; give one entry a frame"
        )
    return mask
