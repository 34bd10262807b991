"""A folder of clips with their captions, as `datasets` reads folders of sounds and videos."""

import os
from collections import Counter
from pathlib import Path

from .manifest import Entry, read_rows
from .youtube_clips import EXTENSIONS


METADATA = ("metadata.csv", "metadata.jsonl")
CAPTION_FIELDS = ("captions", "caption", "text")


def read_folder(folder: str | os.PathLike, captions: bool = True) -> list[Entry]:
    """Reads a folder with `metadata.csv` or `metadata.jsonl`, or with a text file beside each clip.

    The metadata is that of `AudioFolder` and `VideoFolder` of `datasets`: a row for each clip with `file_name`, and with
    `caption`, `text` or `captions` (a list). Rows of the same file are one clip. Without metadata, clips are searched
    recursively, and `NAME.txt` beside `NAME.mp4` has a caption on each line.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        captions (`bool`, *optional*, defaults to `True`): Whether clips must have captions. Otherwise they get none.

    Returns:
        `list[Entry]`: The clips, with the path below the folder as id.

    Raises:
        ValueError: If a row has no name or caption, a clip has no text file, or there is no clip.
        FileNotFoundError: If the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    found = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    listed, extras = _from_texts(folder, captions) if found is None else _from_metadata(found, captions)
    if not listed:
        raise ValueError(f"{found or folder}: has no clips, such as .mp4 or .wav")
    stems = Counter(os.path.splitext(name)[0] for name in listed)
    return [
        Entry(
            name if stems[os.path.splitext(name)[0]] > 1 else os.path.splitext(name)[0],
            tuple(texts),
            media=str(folder / name),
            extra=extras.get(name, {}),
        )
        for name, texts in listed.items()
    ]


def _from_metadata(path: Path, with_captions: bool) -> tuple[dict[str, list[str]], dict[str, dict]]:
    captions: dict[str, list[str]] = {}
    extras: dict[str, dict] = {}
    for line, row in read_rows(path):
        name = row.pop("file_name", None)
        texts = next((row.pop(field) for field in CAPTION_FIELDS if row.get(field)), None)
        texts = [texts] if isinstance(texts, str) else texts
        texts = texts if with_captions else []
        is_right = (
            not with_captions
            or isinstance(texts, list)
            and texts
            and all(isinstance(text, str) and text.strip() for text in texts)
        )
        if not isinstance(name, str) or not name or not is_right:
            needed = ", and `caption`, `text` or `captions` (a list)" if with_captions else ""
            raise ValueError(f"{path}, line {line}: needs `file_name`{needed}")
        captions.setdefault(name, []).extend(texts)
        extras.setdefault(name, row)
    return captions, extras


def _from_texts(folder: Path, with_captions: bool) -> tuple[dict[str, list[str]], dict[str, dict]]:
    captions = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        if path.suffix.lower() not in (*EXTENSIONS["video"], *EXTENSIONS["audio"]):
            continue
        if any(part.startswith(".") for part in below.parts):
            continue
        text = path.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8").splitlines() if with_captions and text.is_file() else []
        captions[below.as_posix()] = [line.strip() for line in lines if line.strip()]
        if with_captions and not captions[below.as_posix()]:
            raise ValueError(f"{path}: has no caption. Write one into {text.name}, or all into {METADATA[0]}")
    return captions, {}
