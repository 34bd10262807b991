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
"""The pipeline of the task "audio-visual-captioning": captions of files of any length."""

import itertools
import math
import multiprocessing
import numbers
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import BatchFeature
from transformers.pipelines.base import ChunkPipeline
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import logging

from .captioning_evacap import (
    caption_batch,
    reads_captions,
    require_agreement,
    require_confidence,
    require_gate,
    require_transport,
)
from .known_answer_evacap import write_known_answer
from .media_evacap import (
    Media,
    MediaError,
    MediaReader,
    file_source,
    guard_process,
    is_file,
    mix_down,
    open_media,
    probe_media,
)
from .processing_evacap import NEGLIGIBLE_SECONDS, EVACapProcessor, is_still
from .video_processing_evacap import stack_videos


# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

ON_ERROR = ("raise", "skip")
# Keys of an input, each with the argument of the processor for its value.
STREAMS = {
    "media": "media",
    "audio": "audio",
    "video": "videos",
    "image": "images",
    "videos": "videos",
    "images": "images",
}
CAPTIONS = ("audio_caption", "video_caption")
"""Keys of an input for what a model of the sound alone, and one of the picture alone, say of it."""


def split_streams(inputs: Any, processor: EVACapProcessor) -> dict[str, Any]:
    """The streams of one input that the model takes, by the argument of the processor.

    The stream that determines the length comes first.

    Raises:
        ValueError: If there is no stream, if a model with an audio tower gets no sound, or if the sound is malformed.
    """
    if is_file(inputs):
        inputs = {"media": inputs}
    elif hasattr(inputs, "get_all_samples") or (
        isinstance(inputs, Mapping) and {"array", "sampling_rate"} <= inputs.keys()
    ):
        inputs = {"audio": inputs}
    if not isinstance(inputs, Mapping) or not STREAMS.keys() & inputs.keys():
        found = f"the keys {sorted(map(str, inputs))}" if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(
            "An input must be a file (path, URL, bytes, file object) or a dict of `media`, or of `audio` with `video` or "
            f"`image`, got {found}."
        )
    given = {key: inputs[key] for key in STREAMS if inputs.get(key) is not None}
    for key in ("video", "image"):
        if {key, f"{key}s"} <= given.keys():
            raise ValueError(f"Pass either `{key}` or `{key}s`, which mean the same, not both.")
    streams = {STREAMS[key]: stream for key, stream in given.items()}
    modalities = processor.modalities
    if streams.keys() == {"videos"} and is_file(streams["videos"]):
        streams = {"media": streams["videos"]}
    unused = {"audio": ("videos", "images"), "video": ("audio",), "audio_video": ()}[modalities]
    streams = {argument: stream for argument, stream in streams.items() if argument not in unused}
    needed = {"videos", "images"} if modalities == "video" else {"audio"}
    if not streams.keys() & {"media", *needed}:
        raise ValueError(
            "The input has no picture."
            if modalities == "video"
            else "The input has no sound: only a model with fusion_type='video_only' captions without."
        )
    if "audio" in streams and not is_file(streams["audio"]):
        waveform = processor.to_waveform(streams["audio"], "audio")
        streams["audio"] = {"array": waveform, "sampling_rate": processor.feature_extractor.sampling_rate}
    return streams


