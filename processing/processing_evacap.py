"""Media files, arrays and captions to the model's inputs, and its tokens back to text."""

import os
from os import PathLike

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import is_pil_image
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.utils import TensorType, logging

from .media_evacap import Media, MediaFile, load_media, open_media, probe_media
from .video_processing_evacap import EVACapVideosKwargs


logger = logging.get_logger(__name__)

MODALITIES = ("audio_video", "audio", "video")
# Containers round a stream's length up to whole codec frames: a rest shorter than this is no content to warn about.
NEGLIGIBLE_SECONDS = 0.5


class EVACapProcessorKwargs(ProcessingKwargs, total=False):
    videos_kwargs: EVACapVideosKwargs
    _defaults = {}


def is_file(item) -> bool:
    """Whether `item` names or holds a media file: path, URL, bytes, file object, open `MediaFile`, or the
    `{"bytes": …, "path": …}` of an undecoded `datasets` column."""
    if isinstance(item, dict):
        return item.keys() <= {"bytes", "path"}
    return isinstance(item, (str, PathLike, bytes, bytearray, MediaFile)) or hasattr(item, "read")


def file_source(item):
    """What `load_media` reads for an `item` that is a file."""
    if isinstance(item, dict):
        return item["path"] if item.get("bytes") is None else item["bytes"]
    return item


def is_still(frames) -> bool:
    """Whether decoded frames are one picture: a PIL image, a 3-D array, or a video of one frame."""
    return is_pil_image(frames) or getattr(frames, "ndim", None) == 3 or len(frames) == 1


