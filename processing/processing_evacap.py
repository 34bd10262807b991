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
"""Media files, arrays and captions to the model's inputs, and its tokens back to text."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.utils import logging

from .media_evacap import Media, MediaError, MediaReader, file_source, is_file, is_silent, read_media
from .video_processing_evacap import EVACapVideoProcessorKwargs, stack_videos, to_tensor


if TYPE_CHECKING:
    # Not run, as the pipeline builds on this file. transformers saves with a processor's file those it names like
    # this, and so the pipeline's code travels with the processor and a saved folder has its task.
    from .pipeline_evacap import AudioVisualCaptioningPipeline  # noqa: F401

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

MODALITIES = ("audio_video", "audio", "video")
CLIP_TOKEN = "<|clip|>"
"""The token in a prompt in whose place a language model reads the clip."""
CHAT = "chat"
"""The `prompt_template` that stands for the chat template of the tokenizer."""
# Containers round a stream's length up to whole codec frames: a shorter rest is not content to warn about.
MODEL_OPTIONS = frozenset(
    "attn_implementation device_map device_mesh distributed_config dtype experts_implementation key_mapping "
    "low_cpu_mem_usage max_memory offload_buffers offload_folder offload_state_dict quantization_config torch_dtype tp_plan "
    "tp_size use_kernels use_safetensors variant weights_only".split()
)
"""Options of `PreTrainedModel.from_pretrained` that no processor has."""
NEGLIGIBLE_SECONDS = 0.5


class EVACapProcessorKwargs(ProcessingKwargs, total=False):
    videos_kwargs: EVACapVideoProcessorKwargs
    _defaults = {}


def is_sound_with_rate(item: Any) -> bool:
    """Whether `item` is a decoded sound that tells its sampling rate: a dict, or a decoder as `datasets` gives it."""
    return isinstance(item, dict) or hasattr(item, "get_all_samples")


def is_still(frames: Any) -> bool:
    """Whether decoded frames are one picture: a 3-D array, a single object (a PIL image), or a video of one frame."""
    return getattr(frames, "ndim", 4) < 4 or not hasattr(frames, "__len__") or len(frames) == 1


@dataclass(frozen=True)
class _Window:
    """The part of a clip that is asked for."""

    start: float = 0.0
    duration: float | None = None
    audio_track: int | None = None

    @property
    def is_chosen(self) -> bool:
        return bool(self.start or self.duration)


class EVACapProcessor(ProcessorMixin):
    r"""Makes the inputs of EVACap from media files or decoded sound and pictures, and its labels from captions.

    Args:
        feature_extractor ([`EVACapFeatureExtractor`]): Waveforms to `input_features`.
        video_processor ([`EVACapVideoProcessor`]): Frames to `pixel_values_videos`.
        tokenizer ([`PreTrainedTokenizerBase`]): A WordPiece tokenizer with `[SEP]`, or the tokenizer of a language model.
        modalities (`str`, *optional*, defaults to `"audio_video"`):
            What the model takes: `"audio_video"`, or `"audio"` or `"video"` alone. The other stream is neither decoded
            nor returned, so the checkpoint of an `audio_only` model stores `"audio"`.
        max_text_length (`int`, *optional*, defaults to 40): Longest caption in tokens, with `[CLS]` and `[SEP]`
            (AVCap).
        prompt_template (`str`, *optional*): For a language model: what it reads, with `{clip}` once for the tokens of the
            clip and `{prompt}` for the instruction, such as `"USER: <Speech>{clip}</Speech> {prompt}\nASSISTANT:"` (LAVCap);
            or `"chat"`, the chat template of the tokenizer, with the clip before the instruction.
        prompt (`str`, *optional*, defaults to `"Please describe the audio."`): The instruction (LAVCap).

    Raises:
        ValueError: If `modalities` has another value, if `max_text_length` is below 3, or if `prompt_template` does not have
            `{clip}` exactly once.
    """

    valid_processor_kwargs = EVACapProcessorKwargs

    def __init__(
        self,
        feature_extractor=None,
        video_processor=None,
        tokenizer=None,
        modalities: str = "audio_video",
        max_text_length: int = 40,
        prompt_template: str | None = None,
        prompt: str = "Please describe the audio.",
        **kwargs,
    ):
        if modalities not in MODALITIES:
            raise ValueError(f"`modalities` must be one of {', '.join(map(repr, MODALITIES))}, got {modalities!r}.")
        if max_text_length < 3:
            raise ValueError(f"`max_text_length` must leave room for [CLS], a token and [SEP], got {max_text_length}.")
        if prompt_template not in (None, CHAT) and prompt_template.count("{clip}") != 1:
            raise ValueError(
                f"`prompt_template` must have {{clip}} in it once, or be {CHAT!r}, got {prompt_template!r}."
            )
        super().__init__(feature_extractor, video_processor, tokenizer, **kwargs)
        self.modalities = modalities
        self.prompt_template = prompt_template
        self.prompt = prompt
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
        prompt: str | list[str] | None = None,
        audio_captions: str | list[str] | None = None,
        video_captions: str | list[str | None] | None = None,
        **kwargs: Unpack[EVACapProcessorKwargs],
    ) -> BatchFeature:
        r"""Makes the inputs of one clip, or of a batch of clips.

        Every stream is one clip or a list of clips. A file is a path, a URL, bytes, a file object, the
        `{"bytes": …, "path": …}` of an undecoded `datasets` column, or [`Media`] that was read before. Give either
        `media`, or `audio` with `videos` or `images` in the same order.

        Args:
            media: Files whose sound and picture belong together: both are read in one pass. A clip without a picture
                gets zeros and a mask of zeros in a batch that has pictures; the model then shuts its gate.
            text (`str` or list of `str`): Captions, for training.
            audio: Files, waveforms as [`EVACapFeatureExtractor`] takes them, `{"array": …, "sampling_rate": …}` or the
                decoder of a `datasets` column.
            videos: Files, or frames as [`EVACapVideoProcessor`] takes them. `None` is a clip without a picture.
            images: Stills beside a sound, as files, PIL images or arrays: videos of one repeated frame. A still has no
                clock: it is on display whatever `start` is.
            prompt (`str` or `list[str]`, *optional*): For a language model: instructions instead of the one that it was
                saved with, one for all clips or one for each.
            audio_captions (`str` or list of `str`, *optional*), video_captions (`str` or list of `str`, *optional*): For a
                model with `enrichment="case"`: what a model of the sound alone, and one of the picture alone, say of each
                clip. `None` is a clip without a picture.
            start (`float`, *optional*, defaults to 0.0): Where the clip begins, in seconds.
            duration (`float`, *optional*):
                Seconds to use, at most and by default `window_seconds`. `start` and `duration` apply to files and
                waveforms; decoded frames have no clock and are used whole.
            audio_track (`int`, *optional*):
                Which of the sound tracks of a file to hear, counted from 0; FFmpeg's choice by default.
            return_tensors (`str` or [`~utils.TensorType`], *optional*): `"pt"`, `"np"`, or `None` for lists.
            kwargs: Options of the feature extractor (`sampling_rate` of the waveforms, `device`, …) and of the video
                processor (`num_frames`, `fps`, `frame_sampling`, …), flat or as `audio_kwargs` and `videos_kwargs`;
                `text_kwargs` may hold `max_length`, and `padding="max_length"` for labels of a fixed length, which are
                otherwise what the tokenizer was saved with.

        Without `start` and `duration`, a clip longer than `window_seconds` is captioned by its first window, with one
        warning. The pipeline captions such a file window by window. A clip whose sound is silent is processed as it
        is, with a warning: what the model says of silence is invented.

        Returns:
            [`BatchFeature`] with what was asked for of

            - `input_features` (batch, max_frames, mel bins), and `input_features_mask` if the feature extractor is set
              to return it;
            - `pixel_values_videos` (batch, frames, 3, height, width), unless no clip has a picture, and
              `pixel_values_videos_mask` (batch, frames) if some frames do not exist;
            - `input_ids` and `attention_mask` (batch, length), if `prompt` is given: padded on the left;
            - `audio_caption_ids` and `video_caption_ids` (batch, length), made as `labels`;
            - `labels` (batch, length): the caption without `[CLS]`, with `[SEP]`, padded by -100. The model shifts
              them itself.

        Raises:
            ValueError: If a file cannot be read (then a `MediaError`) or lacks the sound that the model needs, if
                batches differ in size, or if a sampling rate or an option is wrong; the message has the file or
                argument.
            TypeError: If `video` or `image` is given, which are called `videos` and `images`.
        """
        for name in ("video", "image"):
            if name in kwargs:
                raise TypeError(f"`{name}` is not an argument: pass `{name}s`.")
        window = _Window(
            kwargs.pop("start", None) or 0.0, kwargs.pop("duration", None), kwargs.pop("audio_track", None)
        )
        # Without a tokenizer, clips are made ready for a training.
        options = self._merge_kwargs(EVACapProcessorKwargs, getattr(self.tokenizer, "init_kwargs", None), **kwargs)
        groups = [options[f"{name}_kwargs"] for name in ("text", "audio", "videos", "images")]
        given = [group.pop("return_tensors", None) for group in groups]
        return_tensors = next((value for value in given if value is not None), None)
        audio_kwargs, videos_kwargs = options["audio_kwargs"], options["videos_kwargs"]
        known_rate = self.feature_extractor.sampling_rate
        rate = audio_kwargs.pop("sampling_rate", None)
        if media is not None:
            if audio is not None or videos is not None or images is not None:
                raise ValueError("Pass either `media`, or `audio` with `videos` or `images`, not both.")
            sources = media if isinstance(media, (list, tuple)) else [media]
            for index, source in enumerate(sources):
                if not (is_file(source) or isinstance(source, Media)):
                    raise ValueError(
                        f"`media[{index}]` must be a file (path, URL, bytes, file object), got {type(source).__name__}."
                    )
            clips = [self._load(source, window, videos_kwargs) for source in sources]
            waveforms = [clip.waveform for clip in clips]
            pixels = [self._to_pixels(clip, videos_kwargs) for clip in clips]
        else:
            waveforms, known_rate = self._read_audio(audio, rate, window)
            pixels = self._read_pictures(videos, images, window, videos_kwargs)
        texts = {
            "labels": self._check_captions("text", text),
            "audio_caption_ids": self._check_captions("audio_captions", audio_captions),
            "video_caption_ids": self._check_captions("video_captions", video_captions, may_lack=True),
        }
        sizes = {len(batch) for batch in (waveforms, pixels, *texts.values()) if batch}
        if len(sizes) != 1:
            numbers = ", ".join(str(len(batch)) for batch in texts.values())
            raise ValueError(
                f"Expected the same number of sounds, videos or images, and captions, and at least one of them, got "
                f"{len(waveforms)}, {len(pixels)} and {numbers} (modalities={self.modalities!r})."
            )

        data = {}
        if waveforms and self.modalities != "video":
            data.update(
                self.feature_extractor(waveforms, sampling_rate=known_rate, **audio_kwargs, return_tensors="pt")
            )
        if any(video is not None for video in pixels):
            data.update(stack_videos(pixels))
        if return_tensors != "pt":
            data = {name: list(value.cpu().numpy()) for name, value in data.items()}
        for name, captions in texts.items():
            if captions:
                data[name] = self._to_labels(captions, return_tensors is not None, options["text_kwargs"])
        if prompt is not None:
            data.update(self._to_prompts(prompt, sizes.pop()))
        return BatchFeature(data, tensor_type=return_tensors)

    def open(
        self,
        source: Any,
        start: float = 0.0,
        audio_track: int | None = None,
        audio: bool = True,
        video: bool = True,
        **sampling,
    ) -> AbstractContextManager[MediaReader]:
        """Opens a file to read its windows for this processor, with the requested streams that the model takes.

        The windows of the reader can be passed as `media`, `audio` or `videos`.

        Args:
            source: A file, see [`is_file`].
            start (`float`, *optional*, defaults to 0.0): Start of the first window in seconds.
            audio_track (`int`, *optional*): See `__call__`.
            audio, video (`bool`, *optional*, defaults to `True`): The requested streams.
            sampling: `num_frames`, `fps` and `frame_sampling`; by default those of the video processor.
        """
        return read_media(
            file_source(source),
            sampling_rate=self.feature_extractor.sampling_rate,
            channels=self.feature_extractor.channels,
            start=start,
            audio=audio and self.modalities != "video",
            video=video and self.modalities != "audio",
            audio_track=audio_track,
            **{
                name: getattr(self.video_processor, name) if sampling.get(name) is None else sampling[name]
                for name in ("num_frames", "fps", "frame_sampling")
            },
        )

    def _load(self, source, window: "_Window", sampling: dict, audio: bool = True, video: bool = True) -> Media:
        """A window of a file, unless it was read before."""
        if isinstance(source, Media):
            self._check_streams(source, audio, video)
            return source
        seconds = self._check_duration(window.duration)
        sampling = {name: sampling.get(name) for name in ("num_frames", "fps", "frame_sampling")}
        with self.open(source, window.start, window.audio_track, audio, video, **sampling) as reader:
            clip = reader.read(seconds)
            self._check_streams(clip, audio, video)
            # Whether more follows is only looked up where the window is full, and until the warning has been given.
            if not (window.is_chosen or self._has_warned_of_length) and clip.duration > seconds - 1e-3:
                if reader.goes_on(NEGLIGIBLE_SECONDS):
                    self._warn_of_length(reader.label, reader.announced)
        self._warn_of_silence(clip.name, clip.waveform)
        return clip

    def _check_streams(self, clip: Media, audio: bool, video: bool):
        listens = audio and self.modalities != "video"
        if listens and clip.waveform is None:
            raise MediaError(
                f"{clip.name}: has no sound, and this processor is one of a model that listens "
                f"(modalities={self.modalities!r}). A model with fusion_type='video_only' captions it."
            )
        if not listens and clip.frames is None:
            raise MediaError(f"{clip.name}: has no picture; choose a file that has one.")

    def _check_duration(self, duration: float | None) -> float:
        if duration is None:
            return self.window_seconds
        if not 0 < duration <= self.window_seconds:
            raise ValueError(
                f"`duration` must be above 0 and at most {self.window_seconds:g} s, which one caption covers, got "
                f"{duration}. The pipeline captions longer files window by window."
            )
        return duration

    def _warn_of_length(self, name: str, seconds: float):
        if not self._has_warned_of_length:
            self._has_warned_of_length = True
            length = f"{seconds:.2f} s" if self.window_seconds < seconds < float("inf") else "longer"
            logger.warning(
                f"{name} lasts {length}: only the first {self.window_seconds:g} s are used. Use the pipeline to "
                "caption all of it, or `start` and `duration` to choose a part. This warning is given once."
            )

    @staticmethod
    def _warn_of_silence(name: str, waveform):
        if waveform is not None and is_silent(waveform):
            logger.warning(f"{name} is silent: what is said of its sound is invented.")

    def _read_audio(self, audio, rate: int | None, window: "_Window") -> tuple[list, int | None]:
        """The waveforms and their sampling rate, `None` if one of them came without."""
        known_rate = self.feature_extractor.sampling_rate
        if audio is None or self.modalities == "video":
            return [], known_rate
        waveforms = []
        single = is_file(audio) or is_sound_with_rate(audio) or isinstance(audio, Media)
        for index, clip in enumerate([audio] if single else self.feature_extractor.split_batch(audio, "audio")):
            name = f"audio[{index}]"
            if clip is None:
                raise ValueError(
                    f"`{name}` is None: only a model with fusion_type='video_only' captions without sound."
                )
            if is_file(clip) or isinstance(clip, Media):
                waveforms.append(self._load(clip, window, {}, video=False).waveform)
                continue
            if rate is None and not is_sound_with_rate(clip):
                known_rate = None
            waveforms.append(self._cut(self.to_waveform(clip, name, rate), name, window))
            self._warn_of_silence(name, waveforms[-1])
        return waveforms, known_rate

    def to_waveform(self, clip: Any, name: str, rate: int | None = None) -> torch.Tensor:
        """A decoded clip as a tensor of floats, (samples,) or (channels, samples), or an error that calls it `name`.

        Args:
            clip: Samples, `{"array": …, "sampling_rate": …}`, or the decoder of a `datasets` column.
            rate (`int`, *optional*): Sampling rate of plain samples; what is not known is not checked.
        """
        expected = self.feature_extractor.sampling_rate
        if hasattr(clip, "get_all_samples"):
            samples = clip.get_all_samples()
            clip = {"array": samples.data, "sampling_rate": samples.sample_rate}
        if isinstance(clip, dict) and not {"array", "sampling_rate"} <= clip.keys():
            raise ValueError(
                f'`{name}` must be {{"array": …, "sampling_rate": …}} or {{"bytes": …, "path": …}}, got the keys '
                f"{sorted(map(str, clip))}."
            )
        if isinstance(clip, dict):
            clip, rate = clip["array"], clip["sampling_rate"]
        elif rate is None:
            rate = expected
        if rate != expected:
            raise ValueError(
                f"`{name}` has a sampling rate of {rate} Hz, but the model was made for {expected} Hz: resample it "
                "first, or pass a file."
            )
        return self.feature_extractor.to_waveform(clip, name)

    def _cut(self, waveform: torch.Tensor, name: str, window: "_Window") -> torch.Tensor:
        """The window of a waveform `(samples,)` or `(channels, samples)`."""
        rate = self.feature_extractor.sampling_rate
        seconds = self._check_duration(window.duration)
        length = waveform.shape[-1] / rate
        if not window.is_chosen:
            if length > self.window_seconds + NEGLIGIBLE_SECONDS:
                self._warn_of_length(name, length)
            return waveform
        first = round(window.start * rate)
        if not 0 <= first < waveform.shape[-1]:
            raise ValueError(f"`start` is {window.start} s but `{name}` has {length:.2f} s.")
        return waveform[..., first : first + round(seconds * rate)]

    def _read_pictures(self, videos, images, window: "_Window", videos_kwargs: dict) -> list:
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
        name = "videos" if images is None else "images"
        metadata = videos_kwargs.pop("video_metadata", None)
        data_format = videos_kwargs.pop("input_data_format", None)
        do_rescale = videos_kwargs.get("do_rescale", self.video_processor.do_rescale)
        pixels = []
        for index, picture in enumerate(pictures):
            if picture is None:
                pixels.append(None)
            elif is_file(picture) or isinstance(picture, Media):
                pixels.append(self._to_pixels(self._load(picture, window, videos_kwargs, audio=False), videos_kwargs))
            else:
                clip_metadata = metadata[index] if isinstance(metadata, (list, tuple)) else metadata
                frames = self.video_processor.to_channels_first(picture, f"{name}[{index}]", data_format, do_rescale)
                pixels.append(self._to_pixels(frames, videos_kwargs, video_metadata=clip_metadata))
        return pixels

    def _to_pixels(self, frames: torch.Tensor | Media, videos_kwargs: dict, **overrides) -> torch.Tensor | None:
        """The pixels (frames, 3, height, width) of one clip."""
        if isinstance(frames, Media):
            if frames.frames is None:
                return None
            is_one = frames.duration == 0
            frames, overrides = to_tensor(frames.frames[:1] if is_one else frames.frames), {"do_sample_frames": False}
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
    def _check_captions(name: str, text: Any, may_lack: bool = False) -> list[str]:
        if text is None:
            return []
        captions = list(text) if isinstance(text, Iterable) and not isinstance(text, str) else [text]
        captions = ["" if caption is None and may_lack else caption for caption in captions]
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"`{name}[{index}]` must be a string, got {type(caption).__name__}.")
        return captions

    def _to_labels(self, captions: list[str], pad: bool, text_kwargs: dict) -> list[list[int]]:
        max_length = text_kwargs.get("max_length") or self.max_text_length
        if max_length < 3:
            raise ValueError(f"`max_length` must leave room for [CLS], a token and [SEP], got {max_length}.")
        # [CLS] and [SEP] count, but the labels begin after [CLS]: it is the decoder's start token.
        encoded = self.tokenizer(captions, add_special_tokens=False, truncation=True, max_length=max_length - 2)
        end = self.tokenizer.sep_token_id
        # A language model has no [SEP].
        end = self.tokenizer.eos_token_id if end is None else end
        labels = [[*ids, end] for ids in encoded["input_ids"]]
        if pad:
            fixed = text_kwargs.get("padding") == "max_length"
            length = max_length if fixed else max(map(len, labels))
            labels = [ids + [-100] * (length - len(ids)) for ids in labels]
        return labels

    def prompt_ids(self, prompt: str | None = None) -> list[int]:
        """The token ids of a prompt, with that of `CLIP_TOKEN` in the place of the clip.

        The parts before and after the clip are tokenised on their own (LAVCap).

        Args:
            prompt (`str`, *optional*): The instruction; by default the one that the processor was saved with.

        Raises:
            ValueError: If the processor has no `prompt_template`, or its tokenizer no chat template or no `CLIP_TOKEN`.
        """
        tokenizer, template = self.tokenizer, self.prompt_template
        clip = tokenizer.convert_tokens_to_ids(CLIP_TOKEN)
        if template is None or clip in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"This processor makes no prompts: `prompt_template` is {template!r}, and the tokenizer has "
                f"{'the' if clip not in (None, tokenizer.unk_token_id) else 'no'} token {CLIP_TOKEN}. Only a model with a "
                "language model as decoder takes them."
            )
        prompt = self.prompt if prompt is None else prompt
        if template == CHAT:
            if not tokenizer.chat_template:
                raise ValueError(f"`prompt_template` is {CHAT!r}, but the tokenizer has no chat template.")
            messages = [{"role": "user", "content": f"{CLIP_TOKEN}\n{prompt}"}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            start = []
        else:
            text = template.replace("{clip}", CLIP_TOKEN).replace("{prompt}", prompt)
            start = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
        before, _, after = text.partition(CLIP_TOKEN)
        before, after = (
            tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, after)
        )
        return [*start, *before, clip, *after]

    def _to_prompts(self, prompt: str | list[str], batch_size: int) -> dict[str, list[list[int]]]:
        prompts = [prompt] * batch_size if isinstance(prompt, str) else list(prompt)
        if len(prompts) != batch_size:
            raise ValueError(
                f"`prompt` has {len(prompts)} instructions for {batch_size} clips: give one, or one for each."
            )
        rows = [self.prompt_ids(each) for each in prompts]
        length, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        return {
            "input_ids": [[pad] * (length - len(row)) + row for row in rows],
            "attention_mask": [[0] * (length - len(row)) + [1] * len(row) for row in rows],
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "EVACapProcessor":
        """As in every [`ProcessorMixin`]; what is for a model alone, such as `dtype`, is left out."""
        # `pipeline` hands the model's options to the processor, whose tokenizer would keep them, and save them.
        kwargs = {name: value for name, value in kwargs.items() if name not in MODEL_OPTIONS}
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """As in every [`ProcessorMixin`]."""
        # The base class splits the name of a folder that it pushes, which only a string can.
        return super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)


__all__ = ["EVACapProcessor"]
