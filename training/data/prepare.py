"""Preparation: features of media files, made once for all trainings, in Parquet shards for `datasets`.

The manifest alone decides which clip goes into which shard, and every existing shard is complete. So an interrupted
preparation continues with the first missing shard, and the result is identical to the byte.

If a clip fails for a reason that may pass, such as a disk that is away for a moment, its shard stays open under a hidden
name, and the next call makes only the clips that failed.
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm
from transformers.video_utils import VideoMetadata

from ...processing.media_evacap import MEMORY_A_PROCESS, probe_media
from ...processing.processing_evacap import EVACapProcessor
from ..cores import usable_cores
from ..files import JsonLines, check_settings, locked, remove_leftovers, whole_file, write_json
from .manifest import Entry
from .worker_pool import Lost, WorkerPool
from .youtube_clips import CLIP_SECONDS, EXTENSIONS


VERSION = 1
PREPARATION_FILE, REPORT_FILE = "preparation.json", "report.jsonl"
SHARD_SIZE = 256
JPEG_QUALITY = 95
ROWS_AT_ONCE = 16
"""Number of clips of a row group, which is in memory while it is written, and which a stream reads at a time."""
TIME_LIMIT = 600.0
"""Seconds that a clip may take."""
LONGEST_CLIP = 15.0
"""Seconds; a longer file without a start time in its name is the whole video that the clip comes from."""
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "input_features": pa.list_(pa.float16()),
        "frames": pa.list_(pa.binary()),
        "captions": pa.list_(pa.string()),
        "extra": pa.string(),
    }
)
FEATURES = pa.field("video_features", pa.list_(pa.float32()))
"""One more column, where clips have vectors instead of pictures."""
# The key in the footer of each shard for what is known of its clips, so that both appear together.
_ACCOUNT = b"evacap"

# The fields that stored features depend on. Pixels are normalised, and frames are chosen, on reading.
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
    time_limit: float = TIME_LIMIT,
    memory_limit: int = MEMORY_A_PROCESS,
    accept_failures: bool = False,
) -> dict[str, int]:
    """Makes the features of all clips and writes them to `output/data/SPLIT-….parquet`.

    The folder is for `datasets.load_dataset(output)` and [`PreparedClips`]. A row has

    * `id`, `captions`, and `extra`, the JSON of all other fields of the manifest;
    * `input_features`, float16, frame after frame of mel bins. The rounding changes a value by 0.001 at most, because
      normalised log-mel values are within ±4;
    * `frames`, JPEG files of the pictures, resized and cropped but not normalised; none for a clip without a picture;
    * `video_features`, float32, where clips of the manifest have such: vector after vector. No pictures are read then.

    `preparation.json` has the settings that the features depend on, and the number of clips. `report.jsonl` lists the clips
    that cannot be used, and those that were only partly readable (`"usable": true`), with the reason and whether it may
    pass (`"passing": true`). In an existing folder only missing clips are made, including clips whose file has appeared
    since. To make a shard again, remove it.

    If the file of a clip is missing or unreadable, or if its worker is killed, it is tried once more by a new process. If
    it fails again, its split is not complete, and the same call tries it again.

    Args:
        entries (`list[Entry]`): The clips, from [`read_manifest`] or [`read_audiocaps`].
        output (`str` or `os.PathLike`): Folder. Each further split is added by another call.
        processor ([`EVACapProcessor`]): The processor of the models to train; its tokenizer is not used.
        split (`str`): Name of the split.
        num_frames (`int`, *optional*): Stores so many frames, uniformly over the clip.
        fps (`float`, *optional*): Stores all frames of the clip at this rate, for random runs of frames. Without both, the
            frames that the video processor samples are stored: at its `fps`, or its `num_frames`.
        jpeg_quality (`int`): Quality of the frames, 1 to 100.
        shard_size (`int`): Rows of the manifest for each shard.
        num_workers (`int`, *optional*): Number of processes, one for each core by default. It does not change the result.
        time_limit (`float`): Seconds that a clip may take; a clip that takes longer twice cannot be used.
        memory_limit (`int`): Bytes that a process may take while it reads; a clip that takes more cannot be used. Only on
            Linux.
        accept_failures (`bool`): Whether to complete the split without the clips whose failure may pass.

    Returns:
        `dict`: `rows` of the manifest, `clips` that can be used, and how many of these are `without_picture` and
        `damaged`.

    Raises:
        ValueError: If an argument is wrong, or if the folder was started with other settings or another manifest.
        BlockingIOError: If another process prepares clips in this folder.
        RuntimeError: If the worker processes cannot start, clips failed for reasons that may pass, or no clip at all
            could be used.
    """
    output = Path(output)
    if not re.fullmatch(r"\w+(\.\w+)*", split) or split == "all":
        raise ValueError(
            f"`split` is {split!r}; a name of a split has letters, digits, _ and dots between them, and is not 'all'"
        )
    numbers = {"shard_size": shard_size, "num_workers": num_workers, "num_frames": num_frames, "fps": fps}
    numbers |= {"time_limit": time_limit, "memory_limit": memory_limit}
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
    output.mkdir(parents=True, exist_ok=True)
    settings = {**describe(processor), "frames": frames}
    width = _feature_width(entries)
    if width is not None:
        settings["video_width"] = width
    with locked(output):
        _begin(output, settings, split, entries, shard_size)
        left = {path: _rows_left(path, entries, rows) for path, rows in shards.items()}
        left = {path: rows for path, rows in left.items() if rows}
        try:
            if left:
                _forget_counts(output, split)
                todo = [row for rows in left.values() for row in rows]
                workers = min(num_workers or usable_cores(), len(todo))
                make = FeatureMaker(_storing(processor, num_frames, fps), jpeg_quality, width)
                bar = tqdm(total=len(entries), initial=len(entries) - len(todo), desc=split, unit="clip")
                pool = WorkerPool(make, workers, time_limit, __name__, memory_limit, _is_passing)
                with bar, closing(pool):
                    made = pool.map(entries[row] for row in todo)
                    for path, rows in left.items():
                        kept = _read_kept(path)
                        results = (
                            _shown(next(made), bar) if row in rows else (entries[row], kept[entries[row].id])
                            for row in shards[path]
                        )
                        _write_shard(path, split, results, accept_failures, width is not None)
        finally:
            _report(output)
        return _count(output, split, list(shards))


def _feature_width(entries: list[Entry]) -> int | None:
    """The width of the vectors that clips have instead of pictures, from the first that can be read; `None` without any.

    Raises:
        ValueError: If there are such files, but none can be read.
    """
    paths = [entry.video_features for entry in entries if entry.video_features is not None]
    for path in paths:
        try:
            return _read_features(path).shape[1]
        except (OSError, ValueError) as error:
            reason = error
    if paths:
        raise ValueError(f"no file of `video_features` can be read; the last: {reason}")
    return None


def _read_features(path: str, width: int | None = None) -> np.ndarray:
    """The vectors (frames, width) of a `.npy` file in float32.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it holds something else.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: it is not a .npy file of numbers ({error})") from error
    is_fit = isinstance(values, np.ndarray) and values.ndim == 2 and len(values) and width in (None, values.shape[1])
    if not is_fit or not np.issubdtype(values.dtype, np.floating) or not np.isfinite(values).all():
        found = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(
            f"{path}: it holds {found}, but finite floats of shape (frames, {width or 'width'}) are expected"
        )
    return values.astype(np.float32)


