"""AudioCaps: its CSV files, and the clips in a folder of downloads."""

import glob
import os
import re
from pathlib import Path

from .manifest import Entry, read_csv, to_seconds


COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
CLIP_SECONDS = 10.0
YOUTUBE_ID_LENGTH = 11
# The order is that of preference.
EXTENSIONS = {
    "video": (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".flv", ".wmv", ".mpg", ".mpeg", ".ts", ".3gp"),
    "audio": (".wav", ".flac", ".m4a", ".aac", ".opus", ".ogg", ".mp3"),
    "frames": (".jpg", ".jpeg", ".png", ".webp", ".bmp"),
}
_KINDS = {extension: (kind, rank) for kind, names in EXTENSIONS.items() for rank, extension in enumerate(names)}
_TIMES = re.compile(r"(?:_(\d+(?:\.\d+)?))?(?:_(\d+(?:\.\d+)?))?")

Key = tuple[str, float | None]
"""YouTube id, and where the clip begins: the number that its name tells, in seconds or milliseconds, or `None`."""


def read_audiocaps(csv_file: str | os.PathLike, media: str | os.PathLike) -> list[Entry]:
    """The clips of one of AudioCaps' CSV files (`audiocap_id, youtube_id, start_time, caption`), with the files that
    belong to them. Rows of the same clip, five in validation and test, become one clip with all their captions.

    The folder is searched once, with all its subfolders. A file belongs to a clip if its name without the extension is

    * `ID_START_END` or `ID_START`, in seconds (`30`, `000030`, `30.000`) or milliseconds (`30000`), as AudioSet's
      downloads have it;
    * `ID`, a clip or the whole video: where it lasts longer than a clip can, it is read from the start time on;
    * one of these with a `Y` before it, as AudioCaps' WAV files have;
    * the `audiocap_id`.

    Pictures are a clip's frames if such a name is that of their folder, of the single picture, or of the pictures in
    folders `frame_0`, `frame_1`, … (CAV-MAE, AVCap).

    Of several files a name with the start time is preferred to one without, and that to an `audiocap_id`, then the
    extension that stands first in `EXTENSIONS`, then the path that sorts first. Of several kinds, a video is preferred
    to frames, and a sound file to the sound track of a video. (ours)

    Args:
        csv_file (`str` or `os.PathLike`): Such as `train.csv`.
        media (`str` or `os.PathLike`): The folder.

    Returns:
        `list[Entry]`: In the order of the CSV file, `ID_START` being their ids; without files where there are none.

    Raises:
        ValueError: If the CSV file lacks a column, a caption or an id, or holds what is no start time.
        FileNotFoundError: If there is no such file or folder.
    """
    csv_file = Path(csv_file)
    if not os.path.isdir(media):
        raise FileNotFoundError(f"{media}: there is no such folder; give the one that holds AudioCaps' clips")
    groups: dict[tuple[str, float], list[dict[str, str]]] = {}
    for line, row in read_csv(csv_file):
        groups.setdefault(_clip(csv_file, line, row), []).append(row)
    if not groups:
        raise ValueError(f"{csv_file}: has no rows")
    numbers = {row["audiocap_id"] for rows in groups.values() for row in rows}
    files = _index(media, {name for name, _ in groups}, numbers)
    return [_entry(name, start, rows, files) for (name, start), rows in groups.items()]


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
    """The files of the wanted clips by kind, the preferred one for each name."""
    best: dict[str, dict[Key, tuple[int, str]]] = {kind: {} for kind in EXTENSIONS}
    for parent, _, names in os.walk(folder, followlinks=True):
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


def _key(name: str, youtube_ids: set[str], numbers: set[str]) -> Key | None:
    """What the name of a file or folder says of its clip; `None` if it is none of the wanted ones."""
    if name in numbers:
        return name, None
    for begin in (0, 1) if name.startswith("Y") else (0,):
        end = begin + YOUTUBE_ID_LENGTH
        times = _TIMES.fullmatch(name, end) if name[begin:end] in youtube_ids else None
        if times:
            start, stop = (None if time is None else float(time) for time in times.groups())
            # No clip lasts a hundred seconds.
            return name[begin:end], start / 1000 if stop is not None and stop - start > 100 else start
    return None
