"""Frames, or the files that hold them, to the pixels that EVACap looks at."""

from copy import deepcopy
from os import PathLike

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    is_pil_image,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .media_evacap import frame_times, load_media


FRAME_SAMPLING = ("uniform", "middle")


class EVACapVideosKwargs(VideosKwargs, total=False):
    """
    frame_sampling (`str`, *optional*, defaults to `"uniform"`):
        `"uniform"` takes the frames at the centres of `num_frames` equal parts (paper) or, with `fps`, of parts of
        `1 / fps` seconds. `"middle"` takes the middle run of `num_frames` consecutive frames, or of frames `1 / fps`
        seconds apart (AVCap's evaluation).
    tubelet_size (`int`, *optional*):
        The number of frames is filled up to a multiple of it by repeating the last one. Defaults to 2, the frames of
        the model's tubelets, and to 1 for `num_frames=1`.
    """

    frame_sampling: str | None
    tubelet_size: int | None


def _is_path_or_file(video) -> bool:
    return isinstance(video, (str, PathLike, bytes, bytearray)) or hasattr(video, "read")


class EVACapVideoProcessor(BaseVideoProcessor):
    r"""
    Samples frames, resizes their shorter side to 224 (bicubic), crops the centre and normalises by ImageNet's mean and
    standard deviation (AVCap).

    A video is a path, URL, bytes or file object (read by `load_media`: by time stamp, rotation applied); an array or
    tensor `(frames, height, width, channels)` or `(frames, channels, height, width)`; a list of PIL images or 3-D
    arrays; or one picture, a video of one frame. A list of videos is a batch, in which the kinds may be mixed.
    Sampling 18 frames from a video that has fewer repeats frames.

    Args:
        num_frames (`int`, *optional*, defaults to 18): Frames to sample; 18 are 2 per second over 9 s (paper).
        fps (`float`, *optional*):
            Frames to sample per second. With `frame_sampling="uniform"` it takes the place of `num_frames`, so that
            the number of frames follows the length. Arrays then need `video_metadata` with their own `fps`.
        frame_sampling (`str`, *optional*, defaults to `"uniform"`): See [`EVACapVideosKwargs`].
        tubelet_size (`int`, *optional*): See [`EVACapVideosKwargs`].
        do_sample_frames (`bool`, *optional*, defaults to `True`): `False` keeps all frames of an array.
        size, crop_size, resample, image_mean, image_std, …: As in every [`BaseVideoProcessor`].

    Returns (when called):
        [`BatchFeature`] with `pixel_values_videos` (batch, frames, 3, height, width) float32. If the videos differ in
        their number of frames and `return_tensors` is given, they are zero-padded and `pixel_values_videos_mask`
        (batch, frames) int64 is 1 for real frames.

    Raises:
        `ValueError`: for a bad argument, naming it, or a video of the wrong shape or without frames.
        `MediaError`: for a file that cannot be read.
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_convert_rgb = True
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_sample_frames = True
    num_frames = 18
    frame_sampling = "uniform"
    valid_kwargs = EVACapVideosKwargs
    model_input_names = ["pixel_values_videos"]

    def __init__(self, **kwargs: Unpack[EVACapVideosKwargs]):
        super().__init__(**kwargs)
        self._check_sampling(self.num_frames, self.fps, self.frame_sampling)
        if self.tubelet_size is None:
            self.tubelet_size = 1 if self.num_frames == 1 else 2

    @staticmethod
    def _check_sampling(num_frames: int, fps: float | None, frame_sampling: str):
        if frame_sampling not in FRAME_SAMPLING:
            raise ValueError(
                f"`frame_sampling` must be one of {', '.join(map(repr, FRAME_SAMPLING))}, got {frame_sampling!r}."
            )
        if num_frames < 1 or (fps is not None and fps <= 0):
            raise ValueError(f"`num_frames` and `fps` must be positive, got {num_frames} and {fps}.")

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        frame_sampling: str | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        The indices of the frames to take from a decoded video: the rule by which `load_media` chooses its times.

        Args:
            metadata ([`VideoMetadata`]): `total_num_frames`, and `fps` where frames per second are asked for.
            num_frames, fps, frame_sampling: Override the attributes of the same names.

        Returns:
            `np.ndarray` of non-decreasing indices.
        """
        num_frames = self.num_frames if num_frames is None else num_frames
        fps = self.fps if fps is None else fps
        frame_sampling = self.frame_sampling if frame_sampling is None else frame_sampling
        self._check_sampling(num_frames, fps, frame_sampling)
        if fps is None:
            # Without a clock a frame is the unit of time, and consecutive frames are one unit apart.
            rate, fps = 1, 1 if frame_sampling == "middle" else None
        elif not metadata.fps:
            raise ValueError(f"`fps={fps}` needs `video_metadata` with the `fps` of the frames that were passed.")
        else:
            rate = metadata.fps
        total = metadata.total_num_frames
        times = frame_times(total / rate, num_frames, fps, frame_sampling)
        return np.minimum((np.asarray(times) * rate + 1e-6).astype(int), total - 1)

    def preprocess(self, videos, **kwargs: Unpack[EVACapVideosKwargs]) -> BatchFeature:
        """Prepare one video or a list of them; see the class for what a video is and what comes back."""
        names = ("num_frames", "fps", "frame_sampling")
        sampling = {
            name: getattr(self, name) if kwargs.get(name) is None else kwargs[name]
            for name in (*names, "do_sample_frames")
        }
        do_sample_frames = sampling.pop("do_sample_frames")
        input_data_format = kwargs.pop("input_data_format", None)

        frames, is_file = [], []
        for index, video in enumerate(self.split_batch(videos)):
            is_file.append(_is_path_or_file(video))
            if is_file[-1]:
                frames.append(self._read(video, do_sample_frames, sampling))
            else:
                frames.append(self._to_channels_first(video, f"videos[{index}]", input_data_format))
        metadata = make_batched_metadata(frames, video_metadata=deepcopy(kwargs.pop("video_metadata", None)))
        if do_sample_frames:
            for index, was_sampled in enumerate(is_file):
                if not was_sampled:
                    metadata[index].frames_indices = self.sample_frames(metadata[index], **sampling)
                    frames[index] = frames[index][metadata[index].frames_indices]
        kwargs.update(do_sample_frames=False, video_metadata=metadata, input_data_format=ChannelDimension.FIRST)
        return super().preprocess(frames, **kwargs)

    @staticmethod
    def split_batch(videos) -> list:
        """The videos of the input: one video becomes a list of one."""
        if isinstance(videos, (np.ndarray, torch.Tensor)):
            if videos.ndim == 5:
                return list(videos)
            return [videos]
        if not isinstance(videos, (list, tuple)):
            return [videos]
        if not videos:
            raise ValueError("`videos` is empty: expected at least one video.")
        is_frames = is_pil_image(videos[0]) or getattr(videos[0], "ndim", None) == 3
        return [videos] if is_frames else list(videos)

    @staticmethod
    def _read(video, do_sample_frames: bool, sampling: dict) -> torch.Tensor:
        if not do_sample_frames:
            raise ValueError("`do_sample_frames=False` needs decoded frames: pass an array instead of a path or file.")
        media = load_media(video, audio=False, **sampling)
        if media.frames is None:
            raise ValueError(f"{video if isinstance(video, (str, PathLike)) else 'file'}: it has no picture.")
        return torch.from_numpy(media.frames).permute(0, 3, 1, 2)

    @staticmethod
    def _to_channels_first(video, name: str, input_data_format: ChannelDimension | None) -> torch.Tensor:
        """A decoded video as a (frames, channels, height, width) tensor."""
        if is_pil_image(video):
            video = [video]
        if isinstance(video, (list, tuple)):
            if len(video) == 0:
                raise ValueError(f"`{name}` has no frames.")
            if is_pil_image(video[0]):
                video = np.stack([np.asarray(frame.convert("RGB")) for frame in video])
                input_data_format = ChannelDimension.LAST
            else:
                video = torch.stack(list(video)) if isinstance(video[0], torch.Tensor) else np.stack(video)
        if isinstance(video, np.ndarray):
            video = torch.from_numpy(np.array(video))
        if not isinstance(video, torch.Tensor):
            raise ValueError(
                f"`{name}` must be a path, an array, a tensor or a list of frames, got {type(video).__name__}."
            )
        if video.ndim == 3:
            video = video[None]
        if video.ndim != 4 or video.numel() == 0:
            raise ValueError(
                f"`{name}` must be (frames, height, width, channels) or (frames, channels, height, width) with at "
                f"least one frame, got shape {tuple(video.shape)}."
            )
        if input_data_format is None:
            try:
                input_data_format = infer_channel_dimension_format(video, num_channels=(1, 3, 4))
            except ValueError:
                raise ValueError(
                    f"`{name}` has shape {tuple(video.shape)}: neither its second nor its last dimension can be 1, 3 "
                    "or 4 channels."
                ) from None
        return video if input_data_format == ChannelDimension.FIRST else video.permute(0, 3, 1, 2)

    def _preprocess(
        self, videos: list[torch.Tensor], tubelet_size: int, return_tensors=None, **kwargs
    ) -> BatchFeature:
        # The base class cannot stack videos of different lengths: it returns a list, stacked here.
        pixels = super()._preprocess(videos, return_tensors=None, **kwargs)["pixel_values_videos"]
        pixels = [torch.cat([video, video[-1:].expand(-len(video) % tubelet_size, -1, -1, -1)]) for video in pixels]
        data = {"pixel_values_videos": pixels}
        if return_tensors is not None:
            lengths = torch.tensor([len(video) for video in pixels])
            data["pixel_values_videos"] = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)
            if len(lengths.unique()) > 1:
                mask = torch.arange(lengths.max()) < lengths[:, None]
                data["pixel_values_videos_mask"] = mask.to(pixels[0].device, torch.long)
        return BatchFeature(data, tensor_type=return_tensors)


__all__ = ["EVACapVideoProcessor"]
