"""VGGSound: its CSV file and its downloaded clips."""

import csv
import os
from pathlib import Path

from .manifest import Entry, to_seconds
from .youtube_clips import find_clips


def read_vggsound(csv_file: str | os.PathLike, media: str | os.PathLike, split: str = "train") -> list[Entry]:
    """Reads one split of VGGSound's CSV file and finds the files of its clips.

    The file has no header; its columns are YouTube id, start in seconds, label and split. Labels are no sentences: they
    serve as captions for pretraining. Files are found by [`find_clips`].

    Args:
        csv_file (`str` or `os.PathLike`): `vggsound.csv`.
        media (`str` or `os.PathLike`): The folder of the clips.
        split (`str`): `"train"` or `"test"`.

    Returns:
        `list[Entry]`: The clips in the order of the file, with ids `ID_START`; clips that were not found have no files.

    Raises:
        ValueError: If a row has other columns, or if the split has no row.
        FileNotFoundError: If the file or the folder does not exist.
        OSError: If a folder below it cannot be read.
    """
    csv_file = Path(csv_file)
    rows, splits = [], set()
    with csv_file.open(encoding="utf-8-sig", newline="") as file:
        for line, row in enumerate(csv.reader(file), 1):
            try:
                name, start, label, of = (value.strip() for value in row)
                start = to_seconds("start", start)
            except ValueError as error:
                raise ValueError(
                    f"{csv_file}, line {line}: expected VGGSound's columns YouTube id, start, label and split without a "
                    f"header, got {row} ({error})"
                ) from error
            splits.add(of)
            if of == split:
                rows.append((name, start, label))
    if not rows:
        raise ValueError(
            f"{csv_file}: has no row of the split {split!r}; there are {', '.join(sorted(splits)) or 'none'}"
        )
    clips = find_clips(media, {name for name, _, _ in rows})
    return [
        Entry(
            f"{name}_{start:g}",
            (label,),
            **clips.sources(name, start),
            extra={"youtube_id": name, "start_time": start, "label": label},
        )
        for name, start, label in dict.fromkeys(rows)
    ]
