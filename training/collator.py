"""The data collator of EVACap: batches of clips, with Stochastic Modality Shuffling."""

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import torch


class EVACapDataCollator:
    """Stacks clips into a batch and swaps some of their videos (Stochastic Modality Shuffling; paper, algorithm 1).

    A uniformly random permutation of the batch is drawn, and each sample's video is replaced by the permuted one with
    probability `p_mix`; sound and caption stay. The swaps follow from `seed` and the captions in the batch (ours), not
    from the state of a generator: they are the same whatever the number of workers, whichever process makes the batch,
    and after a training is resumed. A shuffling sampler brings other batches, hence other swaps, in every epoch.

    Args:
        p_mix (`float`, *optional*, defaults to 0.05): Probability of a swap, 0 to 1. 0 for evaluation.
        seed (`int`, *optional*, defaults to 0): Other seeds give other swaps.
        keep_matched (`bool`, *optional*, defaults to `False`): Whether the own videos of the swapped clips come along,
            as a model with `semantic_consistency_weight` above 0 needs them.

    Raises:
        ValueError: If `p_mix` is not within 0 and 1.
    """

    def __init__(self, p_mix: float = 0.05, seed: int = 0, keep_matched: bool = False):
        if not 0 <= p_mix <= 1:
            raise ValueError(f"p_mix={p_mix} is no probability; choose a value from 0 to 1")
        self.p_mix = p_mix
        self.seed = seed
        self.keep_matched = keep_matched

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes one batch.

        Args:
            features (sequence of mappings): Per clip, as numpy arrays, tensors or lists

                * `input_features` (T, M): log-mel frames, as many in every clip; absent in every clip or in none;
                * `pixel_values_videos` (F, 3, H, W), `None` or absent for a clip without a picture; clips with fewer
                  frames than others are filled up with zeros;
                * `pixel_values_videos_mask` (F,), optional: 1 for a real frame;
                * `labels` (L,), optional: token ids; filled up with -100.

        Returns:
            `dict[str, torch.Tensor]`: `input_features` (B, T, M), `pixel_values_videos` (B, F, 3, H, W),
            `pixel_values_videos_mask` (B, F; bool, only where a frame is missing), `labels` (B, L), and

            * `shuffled` (B,), bool: the sample carries another sample's video;
            * `video_index` (B,), long: the place in the batch from which the sample's video comes.

            With `keep_matched` and at least one swap also `matched_pixel_values_videos` (swapped, F, 3, H, W) and
            `matched_pixel_values_videos_mask` (swapped, F; under the same condition as the other mask).

            In a batch where no clip has a picture, only `input_features` and `labels` remain.

        Raises:
            ValueError: If the clips differ in `input_features` or in the size of their pictures.
        """
        batch: dict[str, torch.Tensor] = {}
        if features[0].get("input_features") is not None:
            batch["input_features"] = _stack("input_features", [clip["input_features"] for clip in features])
        if features[0].get("labels") is not None:
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(
                [torch.as_tensor(clip["labels"], dtype=torch.long) for clip in features],
                batch_first=True,
                padding_value=-100,
            )
        if any(clip.get("pixel_values_videos") is not None for clip in features):
            videos, mask = _pad_videos(features)
            video_index = self._draw_video_index(features)
            shuffled = video_index != torch.arange(len(features))
            batch |= _masked_videos("", videos[video_index], mask[video_index], masked=not mask.all())
            if self.keep_matched and shuffled.any():
                batch |= _masked_videos("matched_", videos[shuffled], mask[shuffled], masked=not mask.all())
            batch |= {"shuffled": shuffled, "video_index": video_index}
        return batch

    def _draw_video_index(self, features: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        own = np.arange(len(features))
        if self.p_mix == 0:
            return torch.from_numpy(own)
        rng = np.random.default_rng([self.seed, _fingerprint(features)])
        permuted = rng.permutation(len(features))
        return torch.from_numpy(np.where(rng.random(len(features)) < self.p_mix, permuted, own))


def _fingerprint(features: Sequence[Mapping[str, Any]]) -> int:
    """A number that depends on the captions of a batch and on their order.

    The captions are what stays the same where random augmentation changes the sound and the picture.
    """
    checksum = 0
    for clip in features:
        content = clip["labels"] if clip.get("labels") is not None else clip["input_features"]
        checksum = crc32(torch.as_tensor(content).contiguous().view(torch.uint8).numpy(), checksum)
    return checksum


def _masked_videos(prefix: str, videos: torch.Tensor, mask: torch.Tensor, masked: bool) -> dict[str, torch.Tensor]:
    batch = {f"{prefix}pixel_values_videos": videos}
    return batch | {f"{prefix}pixel_values_videos_mask": mask} if masked else batch


def _stack(name: str, values: list[Any]) -> torch.Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"{name} of one batch have the shapes {sorted(shapes)}; make them with one feature extractor")
    return torch.stack(tensors)


def _pad_videos(features: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The videos of a batch, missing frames as zeros, and a mask with True for a real frame."""
    clips = [clip.get("pixel_values_videos") for clip in features]
    clips = [None if clip is None else torch.as_tensor(clip) for clip in clips]
    present = [clip for clip in clips if clip is not None]
    sizes = {tuple(clip.shape[1:]) for clip in present}
    if len(sizes) > 1:
        raise ValueError(f"pixel_values_videos of one batch hold frames of {sorted(sizes)}; bring them to one size")
    num_frames = max(len(clip) for clip in present)
    videos = present[0].new_zeros(len(clips), num_frames, *present[0].shape[1:])
    mask = torch.zeros(len(clips), num_frames, dtype=torch.bool)
    for row, (clip, feature) in enumerate(zip(clips, features, strict=True)):
        if clip is not None:
            videos[row, : len(clip)] = clip
            given = feature.get("pixel_values_videos_mask")
            mask[row, : len(clip)] = True if given is None else torch.as_tensor(given, dtype=torch.bool)
    return videos, mask
