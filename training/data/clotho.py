"""Clotho: its CSV files and its sound files."""

import os
from pathlib import Path

from .manifest import Entry, read_csv
from .youtube_clips import EXTENSIONS


CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))


def read_clotho(csv_file: str | os.PathLike, media: str | os.PathLike) -> list[Entry]:
    """Reads a CSV file of Clotho (`file_name, caption_1, …, caption_5`) and finds its sound files.

    The folder is searched with all its subfolders for the names in the file, also with another suffix of sound files.

    Args:
        csv_file (`str` or `os.PathLike`): The CSV file, such as `clotho_captions_development.csv`.
        media (`str` or `os.PathLike`): The folder of the sound files.

    Returns:
        `list[Entry]`: The clips in the order of the CSV file, with the name of the file without its suffix as id; clips
        that were not found have no file.

    Raises:
        ValueError: If the CSV file lacks a column, a name or all captions of a clip.
        FileNotFoundError: If the file or the folder does not exist.
    """
    csv_file = Path(csv_file)
    if not os.path.isdir(media):
        raise FileNotFoundError(f"{media}: there is no such folder; give the one that holds the sound files")
    names, stems = {}, {}
    for path in sorted(Path(media).rglob("*")):
        if path.suffix.lower() in EXTENSIONS["audio"]:
            names.setdefault(path.name, path)
            stems.setdefault(path.stem, path)
    entries = []
    for line, row in read_csv(csv_file):
        missing = [column for column in ("file_name", *CAPTIONS) if column not in row]
        if missing:
            raise ValueError(f"{csv_file}: has no column {', '.join(missing)}, which Clotho's caption files have")
        name, captions = row["file_name"], [row[column] for column in CAPTIONS if row[column].strip()]
        if not name.strip() or not captions:
            raise ValueError(f"{csv_file}, line {line}: has no {'caption' if name.strip() else '`file_name`'}")
        stem = Path(name).stem
        path = names.get(name) or stems.get(stem)
        entries.append(
            Entry(stem, tuple(captions), media=None if path is None else str(path), extra={"file_name": name})
        )
    if not entries:
        raise ValueError(f"{csv_file}: has no rows")
    return entries
