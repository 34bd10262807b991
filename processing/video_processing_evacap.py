# Copyright 2026 The EVACap authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Frames, or the files that hold them, to the pixels that EVACap looks at."""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
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

from .media_evacap import MediaError, check_sampling, file_source, frame_times, is_file, load_media


MAX_ASPECT = 4
"""A picture that is longer is cut to its middle before it is resized, of which the centre crop shows less still."""
MAX_UNCROPPED_ASPECT = 100
_PIXELS_AT_ONCE = 2**24


class EVACapVideoProcessorKwargs(VideosKwargs, total=False):
    """
    frame_sampling (`str`, *optional*, defaults to `"uniform"`):
        `"uniform"` takes the frames at the centres of `num_frames` equal parts (paper) or, with `fps`, of parts of
        `1 / fps` seconds. `"middle"` needs `fps` and takes the middle run of `num_frames` frames, `1 / fps` seconds
        apart (AVCap's evaluation).
    tubelet_size (`int`, *optional*):
        The last frame is repeated until the number of frames is a multiple of it. Defaults to 2, the frames of the
        model's tubelets, and to 1 for `num_frames=1`.
    """  # noqa: D205, D212

    frame_sampling: str | None
    tubelet_size: int | None


def stack_videos(
    videos: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None] | None = None,
    num_frames: int | None = None,
) -> dict[str, torch.Tensor]:
    """Stacks videos into one batch, filled up with zeros.

    Args:
        videos (`Sequence[torch.Tensor | None]`): The video of each clip, (frames, channels, height, width); `None` for
            a clip without a picture. One at least is not `None`.
        masks (`Sequence[torch.Tensor | None]`, *optional*): The frames of each video that exist, (frames,), bool;
            `None` for all of them.
        num_frames (`int`, *optional*): Frames of the batch; by default those of the longest video.

    Returns:
        `pixel_values_videos` (batch_size, num_frames, channels, height, width) and, where a frame is missing,
        `pixel_values_videos_mask` (batch_size, num_frames), bool, `True` for a frame that exists.

    Raises:
        ValueError: If the pictures are of different sizes.
    """
    sizes = {tuple(video.shape[1:]): f"`videos[{i}]`" for i, video in enumerate(videos) if video is not None}
    if len(sizes) > 1:
        found = ", ".join(f"{name} {size}" for size, name in sizes.items())
        raise ValueError(f"The videos of a batch must end up in one size, got {found}: crop them, or pass them alone.")
    first = next(video for video in videos if video is not None)
    videos = [first.new_empty(0, *first.shape[1:]) if video is None else video for video in videos]
    masks = [None] * len(videos) if masks is None else masks
    masks = [torch.ones(len(v), dtype=torch.bool) if m is None else m for v, m in zip(videos, masks, strict=True)]
    num_frames = max(map(len, videos)) if num_frames is None else num_frames
    # In a worker of a data loader this writes to shared memory at once, where the other process reads it.
    data = {"pixel_values_videos": default_collate([_fill_up(video, num_frames) for video in videos])}
    mask = torch.stack([_fill_up(mask, num_frames) for mask in masks])
    if not mask.all():
        data["pixel_values_videos_mask"] = mask.to(first.device)
    return data


def _fill_up(frames: torch.Tensor, num_frames: int) -> torch.Tensor:
    """`num_frames` frames (num_frames, …), missing ones as zeros."""
    missing = num_frames - len(frames)
    return F.pad(frames, (0, 0) * (frames.ndim - 1) + (0, missing)) if missing else frames


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """Frames (frames, height, width, 3) of `load_media` as a tensor (frames, 3, height, width).

    A repeated picture stays one picture in memory.
    """
    if frames.strides[0] == 0:
        return torch.from_numpy(np.array(frames[0])).permute(2, 0, 1)[None].expand(len(frames), -1, -1, -1)
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _ndim(item) -> int:
    """Dimensions of nested lists of numbers, arrays or pictures: 3 for a picture, 4 for a video, 5 for a batch."""
    if isinstance(item, (list, tuple)):
        return 1 + (_ndim(item[0]) if item else 0)
    return 3 if is_pil_image(item) else getattr(item, "ndim", 0)