def read_windows(
    inputs: Any,
    processor: EVACapProcessor,
    window_seconds: float,
    audio_track: int | None = None,
    stride: tuple[float, float] = (0.0, 0.0),
    start: float = 0.0,
    end: float | None = None,
    needs_captions: bool = False,
) -> Iterator[dict[str, Any]]:
    """Reads one input window by window, so that memory does not grow with its length.

    Each window begins `window_seconds` less both strides after the one before, and the last is shorter; a rest below
    half a second is left out (ours). Without strides, a file is read in one pass; with them, in as many passes at the
    same time as windows overlap at one moment. The sound determines the length. A picture that ends earlier is missing
    in later windows, a still stays, and decoded frames, which have no time stamps, are spread evenly over the sound.

    Args:
        inputs: One input, see [`AudioVisualCaptioningPipeline`].
        processor ([`EVACapProcessor`]): Makes the inputs of the model.
        window_seconds (`float`): Length of a window, in seconds.
        audio_track (`int`, *optional*): The sound track of a file, counted from 0.
        stride (`tuple[float, float]`): Seconds on the left and on the right of a window that are only context: they belong
            to its neighbours. Nothing is taken from the left of the first window and the right of the last.
        start (`float`): Where the first window begins, in seconds.
        end (`float`, *optional*): Where the last window ends at the latest, in seconds.
        needs_captions (`bool`): Whether a window with a picture needs `CAPTIONS`.

    Raises:
        ValueError: If the input cannot be read, or if a window lacks captions.

    Yields:
        `{"span": (start, end), "timestamp": (start, end), "is_last": bool, "is_silent": bool, "inputs": BatchFeature}`:
        the window, and the part of it that is not a stride. These parts follow each other without a gap.
    """
    left, right = stride
    step = window_seconds - left - right
    with ExitStack() as files:
        timed, frames = {}, {}
        for name, stream in split_streams(inputs, processor).items():
            if is_file(stream):
                overlap = math.ceil(window_seconds / step - 1e-9)
                timed[name] = _FileWindows(name, stream, processor, overlap, audio_track, files)
            elif name == "audio":
                timed[name] = _SoundWindows(stream, processor)
            else:
                frames[name] = stream
        leading = next(iter(timed.values()), None)
        # Only frames without a clock ask for the length before the end.
        total = leading.length() if frames and leading is not None else None
        warned = False
        for index in itertools.count():
            begin = start + index * step
            seconds = window_seconds if end is None else min(window_seconds, end - begin)
            taken = {name: stream.take(begin, seconds) for name, stream in timed.items()}
            first = next(iter(taken.values()), None)
            stop = begin + (seconds if first is None or not first.duration else first.duration)
            at_end = end is not None and end - begin - seconds <= NEGLIGIBLE_SECONDS
            is_last = leading is None or at_end or not leading.goes_on()
            window = {name: [clip] for name, clip in taken.items() if clip is not None}
            for name, stream in frames.items():
                is_part = total and (begin > 0 or stop < total - NEGLIGIBLE_SECONDS)
                if is_part and not is_still(stream):
                    number = int(begin / total * len(stream))
                    stream = stream[number : max(number + 1, math.ceil(stop / total * len(stream)))]
                window[name] = [stream]
            for name in CAPTIONS if isinstance(inputs, Mapping) else ():
                caption = caption_at(inputs.get(name), (begin + stop) / 2)
                if caption is not None:
                    window[f"{name}s"] = [caption]
            is_silent = first is not None and first.silent
            if is_silent and not warned:
                warned = True
                logger.warning(
                    f"{first.name} is silent from {begin:g} to {stop:g} s: what is said of its sound there is invented."
                )
            made = processor(**window, return_tensors="pt")
            missing = [name for name in CAPTIONS if f"{name}s" not in window]
            if needs_captions and missing and "pixel_values_videos" in made:
                raise ValueError(
                    f"The window from {begin:g} to {stop:g} s has no {' and no '.join(f'`{name}`' for name in missing)}: a "
                    "model with `enrichment='case'` reads what a model of the sound alone, and one of the picture alone, say "
                    "of it. Give the input as a dict with `media`, `audio_caption` and `video_caption`, each a sentence or "
                    "the `chunks` of a result."
                )
            read = {
                "span": (begin, stop),
                "timestamp": (begin + left if index else begin, stop if is_last else stop - right),
                "is_last": is_last,
                "is_silent": is_silent,
                "inputs": made,
            }
            if is_last:
                break
            yield read
    # After the files have been closed, which warns of damage: nobody need ask for more than the last window.
    yield read


