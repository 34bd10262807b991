"""Media files to ready features, once for all trainings: Parquet shards that `datasets` reads.

Which clip goes into which shard follows from the manifest alone, and a shard that is there is whole. So a preparation
that was stopped, in whatever way, goes on with the first shard that is missing, and what comes out is the same to the
byte.
"""

import copy
import glob
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm
from transformers.video_utils import VideoMetadata

from ...processing.media_evacap import probe_media
from ...processing.processing_evacap import EVACapProcessor
from ..files import write_text
from .audiocaps import CLIP_SECONDS, EXTENSIONS
from .manifest import Entry
from .worker_pool import Lost, WorkerPool, usable_cores


VERSION = 1
PREPARATION_FILE, REPORT_FILE = "preparation.json", "report.jsonl"
SHARD_SIZE = 256
JPEG_QUALITY = 95
ROWS_AT_ONCE = 16
"""Clips of a row group: what is in memory while it is written, and what a stream reads at a time."""
SECONDS_A_CLIP = 600.0
"""A worker that takes longer for a clip is ended."""
LONGEST_CLIP = 15.0
"""Seconds; a file that lasts longer, and whose name tells no start time, is the whole video that the clip is from."""
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "input_features": pa.list_(pa.float16()),
        "frames": pa.list_(pa.binary()),
        "captions": pa.list_(pa.string()),
        "extra": pa.string(),
    }
)
# In the footer of each shard, so that what is known of its clips appears together with it.
_ACCOUNT = b"evacap"

# What the stored features depend on. Pixels are normalised, and frames chosen, when they are read.
AUDIO_FIELDS = (
    "feature_size",
    "sampling_rate",
    "padding_value",
    "max_frames",
    "frame_length_ms",
    "frame_shift_ms",
    "low_freq",
    "high_freq",
    "preemphasis",
    "window_type",
    "mean",
    "std",
    "channels",
)
VIDEO_FIELDS = ("do_resize", "size", "resample", "do_center_crop", "crop_size")


def prepare(
    entries: list[Entry],
    output: str | os.PathLike,
    processor: EVACapProcessor,
    split: str = "train",
    num_frames: int | None = None,
    fps: float | None = None,
    jpeg_quality: int = JPEG_QUALITY,
    shard_size: int = SHARD_SIZE,
    num_workers: int | None = None,
) -> dict[str, int]:
    """
    Makes the features of all clips and writes them to `output/data/SPLIT-….parquet`, for
    `datasets.load_dataset(output)` and [`PreparedClips`]. A row has

    * `id`, `captions`, and `extra`, the JSON of all else that the manifest says;
    * `input_features`, float16, frame after frame of mel bins. The rounding changes a value by 0.001 at most, as
      normalised log-mel values lie within ±4;
    * `frames`, JPEG files of the pictures, resized and cropped but not normalised; none for a clip without a picture.

    `preparation.json` says what the features depend on and how many clips there are. `report.jsonl` lists the clips
    that cannot be used, and those of which only a part could be read (`"usable": true`), with the reason. Where the
    folder is there already, only what is missing is made: remove a shard to have it made anew.

    Args:
        entries (`list[Entry]`): From [`read_manifest`] or [`read_audiocaps`].
        output (`str` or `os.PathLike`): Folder. Each further split is added by a call of its own.
        processor ([`EVACapProcessor`]): Of the models that will be trained; its tokenizer is not used.
        split (`str`): Name of the split.
        num_frames (`int`, *optional*): Keep so many frames, uniformly over the clip.
        fps (`float`, *optional*): Keep all frames of the clip at this rate, as a random run of frames needs them.
            Without either, what the video processor samples is kept: at its `fps`, if it has one, else its
            `num_frames`.
        jpeg_quality (`int`): Of the frames, 1 to 100.
        shard_size (`int`): Rows of the manifest that go into a shard.
        num_workers (`int`, *optional*): Processes; one for each core by default. They do not change what is written.

    Returns:
        `dict`: `rows` of the manifest, `clips` that can be used, and how many of these are `without_picture` and
        `damaged`.

    Raises:
        ValueError: For a bad argument, or if the folder was begun with other settings or another manifest.
        RuntimeError: If the worker processes cannot start, or no clip at all could be used.
    """
    output = Path(output)
    if not re.fullmatch(r"\w+(\.\w+)*", split) or split == "all":
        raise ValueError(
            f"`split` is {split!r}; a name of a split has letters, digits, _ and dots between them, and is not 'all'"
        )
    numbers = {"shard_size": shard_size, "num_workers": num_workers, "num_frames": num_frames, "fps": fps}
    for name, value in numbers.items():
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"`{name}` is {value}; it must be above 0")
    if not 1 <= jpeg_quality <= 100:
        raise ValueError(f"`jpeg_quality` is {jpeg_quality}; it must be from 1 to 100")
    if num_frames is not None and fps is not None:
        raise ValueError("give `num_frames` or `fps`, not both")
    if num_frames is None and fps is None:
        fps = processor.video_processor.fps
        num_frames = processor.video_processor.num_frames if fps is None else None
    frames = {"num_frames": num_frames, "fps": fps, "jpeg_quality": jpeg_quality}
    starts = range(0, len(entries), shard_size)
    names = [f"{split}-{shard:05d}-of-{len(starts):05d}.parquet" for shard in range(len(starts))]
    shards = {
        output / "data" / name: range(len(entries))[start : start + shard_size] for name, start in zip(names, starts)
    }
    _begin(output, {**describe(processor), "frames": frames}, split, entries, shard_size)

    todo = [(path, row) for path, rows in shards.items() if not path.exists() for row in rows]
    try:
        if todo:
            workers = min(num_workers or usable_cores(), len(todo))
            make = FeatureMaker(_storing(processor, num_frames, fps), jpeg_quality)
            bar = tqdm(total=len(entries), initial=len(entries) - len(todo), desc=split, unit="clip")
            with bar, closing(WorkerPool(make, workers, SECONDS_A_CLIP, __name__)) as pool:
                made = pool.map(entries[row] for _, row in todo)
                for path, rows in groupby(todo, key=lambda place: place[0]):
                    _write_shard(path, split, (_shown(next(made), bar) for _ in rows))
    finally:
        _report(output)
    return _count(output, split, list(shards))


