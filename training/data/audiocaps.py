"""AudioCaps: its CSV files and its downloaded clips."""

import os
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from .manifest import Entry, read_csv, to_seconds
from .youtube_clips import YouTubeClips, find_clips


logger = logging.get_logger(f"transformers.{__name__}")

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")


def read_audiocaps(csv_file: str | os.PathLike, media: str | os.PathLike) -> list[Entry]:
    """Reads an AudioCaps CSV file (`audiocap_id, youtube_id, start_time, caption`) and finds the files of its clips.

    Rows of the same clip, five in validation and test, become one clip with all their captions. Their files are
    found by [`find_clips`]. A caption that is broken over two lines without
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
    groups: dict[tuple[str, float], list[dict[str, str]]] = {}
    for line, row in _joined(csv_file):
        groups.setdefault(_clip(csv_file, line, row), []).append(row)
    if not groups:
        raise ValueError(f"{csv_file}: has no rows")
    numbers = {row["audiocap_id"] for rows in groups.values() for row in rows}
    clips = find_clips(media, {name for name, _ in groups}, numbers)
    return [_entry(name, start, rows, clips) for (name, start), rows in groups.items()]


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


def _entry(name: str, start: float, rows: list[dict[str, str]], clips: YouTubeClips) -> Entry:
    numbers = [row["audiocap_id"] for row in rows]
    return Entry(
        f"{name}_{start:g}",
        tuple(row["caption"] for row in rows),
        **clips.sources(name, start, numbers),
        extra={"youtube_id": name, "start_time": start, "audiocap_ids": numbers},
    )