def describe(processor: EVACapProcessor) -> dict[str, Any]:
    """The fields that stored features depend on, in which a processor that reads them must be equal."""
    audio, video = processor.feature_extractor.to_dict(), processor.video_processor.to_dict()
    fields = {
        "version": VERSION,
        "modalities": processor.modalities,
        "feature_extractor": {name: audio[name] for name in AUDIO_FIELDS},
        "video_processor": {name: video[name] for name in VIDEO_FIELDS},
    }
    return json.loads(json.dumps(fields))


def read_preparation(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of `preparation.json` in a prepared folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(folder) / PREPARATION_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file; make the folder with `evacap prepare`")
    return json.loads(path.read_text(encoding="utf-8"))


def _begin(output: Path, settings: dict[str, Any], split: str, entries: list[Entry], shard_size: int) -> None:
    """Records the settings of a new preparation, or compares them with those of an existing one."""
    # The location of the files may change, because nothing that is stored depends on it.
    stored = json.dumps([[entry.id, entry.captions, entry.start, entry.duration, entry.extra] for entry in entries])
    # Otherwise a clip without a picture could not be told from one whose vectors have come since.
    vectors = [entry.id for entry in entries if entry.video_features is not None]
    stored += json.dumps(vectors) if vectors else ""
    manifest = hashlib.sha256(stored.encode()).hexdigest()
    begun = {"rows": len(entries), "shard_size": shard_size, "manifest": manifest}
    preparation = {**settings, "splits": {}}
    if (output / PREPARATION_FILE).exists():
        preparation = read_preparation(output)
    preparation["splits"].setdefault(split, begun)
    check_settings(output, preparation, settings | {"splits": {split: begun}}, "Give a new folder.")
    (output / "data").mkdir(exist_ok=True)
    remove_leftovers(output, output / "data")
    write_json(output / PREPARATION_FILE, preparation)


def _forget_counts(output: Path, split: str) -> None:
    """Removes the record of a complete split."""
    preparation = read_preparation(output)
    begun = {name: preparation["splits"][split][name] for name in ("rows", "shard_size", "manifest")}
    if preparation["splits"][split] != begun:
        preparation["splits"][split] = begun
        write_json(output / PREPARATION_FILE, preparation)


def _open_name(shard: Path) -> Path:
    """The hidden path of a shard that waits for clips whose failure may pass."""
    return shard.with_name(f".{shard.name}.open")


def _rows_left(shard: Path, entries: list[Entry], rows: range) -> list[int]:
    """The missing rows of a shard."""
    source = shard if shard.exists() else _open_name(shard)
    if not source.exists():
        return list(rows)
    problems = {problem["id"]: problem for problem in _account(source)["report"]}
    left = []
    for row in rows:
        problem = problems.get(entries[row].id)
        if problem is None:
            continue
        has_come = problem["file"] is None and not problem["usable"] and entries[row].path is not None
        if has_come or (problem.get("passing") and source != shard):
            left.append(row)
    return left


def _read_kept(shard: Path) -> dict[str, "Features"]:
    """The rows that an open shard already has, by the ids of the clips."""
    source = shard if shard.exists() else _open_name(shard)
    if not source.exists():
        return {}
    problems = {problem["id"]: problem for problem in _account(source)["report"]}
    kept = {name: _unusable(problem["reason"], problem.get("passing", False)) for name, problem in problems.items()}
    table = pq.read_table(source)
    vectors = table[FEATURES.name] if FEATURES.name in table.column_names else [None] * len(table)
    columns = (table["id"].to_pylist(), table["input_features"], table["frames"], vectors)
    for name, values, frames, features in zip(*columns, strict=True):
        problem = problems[name]["reason"] if name in problems else None
        features = np.empty(0, np.float32) if features is None else features.values.to_numpy()
        kept[name] = Features(values.values.to_numpy(), tuple(frames.as_py()), problem, video_features=features)
    return kept


def _storing(processor: EVACapProcessor, num_frames: int | None, fps: float | None) -> EVACapProcessor:
    """A copy of the processor that makes the stored frames, before they are normalised."""
    storing = copy.copy(processor)
    storing.tokenizer = None
    video = storing.video_processor = copy.deepcopy(processor.video_processor)
    video.num_frames, video.fps, video.frame_sampling, video.tubelet_size = num_frames or 1, fps, "uniform", 1
    video.do_rescale = video.do_normalize = False
    return storing


@dataclass(frozen=True)
class Features:
    """The stored features of a clip.

    Args:
        input_features (`np.ndarray` of shape `(frames * mel bins,)`): float16; empty for a model without an audio tower.
        frames (`tuple[bytes, ...]`): JPEG files; none if there is no picture.
        problem (`str`, *optional*): The problem of the clip.
        usable (`bool`): Whether the clip can be used.
        passing (`bool`): Whether the problem may pass.
        video_features (`np.ndarray` of shape `(frames * width,)`): float32; empty if there are none.
    """

    input_features: np.ndarray
    frames: tuple[bytes, ...]
    problem: str | None = None
    usable: bool = True
    passing: bool = False
    video_features: np.ndarray = field(default_factory=partial(np.empty, 0, np.float32))


class FeatureMaker:
    """Makes the stored features of a clip.

    Args:
        processor ([`EVACapProcessor`]): Makes pixels from 0 to 255.
        jpeg_quality (`int`): 1 to 100.
        video_width (`int`, *optional*): Width of the vectors that clips have instead of pictures.
    """

    def __init__(self, processor: EVACapProcessor, jpeg_quality: int, video_width: int | None = None):
        self.processor = processor
        self.jpeg_quality = jpeg_quality
        self.video_width = video_width

    def __call__(self, entry: Entry) -> Features:
        """Makes the features of a clip, and turns its errors into a `problem`.

        Raises:
            ImportError: If a backend of the processor is not installed, which is not a problem of the clip.
        """
        with _warnings() as messages:
            try:
                inputs = self._process(entry)
                vectors = np.empty(0, np.float32)
                if entry.video_features is not None:
                    vectors = _read_features(entry.video_features, self.video_width).ravel()
            except ImportError:
                raise
            except MemoryError:
                return _unusable("it takes more memory than its process may use; leave it out")
            except Exception as error:
                return _unusable(str(error) or type(error).__name__, _may_pass(error))
        features = inputs.get("input_features")
        features = np.empty(0) if features is None else features[0].numpy()
        frames = () if "pixel_values_videos" not in inputs else inputs["pixel_values_videos"][0].permute(0, 2, 3, 1)
        return Features(
            features.astype(np.float16).ravel(),
            tuple(self._to_jpeg(frame.numpy()) for frame in frames),
            "; ".join(messages) or None,
            video_features=vectors,
        )

    def _process(self, entry: Entry) -> dict[str, Any]:
        listens, looks = self.processor.modalities != "video", self.processor.modalities != "audio"
        if self.video_width is not None:
            looks = False
            entry = replace(entry, media=None, audio=entry.media or entry.audio)
        if entry.media is not None:
            return self.processor(media=entry.media, **self._window(entry.media, entry), return_tensors="pt")
        if entry.path is None:
            raise ValueError("no file in the media folder has its name")
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
        """Chooses the pictures of a clip to store; a folder of pictures counts as having the stored rate."""
        video = self.processor.video_processor
        if video.fps is not None:
            return pictures[: round(self.processor.window_seconds * video.fps)]
        return [pictures[index] for index in video.sample_frames(VideoMetadata(total_num_frames=len(pictures)))]

    def _to_jpeg(self, frame: np.ndarray) -> bytes:
        file = io.BytesIO()
        # Full colour resolution takes a fifth more bytes and halves the error of such small pictures.
        Image.fromarray(frame).save(file, "JPEG", quality=self.jpeg_quality, subsampling=0)
        return file.getvalue()


def _unusable(problem: str, passing: bool = False) -> Features:
    return Features(np.empty(0, np.float16), (), problem, usable=False, passing=passing)


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, comes from the system and not from the content of a file."""
    seen = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and not isinstance(error, av.FFmpegError):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _is_passing(features: Features) -> bool:
    return features.passing


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects the warnings of reading a file, which would otherwise break the progress bar."""
    messages: list[str] = []
    collector = logging.Handler(logging.WARNING)
    collector.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    handlers, level = logger.handlers, logger.level
    # The user's verbosity only concerns what is printed.
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
        features = _unusable(features.reason, features.passing)
    bar.unusable = getattr(bar, "unusable", 0) + (not features.usable)
    bar.set_postfix(unusable=bar.unusable, refresh=False)
    bar.update()
    return entry, features


def _write_shard(
    path: Path,
    split: str,
    results: Iterable[tuple[Entry, Features]],
    accept_failures: bool = False,
    with_vectors: bool = False,
) -> None:
    """Writes a shard. It gets its name when no clip of it may still come, or when those are given up."""
    account: dict[str, Any] = {"clips": 0, "without_picture": 0, "damaged": 0, "passing": 0, "report": []}
    rows: list[tuple[Entry, Features]] = []
    schema = SCHEMA.append(FEATURES) if with_vectors else SCHEMA
    with (
        whole_file(_open_name(path)) as unfinished,
        pq.ParquetWriter(
            unfinished, schema, compression="zstd", use_dictionary=False, write_statistics=False
        ) as writer,
    ):
        for entry, features in results:
            if features.usable:
                account["clips"] += 1
                account["without_picture"] += not features.frames and not len(features.video_features)
                account["damaged"] += features.problem is not None
                rows.append((entry, features))
            if features.problem is not None:
                account["passing"] += features.passing
                problem = {"split": split, "id": entry.id, "file": entry.path, "reason": features.problem}
                account["report"].append(problem | {"usable": features.usable, "passing": features.passing})
            if len(rows) == ROWS_AT_ONCE:
                writer.write_table(_table(rows, schema))
                rows.clear()
        if rows:
            writer.write_table(_table(rows, schema))
        writer.add_key_value_metadata({_ACCOUNT: json.dumps(account).encode()})
    if accept_failures or not account["passing"]:
        _open_name(path).replace(path)
    else:
        path.unlink(missing_ok=True)


def _table(rows: list[tuple[Entry, Features]], schema: pa.Schema) -> pa.Table:
    def as_lists(values: list[np.ndarray]) -> pa.ListArray:
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values)))

    columns = {
        "id": [entry.id for entry, _ in rows],
        "input_features": as_lists([features.input_features for _, features in rows]),
        "frames": [features.frames for _, features in rows],
        "captions": [entry.captions for entry, _ in rows],
        "extra": [json.dumps(entry.extra, ensure_ascii=False) for entry, _ in rows],
    }
    if FEATURES.name in schema.names:
        columns[FEATURES.name] = as_lists([features.video_features for _, features in rows])
    return pa.table(columns, schema=schema)


