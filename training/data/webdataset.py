"""Shards in the format of WebDataset."""

import json
import os
from collections.abc import Iterable
from typing import Any

from transformers.utils import logging

from .manifest import Entry
from .tar_members import TarMember, media_of, read_samples


logger = logging.get_logger(f"transformers.{__name__}")

CAPTION_FIELDS = ("captions", "caption", "text")


def read_webdataset(shards: Iterable[str | os.PathLike]) -> list[Entry]:
    """Reads `.tar` shards in which the files of a clip have the same name: `KEY.mp4` with `KEY.json` or `KEY.txt`.

    The clip is the first file with a suffix of `EXTENSIONS`, videos before sounds. Captions are `captions` (a list),
    `caption` or `text` of the JSON file, whose other fields are kept in `extra`, or the lines of the text file. Clips are
    read where they are; nothing is unpacked. Samples without a clip or without a caption are left out, with a warning.

    Args:
        shards (`Iterable`): The shards, uncompressed.

    Returns:
        `list[Entry]`: The clips in the order of the shards; the key is the id.

    Raises:
        ValueError: If a shard cannot be read, if two clips have the same key, or if there is no clip at all.
        FileNotFoundError: If a shard does not exist.
    """
    entries: dict[str, Entry] = {}
    left_out = []
    for shard in shards:
        for key, files in read_samples(shard):
            media = media_of(files)
            captions, extra = _captions(files)
            if media is None or not captions:
                left_out.append(f"{shard}/{key}")
                continue
            if key in entries:
                raise ValueError(
                    f"{media}: the key {key!r} was given to another clip before, {entries[key].media}. Keys must be unique "
                    "in all shards."
                )
            entries[key] = Entry(key, tuple(captions), media=media, extra=extra)
    if not entries:
        raise ValueError(
            f"{', '.join(map(str, shards))}: no sample has both a clip (such as .mp4 or .wav) and a caption (.json or .txt)"
        )
    if left_out:
        logger.warning(
            f"{len(left_out)} samples have no clip or no caption, and are left out; the first: {left_out[0]}"
        )
    return list(entries.values())


def _captions(files: dict[str, TarMember]) -> tuple[list[str], dict[str, Any]]:
    """The captions of a sample, and the other fields of its JSON file."""
    extra: dict[str, Any] = {}
    captions: Any = None
    if ".json" in files:
        try:
            extra = json.loads(files[".json"].read())
            if not isinstance(extra, dict):
                raise ValueError("it is not an object with fields")
        except ValueError as error:
            raise ValueError(f"{files['.json']}: is not JSON as expected ({error})") from error
        captions = next((extra.pop(name) for name in CAPTION_FIELDS if extra.get(name)), None)
    if captions is None and ".txt" in files:
        captions = files[".txt"].read().decode("utf-8", "replace").splitlines()
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list):
        return [], extra
    return [caption.strip() for caption in captions if isinstance(caption, str) and caption.strip()], extra