def caption_at(captions: Any, seconds: float) -> str | None:
    """What is said of an input at a moment: the caption of all of it, or of its window there, if there is one.

    Args:
        captions: A sentence, or `[{"timestamp": (start, end), "text": str}, …]` as in the `"chunks"` of a result.
        seconds (`float`): The moment.

    Raises:
        ValueError: If `captions` are neither.
    """
    if captions is None or isinstance(captions, str):
        return captions
    try:
        windows = [(*window["timestamp"], window["text"]) for window in captions]
        return next((text for start, end, text in windows if start <= seconds < end), None)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f'A caption must be a sentence, or a list of {{"timestamp": (start, end), "text": …}}, got {captions!r}.'
        ) from error


class _FileWindows:
    """The windows of a file in the role of an argument of the processor; a still is the same in all.

    A reader only reads on, so windows that overlap have readers of their own, which take turns.
    """

    def __init__(
        self,
        name: str,
        source: Any,
        processor: EVACapProcessor,
        overlap: int,
        audio_track: int | None,
        files: ExitStack,
    ):
        self.files = files
        self.file = files.enter_context(open_media(file_source(source)))
        self.open = partial(
            processor.open,
            self.file,
            audio_track=audio_track,
            audio=name in ("media", "audio"),
            video=name != "audio",
        )
        self.readers: list[MediaReader | None] = [None] * overlap
        self.still: Media | None = None
        self.count = 0

    def take(self, start: float, seconds: float) -> Media | None:
        """The window of so many seconds from `start` on; `None` where the file has ended before."""
        if self.still is not None:
            return self.still
        number = self.count % len(self.readers)
        if self.readers[number] is None:
            self.readers[number] = self._open(start)
        self.reader = self.readers[number]
        self.reader.position = start
        if self.count and not self.reader.goes_on(0.0):
            return None
        self.count += 1
        clip = self.reader.read(seconds)
        self.still = clip if self.reader.still else None
        return clip

    def _open(self, start: float) -> MediaReader:
        reader = self.files.enter_context(self.open(start=start))
        first = self.readers[0] or reader
        if reader is not first:
            # It is closed before the first one, which then warns for all.
            self.files.callback(lambda: [first.problems.note(reader.problems.pop(0)) for _ in list(reader.problems)])
        return reader

    def goes_on(self) -> bool:
        """Whether the file goes on after the window that was taken last."""
        return self.reader.goes_on(NEGLIGIBLE_SECONDS)

    def length(self) -> float:
        return probe_media(self.file).duration


class _SoundWindows:
    """The windows of a decoded sound."""

    def __init__(self, sound: dict[str, Any], processor: EVACapProcessor):
        self.rate = sound["sampling_rate"]
        waveform = sound["array"]
        mono = waveform if waveform.ndim == 1 else mix_down(waveform, processor.feature_extractor.channels)
        self.waveform = mono.float().cpu().numpy()
        self.position = 0.0

    def take(self, start: float, seconds: float) -> Media:
        if start and start >= self.length():
            raise ValueError(f"`start` is {start:g} s but the sound has {self.length():.2f} s.")
        self.position = start + seconds
        part = self.waveform[round(start * self.rate) : round(self.position * self.rate)]
        return Media(part, self.rate, None, None, start, len(part) / self.rate, "the sound")

    def goes_on(self) -> bool:
        return self.length() - self.position > NEGLIGIBLE_SECONDS

    def length(self) -> float:
        return len(self.waveform) / self.rate


class WindowDataset(IterableDataset):
    """The windows of many inputs in their order, each with the number of its input.

    Workers divide the inputs among themselves. If reading fails, the error replaces the remaining windows of the
    input, so that the caller can decide and no other input is lost.
    """

    def __init__(self, inputs: Any, read: Callable[[Any], Iterator[dict[str, Any]]]):
        self.inputs, self.read = inputs, read

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            guard_process()
        if hasattr(self.inputs, "__len__"):
            getters = ((i, partial(self.inputs.__getitem__, i)) for i in range(first, len(self.inputs), step))
        else:
            getters = ((i, lambda item=item: item) for i, item in enumerate(self.inputs))
        for index, get in getters:
            try:
                for window in self.read(get()):
                    yield index, window
            except Exception as error:
                is_alone = hasattr(self.inputs, "__len__") and len(self.inputs) == 1
                yield index, portable(error if is_alone else numbered(error, index))


