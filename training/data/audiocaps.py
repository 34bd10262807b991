"""AudioCaps: its CSV files and its downloaded clips."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from .manifest import Entry, read_csv, to_seconds


logger = logging.get_logger(f"transformers.{__name__}")

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
CLIP_SECONDS = 10.0
YOUTUBE_ID_LENGTH = 11
# In the order of preference.
EXTENSIONS = {
    "video": (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".3gp"),
    "audio": (".wav", ".flac", ".m4a", ".aac", ".opus", ".ogg", ".mp3"),
    "frames": (".jpg", ".jpeg", ".png", ".webp", ".bmp"),
}
_KINDS = {extension: (kind, rank) for kind, names in EXTENSIONS.items() for rank, extension in enumerate(names)}
_TITLE = re.compile(
    rf".*(?:\[(?P<bracketed>.{{{YOUTUBE_ID_LENGTH}}})\]|-(?P<dashed>.{{{YOUTUBE_ID_LENGTH}}}))", re.DOTALL
)
_TIMES = re.compile(r"(?:_(\d+(?:\.\d+)?))?(?:_(\d+(?:\.\d+)?))?")

Key = tuple[str, float | None]
"""YouTube id and start of the clip: the number in the name of the file, in seconds or milliseconds, or `None`."""


def read_audiocaps(csv_file: str | os.PathLike, media: str | os.PathLike) -> list[Entry]:
    """Reads an AudioCaps CSV file (`audiocap_id, youtube_id, start_time, caption`) and finds the files of its clips.

    Rows of the same clip, five in validation and test, become one clip with all their captions. The folder is searched
    once, with all its subfolders. A file belongs to a clip if its name without the extension is

    * `ID_START_END` or `ID_START`, in seconds (`30`, `000030`, `30.000`) or milliseconds (`30000`), as in downloads of
      AudioSet;
    * `ID`, for a clip or for the whole video, which is read from the start time on if it is longer than a clip can be;
    * `TITLE [ID]` or `TITLE-ID`, for the whole video, as yt-dlp and youtube-dl name their files by default;
    * `ID`, `ID_START` or `ID_START_END` with a `Y` before it, as in the WAV files of AudioCaps;
    * the `audiocap_id`.

    Pictures are the frames of a clip if their folder, the single picture, or the pictures in folders `frame_0`,
    `frame_1`, … have such a name (CAV-MAE, AVCap).

    If several files match, a name with the start time is preferred to one without, and both to an `audiocap_id`; then the
    first extension in `EXTENSIONS`; then the path that sorts first. A video is preferred to frames, and a sound file to
    the sound track of a video. (ours)

    Links to folders are followed, each folder once under each name. A caption that is broken over two lines without
    quotes, as three are in version 2.0, is joined again, with a warning.

    Args:
        csv_file (`str` or `os.PathLike`): The CSV file, such as `train.csv`.
        media (`str` or `os.PathLike`): The folder of the clips.

    Returns:
        `list[Entry]`: The clips in the order of the CSV file, with ids `ID_START`; clips that were not found have no
        files.

    Raises:
        ValueError: If the CSV file lacks a column, a caption or an id, or if a start time is not a number.
        FileNotFoundError: If the file or the folder does not exist.
        OSError: If a folder below it cannot be read.
    """
    csv_file = Path(csv_file)
    if not os.path.isdir(media):
        raise FileNotFoundError(f"{media}: there is no such folder; give the one that holds AudioCaps' clips")
    groups: dict[tuple[str, float], list[dict[str, str]]] = {}
    for line, row in _joined(csv_file):
        groups.setdefault(_clip(csv_file, line, row), []).append(row)
    if not groups:
        raise ValueError(f"{csv_file}: has no rows")
    numbers = {row["audiocap_id"] for rows in groups.values() for row in rows}
    files = _index(media, {name for name, _ in groups}, numbers)
    return [_entry(name, start, rows, files) for (name, start), rows in groups.items()]


def _joined(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows, with captions that are broken over two lines joined again."""
    last, broken = None, []
    for line, row in read_csv(path, allow_missing=True):
        first, *rest = row.values()
        if last is not None and "caption" in last[1] and first.strip() and not any(rest):
            last[1]["caption"] = f"{last[1]['caption'].rstrip()} {first.strip()}"
            broken.append(line)
            continue
        if None in rest:
            raise ValueError(f"{path}, line {line}: has fewer fields than the header")
        if last is not None:
            yield last
        last = line, row
    if last is not None:
        yield last
    if broken:
        logger.warning(f"{path}: captions were broken in two, and joined, in line {', '.join(map(str, broken))}")