def _account(shard: Path) -> dict[str, Any]:
    account = json.loads(pq.read_metadata(shard).metadata[_ACCOUNT])
    for problem in account["report"]:
        # Shards of 0.1.0's first days call it `path`.
        problem.setdefault("file", problem.pop("path", None))
    return account


def _report(output: Path) -> None:
    """Writes the problems of the clips in all existing shards."""
    data = output / "data"
    shards = sorted([*data.glob("*.parquet"), *data.glob(".*.open")], key=lambda path: path.name.removeprefix("."))
    JsonLines(output / REPORT_FILE, "split").rewrite(
        problem for shard in shards for problem in _account(shard)["report"]
    )


def _count(output: Path, split: str, shards: list[Path]) -> dict[str, int]:
    """Records the numbers of clips of the split, which makes it complete."""
    open_shards = [_open_name(shard) for shard in shards if not shard.exists()]
    problems = [problem for shard in open_shards for problem in _account(shard)["report"] if problem.get("passing")]
    if problems:
        raise RuntimeError(
            f"{output}: {len(problems)} clip{'s' * (len(problems) > 1)} of the split {split!r} failed for reasons that may pass, as {REPORT_FILE} "
            f"there tells; the first: {problems[0]['reason']}. Give the same command again, or accept the failures "
            "(--accept-failures) to go on without these clips."
        )
    accounts = [_account(shard) for shard in shards]
    counts = {name: sum(account[name] for account in accounts) for name in ("clips", "without_picture", "damaged")}
    if not counts["clips"]:
        for shard in shards:  # Otherwise the same call with the right media folder would not search again.
            shard.unlink()
        raise RuntimeError(
            f"{output}: no clip of the split {split!r} can be used, as {REPORT_FILE} there tells; the first: "
            f"{accounts[0]['report'][0]['reason']}"
        )
    preparation = read_preparation(output)
    preparation["splits"][split] |= counts
    write_json(output / PREPARATION_FILE, preparation)
    return {"rows": preparation["splits"][split]["rows"], **counts}