def _copies_itself() -> bool:
    """Whether worker processes start as copies of this one, so that they need no inputs that can be pickled."""
    # The first of all is the default. To ask for the default itself would settle it.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    return method == "fork"


def numbered(error: Exception, index: int) -> Exception:
    """The error with the number of its input before its message, unless the message names a file."""
    if not isinstance(error, MediaError) or str(error).startswith("<"):
        error.args = (f"inputs[{index}]: {message(error)}", *error.args[1:])
    return error


def message(error: Exception) -> str:
    """The message of an error, or its type if it has none, as `MemoryError`."""
    return str(error) or type(error).__name__


def portable(error: Exception) -> Exception:
    """The error itself if it can be pickled for the way from a worker process, otherwise one with the same message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@dataclass
class WindowBatch:
    """A batch of windows, and the items that they come from, each with the number of its input."""

    items: list[tuple[int, dict[str, Any] | Exception]]
    inputs: dict[str, torch.Tensor]

    def pin_memory(self) -> "WindowBatch":
        """Called by [`DataLoader`], which would turn the items' tuples into lists."""
        return WindowBatch(self.items, {name: value.pin_memory() for name, value in self.inputs.items()})


def collate_windows(items: list[tuple[int, dict[str, Any] | Exception]]) -> WindowBatch:
    """Collates windows into one batch; their items keep everything except the inputs, such as timestamps or the error."""
    batch = [item.pop("inputs") for _, item in items if not isinstance(item, Exception)]
    inputs = {
        name: torch.cat([window[name] for window in batch])
        for name in ("input_features", "input_features_mask")
        if batch and name in batch[0]
    }
    videos = [window["pixel_values_videos"][0] if "pixel_values_videos" in window else None for window in batch]
    if any(video is not None for video in videos):
        inputs.update(stack_videos(videos))
    for name in ("audio_caption_ids", "video_caption_ids"):
        # A window without a picture needs none.
        rows = [window[name][0] if name in window else torch.full((1,), -100) for window in batch]
        if any(name in window for window in batch):
            inputs[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return WindowBatch(items, inputs)


def undecoded(rows: Any) -> Any:
    """`datasets` rows, or one of their columns, with files instead of decoders, so that windows can be read."""
    if isinstance(rows, KeyDataset):
        return KeyDataset(undecoded(rows.dataset), rows.key)
    if hasattr(rows, "column_name"):
        return undecoded(rows.source)[rows.column_name]
    if hasattr(rows, "cast_column"):
        for name, feature in (getattr(rows, "features", None) or {}).items():
            if getattr(feature, "decode", False):
                rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def merged(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chunks, with one in place of neighbours that say the same."""
    events: list[dict[str, Any]] = []
    for chunk in chunks:
        last = events[-1] if events else None
        if last is not None and last | {"timestamp": None} == chunk | {"timestamp": None}:
            last["timestamp"] = (last["timestamp"][0], chunk["timestamp"][1])
        else:
            events.append(dict(chunk))
    return events


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


class _Rows(Dataset):
    """Any indexable collection, such as a `datasets.Dataset` or a column of one, as a PyTorch dataset."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class _Captions:
    """The results of many inputs, computed during iteration; it has a length if the inputs have one."""

    def __init__(self, inputs: Any, iterate: Callable[[], Iterator[dict[str, Any]]]):
        self.inputs, self.iterate = inputs, iterate

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.iterate()


class AudioVisualCaptioningPipeline(ChunkPipeline):
    r"""Describes what is heard in audio-visual clips of any length.

    Args:
        model ([`EVACapForConditionalGeneration`]): The captioner.
        processor ([`EVACapProcessor`]): Its processor.
        kwargs: As in every [`Pipeline`]: `device`, `dtype`, `batch_size`, `num_workers`, …, and defaults for the
            arguments of a call.

    Example:
    ```python
    >>> import evacap
    >>> from transformers import pipeline

    >>> captioner = pipeline("audio-visual-captioning", model=evacap.TINY)
    >>> captioner("clip.mp4")
    {"text": "a dog barks while a man speaks"}
    >>> captioner(["clip.mp4", {"audio": "sound.wav", "image": "still.png"}], batch_size=2, num_beams=4)
    >>> captioner("two_hours.mp4", batch_size=8)["chunks"][0]
    {"timestamp": (0.0, 10.24), "text": "music plays"}
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

    def __init__(self, model, processor: EVACapProcessor | None = None, **kwargs):
        if processor is None:
            raise ValueError("`processor` is missing: pass the EVACapProcessor of the checkpoint.")
        super().__init__(model, processor=processor, **kwargs)

    def __call__(self, inputs: Any, **kwargs) -> dict | list[dict] | Iterator[dict]:
        r"""Captions one input or many.

        Args:
            inputs: One input is a file (path, URL, bytes, file object, or the `{"bytes": …, "path": …}` of
                `datasets`), or a dict with `"media"`, or a dict with `"audio"` (file or `{"array": …, "sampling_rate":
                …}`) and optionally `"video"` (file, array, list of PIL images or picture files) or `"image"`. The
                names of the processor, `"videos"` and `"images"`, are accepted too; other keys are ignored. A
                `"video"` file alone also gives the sound. For a model with `enrichment="case"` a dict also has
                `"audio_caption"` and `"video_caption"`: what a model of the sound alone, and one of the picture alone,
                say of it, each a sentence, or the `"chunks"` of a result, of which a window reads the one in its middle.
                A list or tuple of inputs gives a list. A generator, a PyTorch or `datasets` dataset, or a column of
                one, gives an iterator that reads as it goes.
            batch_size (`int`, *optional*, defaults to 1): Number of windows in a batch, across inputs.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that read and decode, each within a budget of memory; a generator is read by one at most,
                and by none where processes do not start as copies of this one (macOS, Windows, Python 3.14).
            chunk_length_s (`float`, *optional*, defaults to `processor.window_seconds`):
                Length of the windows in which a longer input is captioned, at most `processor.window_seconds`. The last
                is shorter; a rest below 0.5 s is left out.
            stride_length_s (`float` or `tuple[float, float]`, *optional*, defaults to 0):
                Seconds on the left and on the right of each window that are heard and seen, but belong to its
                neighbours, as in Transformers' speech recognition: windows begin every `chunk_length_s` less both, which
                must leave 0.5 s. The `"timestamp"` of a chunk has no stride in it, so that chunks follow each other.
            merge_chunks (`bool`, *optional*):
                Whether neighbouring windows with the same caption become one chunk; by default if windows overlap.
            start (`float`, *optional*, defaults to 0.0), end (`float`, *optional*):
                The part of each input to caption, in seconds. Time stamps count from the beginning of the input.
            return_timestamps (`bool`, *optional*):
                Whether to return `"chunks"`; by default for inputs of more than one window.
            audio_track (`int`, *optional*):
                Which of the sound tracks of a file to hear, counted from 0; FFmpeg's choice by default.
            return_gate (`bool`, *optional*, defaults to `False`):
                Whether to return, for each audio time step, `"gate"` (0: the picture is ignored), `"entropy"`, means
                over the mel rows, and `"times"`, the middle of the step in seconds.
            return_agreement (`bool`, *optional*, defaults to `False`):
                Whether to return how probable it is that the picture belongs to the sound, of a model with
                `gate_type="agreement"`: `"agreement"`, `[{"timestamp": (start, end), "probability": float}, …]` of the
                windows, and `"agreement_by_step"` and `"times"` of the audio time steps. `None` where nothing is seen.
            return_confidence (`bool`, *optional*, defaults to `False`):
                Whether to return `"words"` of a model with `text_fusion="adaptive"`: `[{"timestamp": (start, end), "word":
                str, "audio": float, "video": float}, …]`, how far the sound and how far the picture was trusted for each
                word, and the window of the word. Without a picture `"video"` is exactly 0.
            return_transport (`bool`, *optional*, defaults to `False`):
                Whether to return `"transport"` of a model with `fusion_type="optimal_transport"`: `[{"timestamp": (start,
                end), "map": list}, …]` of the windows, where the map has a row for each audio time step and a column for
                each picture, and sums to 1 over a whole window; without a picture the rows are empty.
            on_error (`str`, *optional*, defaults to `"raise"`):
                `"skip"` gives `{"error": message}` for an input that cannot be read, and goes on with the others.
            kwargs: Arguments of `generate` (`max_new_tokens`, `num_beams`, `num_return_sequences`, …), flat or as
                `generate_kwargs`.

        Returns:
            For each input `{"text": str}`, where the captions of several windows are joined by ". ", with
            `"chunks": [{"timestamp": (start, end), "text": str}, …]`, and with what else was asked for; with
            `num_return_sequences` above 1 a list of such dicts. `"silent": True` stands in a result, or in a chunk, in
            whose sound there is nothing to hear, and one warning an input: what is said of silence is invented.

        Raises:
            ValueError: If an argument is out of range or, with `on_error="raise"`, if an input is of no such kind or a
                file cannot be read; the message has the file, or the number of the input.
        """
        inputs = undecoded(inputs)
        if isinstance(inputs, (list, tuple)):
            inputs = list(inputs)
            if not inputs:
                return []
        elif isinstance(inputs, IterableDataset):
            # Even one with a length cannot be indexed.
            inputs = (item for item in inputs)
        elif not (is_file(inputs) or isinstance(inputs, (Mapping, Dataset)) or hasattr(inputs, "ndim")):
            if hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__"):
                inputs = _Rows(inputs)
            elif hasattr(inputs, "__iter__"):
                inputs = (item for item in inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        chunk_length_s: float | None = None,
        stride_length_s: float | tuple[float, float] | None = None,
        start: float | None = None,
        end: float | None = None,
        audio_track: int | None = None,
        return_timestamps: bool | None = None,
        merge_chunks: bool | None = None,
        return_gate: bool | None = None,
        return_agreement: bool | None = None,
        return_confidence: bool | None = None,
        return_transport: bool | None = None,
        on_error: str | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> tuple[dict, dict, dict]:
        if on_error is not None and on_error not in ON_ERROR:
            raise ValueError(f"`on_error` must be one of {', '.join(map(repr, ON_ERROR))}, got {on_error!r}.")
        scale = {**(generate_kwargs or {}), **kwargs}.get("guidance_scale")
        if scale is not None and scale != 1:
            raise ValueError(
                f"`guidance_scale` is {scale}: classifier-free guidance compares with the model without its prompt, and "
                "this one has no prompt in words. Leave it out."
            )
        longest = self.processor.window_seconds
        if chunk_length_s is not None and not (
            isinstance(chunk_length_s, numbers.Real) and NEGLIGIBLE_SECONDS <= chunk_length_s <= longest
        ):
            raise ValueError(
                f"`chunk_length_s` must be between {NEGLIGIBLE_SECONDS} and {longest:g} s, which one caption covers, got "
                f"{chunk_length_s!r}."
            )
        stride = None
        if stride_length_s is not None:
            stride = self._to_stride(stride_length_s, chunk_length_s or longest)
            if merge_chunks is None and any(stride):
                merge_chunks = True
        times = (start or 0, math.inf if end is None else end)
        if not (all(isinstance(time, numbers.Real) for time in times) and 0 <= times[0] < times[1]):
            raise ValueError(
                f"`start` and `end` must be seconds, with 0 <= `start` < `end`, got {start!r} and {end!r}."
            )
        if return_gate:
            require_gate(self.model.config)
        if return_agreement:
            require_agreement(self.model.config)
        if return_confidence:
            require_confidence(self.model.config)
        if return_transport:
            require_transport(self.model.config)
        groups = (
            {
                "chunk_length_s": chunk_length_s,
                "stride": stride,
                "start": start,
                "end": end,
                "audio_track": audio_track,
            },
            {
                "return_gate": return_gate,
                "return_agreement": return_agreement,
                "return_confidence": return_confidence,
                "return_transport": return_transport,
            },
            {"return_timestamps": return_timestamps, "merge_chunks": merge_chunks, "on_error": on_error},
        )
        preprocess, forward, postprocess = (
            {name: value for name, value in group.items() if value is not None} for group in groups
        )
        return preprocess, {**forward, **(generate_kwargs or {}), **kwargs}, postprocess

    @staticmethod
    def _to_stride(stride_length_s: Any, chunk_length_s: float) -> tuple[float, float]:
        """Left and right stride of windows of this length."""
        is_one = isinstance(stride_length_s, numbers.Real)
        stride = (stride_length_s, stride_length_s) if is_one else tuple(stride_length_s)
        if not (
            len(stride) == 2
            and all(isinstance(seconds, numbers.Real) and seconds >= 0 for seconds in stride)
            and sum(stride) <= chunk_length_s - NEGLIGIBLE_SECONDS + 1e-9
        ):
            raise ValueError(
                "`stride_length_s` must be seconds, or a pair of them for left and right, that leave at least "
                f"{NEGLIGIBLE_SECONDS} s of the {chunk_length_s:g} s of a window, got {stride_length_s!r}."
            )
        return stride

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> _Captions:
        loader = self.window_loader(inputs, num_workers, batch_size, **preprocess_params)
        return _Captions(inputs, partial(self._caption, loader, forward_params, **postprocess_params))

    def window_loader(self, inputs: Any, num_workers: int, batch_size: int, **preprocess_params) -> DataLoader:
        """The windows of the inputs in batches, read by other processes while the model runs."""
        # The base class reads in one process at most, cannot batch windows with and without a picture, and loses a
        # batch if one file is bad.
        most = len(inputs) if hasattr(inputs, "__len__") else int(_copies_itself())
        return DataLoader(
            WindowDataset(inputs, partial(read_windows, **self._reading(**preprocess_params))),
            batch_size=batch_size,
            num_workers=min(num_workers, most),
            collate_fn=collate_windows,
            pin_memory=self.device.type == "cuda",
        )

    def _reading(self, chunk_length_s: float | None = None, **options) -> dict[str, Any]:
        return {
            "processor": self.processor,
            "window_seconds": chunk_length_s or self.processor.window_seconds,
            "needs_captions": reads_captions(self.model.config),
            **options,
        }

    def _caption(
        self, loader: DataLoader, forward_params: dict, on_error: str = "raise", **postprocess_params
    ) -> Iterator[dict]:
        """Runs the model on batches of windows and yields the results in the order of the inputs."""
        windows, results, upcoming = defaultdict(list), {}, 0
        for batch in loader:
            inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.inputs.items()}
            outputs = self.forward(inputs, **forward_params) if inputs else {}
            rows = iter(range(len(batch.items)))
            for index, item in batch.items:
                if isinstance(item, Exception):
                    windows.pop(index, None)
                    results[index] = item
                    continue
                row = next(rows)
                windows[index].append({**item, **{name: value[row] for name, value in outputs.items()}})
                if item["is_last"]:
                    results[index] = self.postprocess(windows.pop(index), **postprocess_params)
            while upcoming in results:
                result = results.pop(upcoming)
                if isinstance(result, Exception):
                    if on_error == "raise":
                        raise result
                    result = {"error": message(result)}
                yield result
                upcoming += 1

    def preprocess(self, inputs: Any, **preprocess_params) -> Iterator[dict[str, Any]]:
        """The windows of one input, see [`read_windows`]."""
        return read_windows(inputs, **self._reading(**preprocess_params))

    def _forward(self, model_inputs: BatchFeature | dict, **options) -> dict:
        if "max_new_tokens" in options:
            # Otherwise `generate` warns of the default `max_length` at every call.
            options.setdefault("max_length", None)
        batch = caption_batch(self.model, self.processor, model_inputs, **options)
        return {name: value for name, value in vars(batch).items() if value is not None}

    def postprocess(
        self, windows: list[dict[str, Any]], return_timestamps: bool | None = None, merge_chunks: bool = False
    ) -> dict | list[dict]:
        """The result of one input from its windows."""
        results = []
        for number, texts in enumerate(zip(*(window["texts"] for window in windows))):
            chunks = [
                {
                    "timestamp": window["timestamp"],
                    "text": text,
                    **({"silent": True} if window["is_silent"] else {}),
                }
                for window, text in zip(windows, texts)
            ]
            if merge_chunks:
                chunks = merged(chunks)
            result = {"text": ". ".join(filter(None, (chunk["text"] for chunk in chunks)))}
            if return_timestamps or (return_timestamps is None and len(windows) > 1):
                result["chunks"] = chunks
            if all(window["is_silent"] for window in windows):
                result["silent"] = True
            if "words" in windows[0]:
                result["words"] = [
                    {"timestamp": window["timestamp"], **word}
                    for window in windows
                    for word in window["words"][number]
                ]
            results.append(result | self.over_time(windows))
        return results if len(results) > 1 else results[0]

    def over_time(self, windows: list[dict[str, Any]]) -> dict[str, list]:
        """Gate, entropy, agreement and transport of the windows of one input, as a call returns them."""
        names = [name for name in ("gate", "entropy", "agreement_by_step") if name in windows[0]]
        extractor = self.processor.feature_extractor
        step = self.model.config.audio_config.patch_size * extractor.hop_length / extractor.sampling_rate
        curves = {"times": [], **{name: [] for name in names}} if names else {}
        if "transport" in windows[0]:
            curves["transport"] = []
        for window in windows:
            (start, end), (first, last) = window["span"], window["timestamp"]
            # The steps with their middle in the strides belong to other windows, those of the padding hold no sound.
            begin = math.ceil((first - start) / step - 0.5 - 1e-6)
            stop = math.ceil((end - start) / step - 1e-6 if last == end else (last - start) / step - 0.5 - 1e-6)
            for name in names:
                curves[name] += [_number(value) for value in window[name][begin:stop].tolist()]
            if "transport" in window:
                part = {"timestamp": window["timestamp"], "map": window["transport"][begin:stop].tolist()}
                curves["transport"].append(part)
            if names:
                stop = min(stop, len(window[names[0]]))
                curves["times"] += [start + (i + 0.5) * step for i in range(begin, stop)]
        if "agreement" in windows[0]:
            curves["agreement"] = [
                {"timestamp": window["timestamp"], "probability": _number(window["agreement"].item())}
                for window in windows
            ]
        return curves

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Saves the model, the processor, their code and the known answer.

        With the code the folder loads without this package. With the known answer `evacap check-install` can tell
        whether another machine captions as this one does.
        """
        # First, because it is small: if the folder cannot be written, no large file is left in it.
        self.processor.save_pretrained(save_directory, **kwargs)
        # The base class would write two parts of the processor once more, into files that nobody reads.
        parts = {name: getattr(self, name) for name in ("tokenizer", "feature_extractor")}
        self.tokenizer = self.feature_extractor = None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            vars(self).update(parts)
        write_known_answer(save_directory, self.model, self.processor)


__all__ = ["AudioVisualCaptioningPipeline"]