def describe(processor: EVACapProcessor) -> dict[str, Any]:
    """What stored features depend on: the fields in which the processor that reads them must be the same."""
    audio, video = processor.feature_extractor.to_dict(), processor.video_processor.to_dict()
    fields = {
        "version": VERSION,
        "modalities": processor.modalities,
        "feature_extractor": {name: audio[name] for name in AUDIO_FIELDS},
        "video_processor": {name: video[name] for name in VIDEO_FIELDS},
    }
    return json.loads(json.dumps(fields))


def differences(found: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The fields of `expected` that `found` lacks, or has with another value, in words."""
    for name, value in expected.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            yield from differences(found[name], value, f"{prefix}{name}.")
        elif found.get(name) != value:
            yield f"`{prefix}{name}` is {found.get(name)!r} there and {value!r} here"


def read_preparation(folder: str | os.PathLike) -> dict[str, Any]:
    """What `preparation.json` of a prepared folder says.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(folder) / PREPARATION_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; make the folder with `evacap prepare`")
    return json.loads(path.read_text(encoding="utf-8"))


def _begin(output: Path, settings: dict[str, Any], split: str, entries: list[Entry], shard_size: int) -> None:
    """Writes down what is about to be made, or compares it with what was begun."""
    # Where the files lie may change: nothing that is stored depends on it.
    stored = json.dumps([[entry.id, entry.captions, entry.start, entry.duration, entry.extra] for entry in entries])
    manifest = hashlib.sha256(stored.encode()).hexdigest()
    begun = {"rows": len(entries), "shard_size": shard_size, "manifest": manifest}
    preparation = {**settings, "splits": {}}
    if (output / PREPARATION_FILE).exists():
        preparation = read_preparation(output)
    preparation["splits"].setdefault(split, begun)
    different = [*differences(preparation, settings | {"splits": {split: begun}})]
    if different:
        raise ValueError(f"{output}: was begun with other settings: {'; '.join(different)}. Give a new folder.")
    (output / "data").mkdir(parents=True, exist_ok=True)
    for partial in (output / "data").glob(f".{split}-*.partial"):
        partial.unlink()
    write_text(output / PREPARATION_FILE, json.dumps(preparation, indent=2) + "\n")


def _storing(processor: EVACapProcessor, num_frames: int | None, fps: float | None) -> EVACapProcessor:
    """A copy that makes what is stored: all frames that are kept, as they are before they are normalised."""
    storing = copy.copy(processor)
    storing.tokenizer = None
    video = storing.video_processor = copy.deepcopy(processor.video_processor)
    video.num_frames, video.fps, video.frame_sampling, video.tubelet_size = num_frames or 1, fps, "uniform", 1
    video.do_rescale = video.do_normalize = False
    return storing


@dataclass(frozen=True)
class Features:
    """What becomes of a clip.

    Args:
        input_features (`np.ndarray` of shape `(frames * mel bins,)`): float16; empty if the model does not listen.
        frames (`tuple[bytes, ...]`): JPEG files; none if there is no picture.
        problem (`str`, *optional*): What is wrong with the clip.
        usable (`bool`): Whether it can be used, all the same or because nothing is wrong.
    """

    input_features: np.ndarray
    frames: tuple[bytes, ...]
    problem: str | None = None
    usable: bool = True


class FeatureMaker:
    """Makes the stored features of a clip.

    Args:
        processor ([`EVACapProcessor`]): Makes pixels from 0 to 255.
        jpeg_quality (`int`): 1 to 100.
    """

    def __init__(self, processor: EVACapProcessor, jpeg_quality: int):
        self.processor = processor
        self.jpeg_quality = jpeg_quality

    def __call__(self, entry: Entry) -> Features:
        """What becomes of a clip, whatever is wrong with it.

        Raises:
            ImportError: If a backend of the processor is not installed: that is no fault of the clip.
        """
        with _warnings() as messages:
            try:
                inputs = self._process(entry)
            except ImportError:
                raise
            except Exception as error:
                return _unusable(str(error) or type(error).__name__)
        features = inputs.get("input_features")
        features = np.empty(0) if features is None else features[0].numpy()
        frames = () if "pixel_values_videos" not in inputs else inputs["pixel_values_videos"][0].permute(0, 2, 3, 1)
        return Features(
            features.astype(np.float16).ravel(),
            tuple(self._to_jpeg(frame.numpy()) for frame in frames),
            "; ".join(messages) or None,
        )

    def _process(self, entry: Entry) -> dict[str, Any]:
        listens, looks = self.processor.modalities != "video", self.processor.modalities != "audio"
        if entry.media is not None:
            return self.processor(media=entry.media, **self._window(entry.media, entry), return_tensors="pt")
        if entry.path is None:
            raise FileNotFoundError("no file in the media folder has its name")
        inputs = {}
        if listens:
            if entry.audio is None:
                raise ValueError("it has no sound")
            inputs |= self.processor(audio=entry.audio, **self._window(entry.audio, entry), return_tensors="pt")
        if looks and entry.video is not None:
            inputs |= self.processor(videos=entry.video, **self._window(entry.video, entry), return_tensors="pt")
        elif looks and entry.frames is not None:
            pictures = self._choose(_pictures(entry.frames))
            inputs |= self.processor(videos=[pictures], do_sample_frames=False, return_tensors="pt")
        return inputs

    def _window(self, path: str, entry: Entry) -> dict[str, float]:
        start, duration = entry.start, entry.duration
        if entry.start_in_whole is not None and probe_media(path).duration > LONGEST_CLIP:
            start, duration = entry.start_in_whole, CLIP_SECONDS
        return {"start": start, "duration": min(duration or np.inf, self.processor.window_seconds)}

    def _choose(self, pictures: list[str]) -> list[str]:
        """Of the pictures of a clip those that are kept; a folder of them is taken to have the rate that is kept."""
        video = self.processor.video_processor
        if video.fps is not None:
            return pictures[: round(self.processor.window_seconds * video.fps)]
        return [pictures[index] for index in video.sample_frames(VideoMetadata(total_num_frames=len(pictures)))]

    def _to_jpeg(self, frame: np.ndarray) -> bytes:
        file = io.BytesIO()
        # Colours at full resolution cost a fifth more bytes and halve the error of a picture as small as this.
        Image.fromarray(frame).save(file, "JPEG", quality=self.jpeg_quality, subsampling=0)
        return file.getvalue()


def _unusable(problem: str) -> Features:
    return Features(np.empty(0, np.float16), (), problem, usable=False)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what the reading of a file warns of, instead of printing it across the progress bar."""
    messages: list[str] = []
    collector = logging.Handler(logging.WARNING)
    collector.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    handlers, level = logger.handlers, logger.level
    # The verbosity that the user has chosen is for what is printed.
    logger.handlers = [collector]
    logger.setLevel(logging.WARNING)
    try:
        yield messages
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


def _pictures(source: str) -> list[str]:
    """The files of a folder, a single picture or a shell pattern, in the order of the numbers in their names."""
    if os.path.isdir(source):
        source = os.path.join(glob.escape(source), "*")
    found = [source] if os.path.exists(source) else glob.glob(source)
    pictures = [path for path in found if path.lower().endswith(EXTENSIONS["frames"])]
    if not pictures:
        raise FileNotFoundError(f"{source}: there is no picture; {', '.join(EXTENSIONS['frames'])} are read")
    return sorted(
        pictures, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
    )


def _shown(made: tuple[Entry, Features | Lost], bar: tqdm) -> tuple[Entry, Features]:
    """Counts a clip in the progress bar."""
    entry, features = made
    if isinstance(features, Lost):
        features = _unusable(features.reason)
    bar.unusable = getattr(bar, "unusable", 0) + (not features.usable)
    bar.set_postfix(unusable=bar.unusable, refresh=False)
    bar.update()
    return entry, features


def _write_shard(path: Path, split: str, results: Iterable[tuple[Entry, Features]]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    account: dict[str, Any] = {"clips": 0, "without_picture": 0, "damaged": 0, "report": []}
    rows: list[tuple[Entry, Features]] = []
    try:
        with pq.ParquetWriter(
            partial, SCHEMA, compression="zstd", use_dictionary=False, write_statistics=False
        ) as writer:
            for entry, features in results:
                if features.usable:
                    account["clips"] += 1
                    account["without_picture"] += not features.frames
                    account["damaged"] += features.problem is not None
                    rows.append((entry, features))
                if features.problem is not None:
                    account["report"].append(
                        {
                            "split": split,
                            "id": entry.id,
                            "path": entry.path,
                            "reason": features.problem,
                            "usable": features.usable,
                        }
                    )
                if len(rows) == ROWS_AT_ONCE:
                    writer.write_table(_table(rows))
                    rows.clear()
            if rows:
                writer.write_table(_table(rows))
            writer.add_key_value_metadata({_ACCOUNT: json.dumps(account).encode()})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _table(rows: list[tuple[Entry, Features]]) -> pa.Table:
    values = [features.input_features for _, features in rows]
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    columns = {
        "id": [entry.id for entry, _ in rows],
        "input_features": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values))),
        "frames": [features.frames for _, features in rows],
        "captions": [entry.captions for entry, _ in rows],
        "extra": [json.dumps(entry.extra, ensure_ascii=False) for entry, _ in rows],
    }
    return pa.table(columns, schema=SCHEMA)


def _account(shard: Path) -> dict[str, Any]:
    return json.loads(pq.read_metadata(shard).metadata[_ACCOUNT])


def _report(output: Path) -> None:
    """Writes what is wrong with the clips of all shards that are there."""
    shards = sorted((output / "data").glob("*.parquet"))
    lines = [
        # With escapes, as a path on disk need not be valid UTF-8.
        json.dumps(problem) + "\n"
        for shard in shards
        for problem in _account(shard)["report"]
    ]
    write_text(output / REPORT_FILE, "".join(lines))


def _count(output: Path, split: str, shards: list[Path]) -> dict[str, int]:
    """Adds the numbers of clips to what is written down of the split, which is complete by that."""
    accounts = [_account(shard) for shard in shards]
    counts = {name: sum(account[name] for account in accounts) for name in ("clips", "without_picture", "damaged")}
    if not counts["clips"]:
        for shard in shards:  # Else the same call with the right media folder would not look again.
            shard.unlink()
        raise RuntimeError(
            f"{output}: no clip of the split {split!r} can be used, as {REPORT_FILE} there tells; the first: "
            f"{accounts[0]['report'][0]['reason']}"
        )
    preparation = read_preparation(output)
    preparation["splits"][split] |= counts
    write_text(output / PREPARATION_FILE, json.dumps(preparation, indent=2) + "\n")
    return {"rows": preparation["splits"][split]["rows"], **counts}
