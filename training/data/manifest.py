"""Manifests: lists of clips with the files of their sound and picture, and their captions."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .tar_members import TarMember


SOURCES = ("media", "audio", "video", "frames")


@dataclass(frozen=True)
class Entry:
    """A clip of a manifest.

    Args:
        id (`str`): Its name, unique in the manifest.
        captions (`tuple[str, ...]`): Its captions.
        media (`str` or `TarMember`, *optional*): File with sound and picture.
        audio (`str`, *optional*): File with the sound, instead of `media`.
        video (`str`, *optional*): File with the picture, with `audio`.
        frames (`str`, *optional*): Pictures, in the order of the numbers in their names, with `audio`: a folder of
            pictures, one picture, or a shell pattern such as `frames/frame_*/ID.jpg`.
        video_features (`str`, *optional*): Instead of the picture, what a video tower has made of it, with `audio` or
            `media`: a `.npy` file of shape (frames, width), as LAVCap stores CLIP's vectors.
        start (`float`): Start of the clip in its files, in seconds; 0 by default.
        duration (`float`, *optional*): Duration of the clip in seconds; by default one window of the model.
        start_in_whole (`float`, *optional*): Start of the clip in seconds, used only if the file is much longer than a
            clip.
        extra (`dict`): All other fields.

    Raises:
        ValueError: If `id`, `captions` or `extra` cannot be encoded as UTF-8.
    """

    id: str
    captions: tuple[str, ...]
    media: "str | TarMember | None" = None
    audio: str | None = None
    video: str | None = None
    frames: str | None = None
    video_features: str | None = None
    start: float = 0.0
    duration: float | None = None
    start_in_whole: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("id", "captions", "extra"):
            try:
                json.dumps(getattr(self, name), ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"`{name}` of the clip {self.id!r} holds {error.object[error.start]!r}, half a character that no "
                    "text can hold; write the whole character"
                ) from error

    @property
    def path(self) -> str | None:
        """The file to name in messages about the clip."""
        source = self.media or self.audio or self.video or self.frames
        return None if source is None else str(source)


def read_manifest(path: str | os.PathLike, captions: bool = True) -> list[Entry]:
    """Reads a manifest: a `.jsonl` file with one object per line, or a `.csv` file with a header.

    Its fields: `id`; `media`, or `audio` with `video` or `frames`, or either with `video_features` (relative to the
    manifest's folder); `captions` (a list) or `caption`; optionally `start` and `duration` in seconds. See [`Entry`]. All other fields are kept in
    `extra`. Rows with the same `id` and the same files are one clip with several captions.

    Args:
        path (`str` or `os.PathLike`): The manifest.
        captions (`bool`, *optional*, defaults to `True`): Whether clips must have captions. Otherwise they get none.

    Raises:
        ValueError: If a row lacks a field or has a wrong one, with file and line, or if the manifest is empty.
        FileNotFoundError: If the file does not exist.
    """
    path = Path(path)
    clips: dict[str, Entry] = {}
    for line, row in read_rows(path):
        if path.suffix.lower() == ".csv":
            row = {name: value for name, value in row.items() if value != ""}
        entry = _entry(path, line, row, captions)
        first = clips.setdefault(entry.id, entry)
        if first is not entry:
            if any(
                getattr(first, name) != getattr(entry, name)
                for name in (*SOURCES, "video_features", "start", "duration")
            ):
                raise ValueError(f"{path}, line {line}: `id` {entry.id!r} was given to another clip before")
            clips[entry.id] = replace(first, captions=first.captions + entry.captions)
    if not clips:
        raise ValueError(f"{path}: has no rows")
    return list(clips.values())


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered rows of a file of JSON lines or of a CSV file with a header, where `captions` may be a JSON list.

    Raises:
        ValueError: If its name ends neither in `.jsonl` nor in `.csv`, or with file and line for what is neither.
        FileNotFoundError: If there is no such file.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: its name must end in .jsonl or .csv, which says how to read it")
    return readers[path.suffix.lower()](path)


def read_csv(path: Path, allow_missing: bool = False) -> Iterator[tuple[int, dict[str, str | None]]]:
    """The numbered rows of a CSV file with a header; with `allow_missing`, fields that a row lacks are `None`."""
    # Strict, because an unclosed quote would otherwise swallow all following rows.
    reader = csv.DictReader(_lines(path), strict=True)
    try:
        for row in reader:
            if None in row or (None in row.values() and not allow_missing):
                raise ValueError(
                    f"{path}, line {reader.line_num}: has more or fewer fields than the header; put quotes around "
                    "captions that hold a comma"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num + 1}: is not CSV ({error}); a field that begins with a quote must end with "
            "one, and quotes within it are doubled"
        ) from error


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not in UTF-8 ({error}); save it in that encoding") from error


def to_seconds(name: str, value: Any) -> float:
    """The number that a field holds, if it is a time in a file.

    Raises:
        ValueError: If it is not one; the message has the name of the field.
    """
    try:
        seconds = float(value)
    except (ValueError, TypeError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"`{name}` is {value!r}, expected seconds, 0 or more")
    return seconds


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in read_csv(path):
        if row.get("captions", "").startswith("["):
            row["captions"] = _parse(path, line, row["captions"])
        yield line, row


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        row = _parse(path, number, line)
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: is a {type(row).__name__}, expected an object with fields")
        yield number, row


def _parse(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line}: is not JSON ({error})") from error


def _entry(path: Path, line: int, row: dict[str, Any], with_captions: bool) -> Entry:
    extra = dict(row)
    name = extra.pop("id", None)
    name = "" if name is None else str(name)
    caption, captions = extra.pop("caption", None), extra.pop("captions", None)
    captions = caption if captions is None else captions
    captions = [captions] if isinstance(captions, str) else captions
    captions = captions if with_captions else ()
    sources = {source: extra.pop(source, None) for source in (*SOURCES, "video_features")}
    window = {key: extra.pop(key) for key in ("start", "duration") if extra.get(key) is not None}
    given = [source for source, value in sources.items() if value is not None]
    pictures = {"video", "frames", "video_features"} & set(given)
    try:
        if not name:
            raise ValueError("`id` is missing")
        if with_captions and (
            not captions
            or not isinstance(captions, list)
            or not all(isinstance(c, str) and c.strip() for c in captions)
        ):
            raise ValueError(f"`captions` must be a list of one or more sentences, or `caption` one, got {captions!r}")
        if not given or len(pictures) > 1 or ("media" in given and not {"media", "video_features"} >= set(given)):
            raise ValueError(
                "give `media`, or `audio` with one of `video` and `frames`, or either of them with `video_features`, got "
                f"{', '.join(given) or 'none'}"
            )
        for source in given:
            if not isinstance(sources[source], str) or not sources[source]:
                raise ValueError(f"`{source}` must be a path, got {sources[source]!r}")
            sources[source] = os.path.join(path.parent, sources[source])
        window = {key: to_seconds(key, value) for key, value in window.items()}
        if window.get("duration") == 0:
            raise ValueError("`duration` is 0, expected seconds above 0")
        return Entry(name, tuple(captions), **sources, **window, extra=extra)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