class EVACapProcessor(ProcessorMixin):
    r"""
    Makes the inputs of EVACap from media files, or from sound and pictures that are already decoded, and its labels
    from captions.

    Args:
        feature_extractor ([`EVACapFeatureExtractor`]): Waveforms to `input_features`.
        video_processor ([`EVACapVideoProcessor`]): Frames to `pixel_values_videos`.
        tokenizer ([`PreTrainedTokenizerBase`]): A WordPiece tokenizer with `[SEP]`.
        modalities (`str`, *optional*, defaults to `"audio_video"`):
            What the model takes: `"audio_video"`, or `"audio"` or `"video"` alone. The other stream is neither decoded
            nor returned, so the checkpoint of an `audio_only` model stores `"audio"`.
        max_text_length (`int`, *optional*, defaults to 40): Longest caption in tokens, with `[CLS]` and `[SEP]` (AVCap).

    Raises:
        `ValueError`: for another value of `modalities` or a `max_text_length` below 3.
    """

    valid_processor_kwargs = EVACapProcessorKwargs

    def __init__(
        self,
        feature_extractor=None,
        video_processor=None,
        tokenizer=None,
        modalities: str = "audio_video",
        max_text_length: int = 40,
        **kwargs,
    ):
        if modalities not in MODALITIES:
            raise ValueError(f"`modalities` must be one of {', '.join(map(repr, MODALITIES))}, got {modalities!r}.")
        if max_text_length < 3:
            raise ValueError(f"`max_text_length` must leave room for [CLS], a token and [SEP], got {max_text_length}.")
        super().__init__(feature_extractor, video_processor, tokenizer, **kwargs)
        self.modalities = modalities
        self.max_text_length = max_text_length
        self._has_warned_of_length = False

    @property
    def window_seconds(self) -> float:
        """Seconds that one caption covers: `max_frames` hops of the feature extractor, 10.24 s by default."""
        return self.feature_extractor.window_seconds

    @property
    def model_input_names(self) -> list[str]:
        names = []
        if self.modalities != "video":
            names += self.feature_extractor.model_input_names
        if self.modalities != "audio":
            names += [*self.video_processor.model_input_names, "pixel_values_videos_mask"]
        return names

    def __call__(
        self,
        media=None,
        text: str | list[str] | None = None,
        audio=None,
        videos=None,
        images=None,
        start: float = 0.0,
        duration: float | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs: Unpack[EVACapProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Every stream is one clip or a list of clips; a file is a path, URL, bytes, a file object or the
        `{"bytes": …, "path": …}` of an undecoded `datasets` column. Use either `media`, or `audio` with `videos` or
        `images` in the same order.

        Args:
            media: Files whose sound and picture belong together: both are read in one pass. A clip without a picture
                gets zeros and a mask of zeros in a batch that has pictures; the model then shuts its gate.
            text (`str` or list of `str`): Captions, for training.
            audio: Files, waveforms as [`EVACapFeatureExtractor`] takes them, or `{"array": …, "sampling_rate": …}`.
            videos: Files, or frames as [`EVACapVideoProcessor`] takes them. `None` is a clip without a picture.
            images: Stills beside a sound, as files, PIL images or arrays: videos of one repeated frame.
            start (`float`, *optional*, defaults to 0.0): Where the clip begins, in seconds.
            duration (`float`, *optional*):
                Seconds to use, at most and by default `window_seconds`. `start` and `duration` apply to files and
                waveforms; decoded frames have no clock and are used whole.
            return_tensors (`str` or [`~utils.TensorType`], *optional*): `"pt"`, `"np"`, or `None` for lists.
            kwargs: Options of the feature extractor (`sampling_rate` of the waveforms, `device`, …) and of the video
                processor (`num_frames`, `fps`, `frame_sampling`, …), flat or as `audio_kwargs` and `videos_kwargs`;
                `text_kwargs` may hold `max_length`, and `padding="max_length"` for labels of a fixed length.

        Without `start` and `duration`, a clip longer than `window_seconds` is captioned by its first window, with one
        warning. The pipeline captions such a file window by window.

        Returns:
            [`BatchFeature`] with what was asked for of

            - `input_features` (batch, max_frames, mel bins), and `input_features_mask` if the feature extractor is set
              to return it;
            - `pixel_values_videos` (batch, frames, 3, height, width), unless no clip has a picture, and
              `pixel_values_videos_mask` (batch, frames) if some frames do not exist;
            - `labels` (batch, length): the caption without `[CLS]`, with `[SEP]`, padded by -100. The model shifts
              them itself.

        Raises:
            `ValueError` (of which `MediaError` is one), naming the file or argument: for a file that cannot be read or
            lacks the sound that the model needs, batches of different sizes, a wrong sampling rate, and bad options.
        """
        options = self._merge_kwargs(EVACapProcessorKwargs, **kwargs)
        audio_kwargs, videos_kwargs = options["audio_kwargs"], options["videos_kwargs"]
        known_rate = self.feature_extractor.sampling_rate
        rate = audio_kwargs.pop("sampling_rate", None)
        if media is not None:
            if audio is not None or videos is not None or images is not None:
                raise ValueError("Pass either `media`, or `audio` with `videos` or `images`, not both.")
            clips = [
                self._load(source, start, duration, videos_kwargs)
                for source in (media if isinstance(media, (list, tuple)) else [media])
            ]
            waveforms = [clip.waveform for clip in clips]
            pixels = [self._to_pixels(clip.frames, videos_kwargs, do_sample_frames=False) for clip in clips]
        else:
            waveforms, known_rate = self._read_audio(audio, rate, start, duration)
            pixels = self._read_pictures(videos, images, start, duration, videos_kwargs)
        captions = [text] if isinstance(text, str) else list(text or [])
        sizes = {len(batch) for batch in (waveforms, pixels, captions) if batch}
        if len(sizes) != 1:
            raise ValueError(
                f"Expected the same number of sounds, videos or images, and captions, and at least one of them, got "
                f"{len(waveforms)}, {len(pixels)} and {len(captions)} (modalities={self.modalities!r})."
            )

        data = {}
        if waveforms and self.modalities != "video":
            data.update(
                self.feature_extractor(waveforms, sampling_rate=known_rate, **audio_kwargs, return_tensors="pt")
            )
        if any(video is not None for video in pixels):
            data.update(self.stack_videos(pixels))
        if return_tensors != "pt":
            data = {name: list(value.cpu().numpy()) for name, value in data.items()}
        if captions:
            data["labels"] = self._to_labels(captions, return_tensors is not None, options["text_kwargs"])
        return BatchFeature(data, tensor_type=return_tensors)

    def _load(self, source, start: float, duration: float | None, sampling: dict, audio=True, video=True) -> Media:
        """A window of a file: the streams that are asked for and that the model takes."""
        audio, video = audio and self.modalities != "video", video and self.modalities != "audio"
        seconds = self._check_duration(duration)
        with open_media(file_source(source)) as file:
            clip = load_media(
                file,
                sampling_rate=self.feature_extractor.sampling_rate,
                channels=self.feature_extractor.channels,
                start=start,
                duration=seconds,
                audio=audio,
                video=video,
                **{
                    name: getattr(self.video_processor, name) if sampling.get(name) is None else sampling[name]
                    for name in ("num_frames", "fps", "frame_sampling")
                },
            )
            if audio and clip.waveform is None:
                raise ValueError(
                    f"{file.label}: has no sound, and this processor is one of a model that listens "
                    f"(modalities={self.modalities!r}). A model with fusion_type='video_only' captions it."
                )
            if not audio and clip.frames is None:
                raise ValueError(f"{file.label}: has no picture; choose a file that has one.")
            # Whether more follows is only looked up where the window is full, and until the warning has been given.
            if not (start or duration or self._has_warned_of_length) and clip.duration > seconds - 1e-3:
                self._warn_if_longer(file.label, probe_media(file).duration)
        return clip

    def _check_duration(self, duration: float | None) -> float:
        if duration is None:
            return self.window_seconds
        if not 0 < duration <= self.window_seconds:
            raise ValueError(
                f"`duration` must be above 0 and at most {self.window_seconds:g} s, which one caption covers, got "
                f"{duration}. The pipeline captions longer files window by window."
            )
        return duration

    def _warn_if_longer(self, name: str, seconds: float):
        if seconds > self.window_seconds + NEGLIGIBLE_SECONDS and not self._has_warned_of_length:
            self._has_warned_of_length = True
            logger.warning(
                f"{name} lasts {seconds:.2f} s: only the first {self.window_seconds:g} s are used. Use the pipeline to "
                "caption all of it, or `start` and `duration` to choose a part. This warning is given once."
            )

    def _read_audio(self, audio, rate: int | None, start: float, duration: float | None) -> tuple[list, int | None]:
        """The waveforms and their sampling rate, `None` if one of them came without."""
        known_rate = self.feature_extractor.sampling_rate
        if audio is None or self.modalities == "video":
            return [], known_rate
        waveforms, expected = [], known_rate
        single = is_file(audio) or isinstance(audio, dict)
        for index, clip in enumerate([audio] if single else self.feature_extractor.split_batch(audio)):
            name = f"audio[{index}]"
            if clip is None:
                raise ValueError(
                    f"`{name}` is None: only a model with fusion_type='video_only' captions without sound."
                )
            if is_file(clip):
                waveforms.append(self._load(clip, start, duration, {}, video=False).waveform)
                continue
            clip_rate = rate
            if isinstance(clip, dict):
                if not {"array", "sampling_rate"} <= clip.keys():
                    raise ValueError(
                        f'`{name}` must be {{"array": …, "sampling_rate": …}} or {{"bytes": …, "path": …}}, got the '
                        f"keys {sorted(clip)}."
                    )
                clip, clip_rate = clip["array"], clip["sampling_rate"]
            if clip_rate is None:
                known_rate = None
            elif clip_rate != expected:
                raise ValueError(
                    f"`{name}` has a sampling rate of {clip_rate} Hz, but the model was made for {expected} Hz: resample "
                    "it first, or pass a file."
                )
            waveforms.append(self._cut(clip, name, start, duration))
        return waveforms, known_rate

    def _cut(self, waveform, name: str, start: float, duration: float | None):
        """The window of a waveform `(samples,)` or `(channels, samples)`."""
        rate = self.feature_extractor.sampling_rate
        seconds = self._check_duration(duration)
        if isinstance(waveform, (list, tuple)):
            waveform = np.asarray(waveform, dtype=np.float32)
        if not (start or duration):
            self._warn_if_longer(name, waveform.shape[-1] / rate)
            return waveform
        first = round(start * rate)
        if not 0 <= first < waveform.shape[-1]:
            raise ValueError(f"`start` is {start} s but `{name}` has {waveform.shape[-1] / rate:.2f} s.")
        return waveform[..., first : first + round(seconds * rate)]

    def _read_pictures(self, videos, images, start: float, duration: float | None, videos_kwargs: dict) -> list:
        """The pixels of each clip, `None` for a clip without a picture."""
        if videos is not None and images is not None:
            raise ValueError("Pass either `videos` or `images`, not both.")
        if (videos is None and images is None) or self.modalities == "audio":
            return []
        if images is None:
            pictures = self.video_processor.split_batch(videos)
        else:
            is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
            pictures = list(images) if is_batch else [images]
        metadata = videos_kwargs.pop("video_metadata", None)
        pixels = []
        for index, picture in enumerate(pictures):
            if is_file(picture):
                frames = self._load(picture, start, duration, videos_kwargs, audio=False).frames
                pixels.append(self._to_pixels(frames, videos_kwargs, do_sample_frames=False))
            else:
                clip_metadata = metadata[index] if isinstance(metadata, (list, tuple)) else metadata
                pixels.append(self._to_pixels(picture, videos_kwargs, video_metadata=clip_metadata))
        return pixels

    def _to_pixels(self, frames, videos_kwargs: dict, **overrides) -> torch.Tensor | None:
        """The pixels (frames, 3, height, width) of one clip."""
        if frames is None:
            return None
        options = {**videos_kwargs, **overrides, "return_tensors": "pt"}
        if not is_still(frames):
            return self.video_processor(frames, **options)["pixel_values_videos"][0]
        # A still is shown all the time, whatever the rule by which moving pictures are sampled.
        options.update(do_sample_frames=False, tubelet_size=1, video_metadata=None)
        pixels = self.video_processor(frames, **options)["pixel_values_videos"][0]
        num_frames, tubelet_size = (
            videos_kwargs.get(name) or getattr(self.video_processor, name) for name in ("num_frames", "tubelet_size")
        )
        return pixels.repeat(num_frames + -num_frames % tubelet_size, 1, 1, 1)

    @staticmethod
    def stack_videos(pixels: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """One batch of videos; zeros and a mask of zeros where a clip has fewer frames or no picture."""
        lengths = torch.tensor([0 if video is None else len(video) for video in pixels])
        first = next(video for video in pixels if video is not None)
        batch = first.new_zeros(len(pixels), int(lengths.max()), *first.shape[1:])
        for row, video in zip(batch, pixels):
            if video is not None:
                row[: len(video)] = video
        data = {"pixel_values_videos": batch}
        mask = torch.arange(batch.shape[1]) < lengths[:, None]
        if not mask.all():
            data["pixel_values_videos_mask"] = mask.to(batch.device, torch.long)
        return data

    def _to_labels(self, captions: list[str], pad: bool, text_kwargs: dict) -> list[list[int]]:
        max_length = text_kwargs.get("max_length") or self.max_text_length
        # [CLS] and [SEP] count, but the labels begin after [CLS]: it is the decoder's start token.
        encoded = self.tokenizer(captions, add_special_tokens=False, truncation=True, max_length=max_length - 2)
        labels = [[*ids, self.tokenizer.sep_token_id] for ids in encoded["input_ids"]]
        if pad:
            fixed = text_kwargs.get("padding") == "max_length"
            length = max_length - 1 if fixed else max(map(len, labels))
            labels = [ids + [-100] * (length - len(ids)) for ids in labels]
        return labels

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Save the processor and, where its code goes along, the pipeline's, so that the folder has its task too."""
        # The pipeline builds on the processor, so it cannot be imported before.
        from .pipeline_evacap import AudioVisualCaptioningPipeline

        if self._auto_class is not None:
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(AudioVisualCaptioningPipeline, save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


__all__ = ["EVACapProcessor"]