def _clip(path: Path, line: int, row: dict[str, str]) -> tuple[str, float]:
    missing = [column for column in COLUMNS if column not in row]
    if missing:
        raise ValueError(f"{path}: has no column {', '.join(missing)}; AudioCaps' files have {', '.join(COLUMNS)}")
    try:
        for column in ("youtube_id", "caption"):
            if not row[column].strip():
                raise ValueError(f"`{column}` is empty")
        return row["youtube_id"], to_seconds("start_time", row["start_time"])
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error


def _entry(name: str, start: float, rows: list[dict[str, str]], files: dict[str, dict[Key, str]]) -> Entry:
    numbers = [row["audiocap_id"] for row in rows]
    keys = [(name, start), (name, start * 1000), (name, None), *((number, None) for number in numbers)]
    found = {kind: next((key for key in keys if key in paths), None) for kind, paths in files.items()}
    sources = {kind: files[kind][key] for kind, key in found.items() if key}
    if "video" in sources:
        sources.pop("frames", None)
        if "audio" not in sources:
            sources = {"media": sources["video"]}
    return Entry(
        f"{name}_{start:g}",
        tuple(row["caption"] for row in rows),
        **sources,
        start_in_whole=start if (name, None) in found.values() else None,
        extra={"youtube_id": name, "start_time": start, "audiocap_ids": numbers},
    )


def _index(folder: str | os.PathLike, youtube_ids: set[str], numbers: set[str]) -> dict[str, dict[Key, str]]:
    """The files of the wanted clips by kind, for each name the preferred one."""
    best: dict[str, dict[Key, tuple[int, str]]] = {kind: {} for kind in EXTENSIONS}
    for parent, names in _walk(folder):
        above, own = os.path.split(parent)
        own_key = _key(own, youtube_ids, numbers)
        for name in names:
            stem, extension = os.path.splitext(name)
            kind, rank = _KINDS.get(extension.lower(), (None, 0))
            if kind is None:
                continue
            key, path = _key(stem, youtube_ids, numbers), os.path.join(parent, name)
            if kind == "frames" and re.fullmatch(r"frame_\d+", own):
                path = os.path.join(glob.escape(above), "frame_*", glob.escape(name))
            elif kind == "frames" and own_key:
                key, path, rank = own_key, parent, -1
            if key:
                best[kind][key] = min(best[kind].get(key, (rank, path)), (rank, path))
    return {kind: {key: path for key, (_, path) in found.items()} for kind, found in best.items()}


def _walk(folder: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    """A folder and all below it, each with the names in it; a link that leads back is followed once."""

    def stop(error: OSError):
        # What is left out in silence would be missing from what is prepared for good.
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        kept = []
        for name in sorted(folders):
            state = os.stat(os.path.join(parent, name))
            # By its name as well, which can be that of the clip whose pictures it holds.
            place = state.st_dev, state.st_ino, name
            if place not in seen:
                seen.add(place)
                kept.append(name)
        folders[:] = kept
        yield parent, names


def _key(name: str, youtube_ids: set[str], numbers: set[str]) -> Key | None:
    """The clip that the name of a file or folder stands for; `None` if it is not one of the wanted clips."""
    if name in numbers:
        return name, None
    title = _TITLE.fullmatch(name)
    if title and (title["bracketed"] or title["dashed"]) in youtube_ids:
        return title["bracketed"] or title["dashed"], None
    for begin in (0, 1) if name.startswith("Y") else (0,):
        end = begin + YOUTUBE_ID_LENGTH
        times = _TIMES.fullmatch(name, end) if name[begin:end] in youtube_ids else None
        if times:
            start, stop = (None if time is None else float(time) for time in times.groups())
            # A clip is shorter than 100 s, so a longer range is in milliseconds.
            return name[begin:end], start / 1000 if stop is not None and stop - start > 100 else start
    return None