class EVACapVideoProcessor(BaseVideoProcessor):
    r"""Samples frames, resizes, crops and normalises them (AVCap).

    The shorter side is resized to 224 pixels (bicubic) and the centre is cropped. Pixels are normalised by the mean
    and standard deviation of ImageNet.

    A video is a path, URL, bytes or file object (read by `load_media`: by time stamp, rotation applied); an array or
    tensor `(frames, height, width, channels)` or `(frames, channels, height, width)`; a list of PIL images or 3-D
    arrays; or one picture, a video of one frame. A list of videos is a batch, in which the kinds may be mixed, and in
    which a list of picture files is one video. Values are 0 to 255, unless `do_rescale=False`. Sampling 18 frames from
    a video that has fewer repeats frames.

    A picture more than four times as long as it is wide is first cut to its middle (ours). The crop shows even less of
    it, and enlarging the short side of a strip of some thousand pixels would take gigabytes.

    Args:
        num_frames (`int`, *optional*, defaults to 18): Frames to sample; 18 are 2 per second over 9 s (paper).
        fps (`float`, *optional*):
            Frames to sample per second. With `frame_sampling="uniform"` it takes the place of `num_frames`, so that
            the number of frames follows the length. Arrays then need `video_metadata` with their own `fps`.
        frame_sampling (`str`, *optional*, defaults to `"uniform"`): See [`EVACapVideoProcessorKwargs`].
        tubelet_size (`int`, *optional*): See [`EVACapVideoProcessorKwargs`].
        do_sample_frames (`bool`, *optional*, defaults to `True`): `False` keeps all frames of an array.
        size, crop_size, resample, image_mean, image_std, …: As in every [`BaseVideoProcessor`].

    Returns (when called):
        [`BatchFeature`] with `pixel_values_videos` (batch, frames, 3, height, width) float32. If the videos differ in
        their number of frames and `return_tensors` is given, they are zero-padded and `pixel_values_videos_mask`
        (batch, frames) bool is true for real frames.

    Raises:
        ValueError: If an argument is wrong, or if a video has the wrong shape or no frames.
        MediaError: If a file cannot be read.
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
    valid_kwargs = EVACapVideoProcessorKwargs
    model_input_names = ["pixel_values_videos"]

    def __init__(self, **kwargs: Unpack[EVACapVideoProcessorKwargs]):
        super().__init__(**kwargs)
        check_sampling(self.num_frames, self.fps, self.frame_sampling)
        if self.tubelet_size is None:
            self.tubelet_size = 1 if self.num_frames == 1 else 2

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        frame_sampling: str | None = None,
        **kwargs,
    ) -> np.ndarray:
        """The indices of the frames to take from a decoded video: the rule by which `load_media` chooses its times.

        Args:
            metadata ([`VideoMetadata`]): `total_num_frames`, and `fps` where frames per second are asked for.
            num_frames, fps, frame_sampling: Override the attributes of the same names.

        Returns:
            `np.ndarray` of non-decreasing indices.
        """
        num_frames = self.num_frames if num_frames is None else num_frames
        fps = self.fps if fps is None else fps
        frame_sampling = self.frame_sampling if frame_sampling is None else frame_sampling
        check_sampling(num_frames, fps, frame_sampling)
        if fps is not None and not metadata.fps:
            raise ValueError(f"`fps={fps}` needs `video_metadata` with the `fps` of the frames that were passed.")
        # Without a clock a frame is the unit of time.
        rate = 1 if fps is None else metadata.fps
        total = metadata.total_num_frames
        times = frame_times(total / rate, num_frames, fps, frame_sampling)
        return np.minimum((np.asarray(times) * rate + 1e-6).astype(int), total - 1)

    def preprocess(self, videos, **kwargs: Unpack[EVACapVideoProcessorKwargs]) -> BatchFeature:
        """Prepare one video or a list of them; see the class for what a video is and what comes back."""
        names = ("num_frames", "fps", "frame_sampling")
        sampling = {
            name: getattr(self, name) if kwargs.get(name) is None else kwargs[name]
            for name in (*names, "do_sample_frames")
        }
        do_sample_frames = sampling.pop("do_sample_frames")
        do_rescale = self.do_rescale if kwargs.get("do_rescale") is None else kwargs["do_rescale"]
        input_data_format = kwargs.pop("input_data_format", None)

        videos = self.split_batch(videos)
        frames = []
        for index, video in enumerate(videos):
            if is_file(video):
                frames.append(self._read(video, do_sample_frames, sampling))
            else:
                frames.append(self.to_channels_first(video, f"videos[{index}]", input_data_format, do_rescale))
        metadata = make_batched_metadata(frames, video_metadata=deepcopy(kwargs.pop("video_metadata", None)))
        if do_sample_frames:
            for index, video in enumerate(videos):
                if not is_file(video):
                    metadata[index].frames_indices = self.sample_frames(metadata[index], **sampling)
                    frames[index] = frames[index][metadata[index].frames_indices]
        kwargs.update(do_sample_frames=False, video_metadata=metadata, input_data_format=ChannelDimension.FIRST)
        return super().preprocess(frames, **kwargs)

    @staticmethod
    def split_batch(videos) -> list:
        """The videos of the input: one video becomes a list of one."""
        if isinstance(videos, (list, tuple)):
            if not videos:
                raise ValueError("`videos` is empty: expected at least one video.")
            return [videos] if _ndim(videos) in (3, 4) else list(videos)
        return list(videos) if _ndim(videos) == 5 else [videos]

    @staticmethod
    def _read(video, do_sample_frames: bool, sampling: dict) -> torch.Tensor:
        if not do_sample_frames:
            raise ValueError("`do_sample_frames=False` needs decoded frames: pass an array instead of a path or file.")
        media = load_media(file_source(video), audio=False, **sampling)
        if media.frames is None:
            raise MediaError(f"{media.name}: has no picture; choose a file that has one.")
        return to_tensor(media.frames)

    @staticmethod
    def _read_picture(picture, name: str) -> np.ndarray:
        media = load_media(file_source(picture), audio=False, num_frames=1)
        if media.frames is None or media.duration > 0:
            raise MediaError(f"{media.name}: is not a picture, but `{name}` is a list of files; pass a video alone.")
        return media.frames[0]

    @classmethod
    def to_channels_first(
        cls, video, name: str, input_data_format: ChannelDimension | None = None, do_rescale: bool = True
    ) -> torch.Tensor:
        """A decoded video as a (frames, channels, height, width) tensor, or an error that calls it `name`."""
        if is_pil_image(video):
            video = [video]
        if isinstance(video, (list, tuple)):
            if len(video) == 0:
                raise ValueError(f"`{name}` has no frames.")
            if is_pil_image(video[0]):
                video = [np.asarray(frame.convert("RGB")) for frame in video]
                input_data_format = ChannelDimension.LAST
            elif is_file(video[0]):
                video = [cls._read_picture(frame, name) for frame in video]
                input_data_format = ChannelDimension.LAST
            try:
                video = torch.stack(list(video)) if isinstance(video[0], torch.Tensor) else np.stack(video)
            except (ValueError, TypeError, RuntimeError):
                raise ValueError(f"The frames of `{name}` must be of one kind and of the same size.") from None
        if isinstance(video, np.ndarray):
            if video.dtype.kind not in "fiu":
                raise ValueError(f"`{name}` must hold numbers, got {video.dtype}.")
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
        if not video.is_floating_point() and video.dtype != torch.uint8:
            low, high = (int(value) for value in video.long().aminmax())
            if low < 0 or high > 255:
                raise ValueError(f"`{name}` holds integers from {low} to {high}, expected 0 to 255.")
            video = video.to(torch.uint8)
        if do_rescale and video.is_floating_point() and 0 < video.max() <= 1:
            raise ValueError(
                f"`{name}` holds floats up to {video.max():.3g}, expected 0 to 255: pass uint8 frames, or "
                "do_rescale=False for floats in [0, 1]."
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
        self,
        videos: list[torch.Tensor],
        tubelet_size: int,
        do_resize: bool,
        do_center_crop: bool,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        videos = [self._shrink(video, do_resize, do_center_crop, **kwargs) for video in videos]
        # The base class cannot stack videos of different lengths: it returns a list, stacked here.
        pixels = super()._preprocess(videos, do_resize=False, do_center_crop=False, return_tensors=None, **kwargs)
        pixels = [
            torch.cat([video, video[-1:].expand(-len(video) % tubelet_size, -1, -1, -1)])
            for video in pixels["pixel_values_videos"]
        ]
        data = {"pixel_values_videos": pixels}
        if return_tensors is not None:
            data = stack_videos(pixels)
        return BatchFeature(data, tensor_type=return_tensors)

    def _shrink(
        self, video: torch.Tensor, do_resize: bool, do_center_crop: bool, size, crop_size, resample, **kwargs
    ) -> torch.Tensor:
        """Resize and crop a video, a few frames at a time, and a picture that is repeated once."""
        if do_resize and size.shortest_edge:
            video = self._bound_aspect(video, size.shortest_edge, crop_size if do_center_crop else None)
        is_repeated = len(video) > 1 and video.stride(0) == 0
        at_once = max(1, _PIXELS_AT_ONCE // (video.shape[-2] * video.shape[-1]))
        parts = []
        for frames in (video[:1] if is_repeated else video).split(at_once):
            if do_resize:
                frames = self.resize(frames, size=size, resample=resample)
            parts.append(self.center_crop(frames, crop_size) if do_center_crop else frames)
        small = parts[0] if len(parts) == 1 else torch.cat(parts)
        return small.expand(len(video), -1, -1, -1) if is_repeated else small

    @staticmethod
    def _bound_aspect(video: torch.Tensor, shortest_edge: int, crop_size) -> torch.Tensor:
        height, width = video.shape[-2:]
        short, long = sorted((height, width))
        if crop_size is None:
            if long > MAX_UNCROPPED_ASPECT * short:
                raise ValueError(
                    f"A picture has {width} × {height} pixels: without `do_center_crop` one side can be at most "
                    f"{MAX_UNCROPPED_ASPECT} times as long as the other; crop it."
                )
            return video
        # Twice what is shown, so that the resampling at the edges sees what is beyond.
        most = short * max(MAX_ASPECT, 2 * max(crop_size.height, crop_size.width) // shortest_edge)
        if long <= most:
            return video
        top, left = (max(0, (side - most) // 2) for side in (height, width))
        return video[..., top : top + most, left : left + most]


__all__ = ["EVACapVideoProcessor"]
