"""The media files that a command line names."""

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from .training.data.tar_members import TarMember, media_of, read_samples
from .training.terminal import printable


STANDARD_INPUT = "-"
# Suffixes that are searched for in folders; a file that is named itself may have any.
SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .flv .wmv .asf .3gp .ogv .mxf "
    ".wav .mp3 .flac .m4a .aac .ogg .oga .opus .aiff .aif .au .caf .wma .ac3 .eac3 .amr .wv .w64".split()
)
SHARD = ".tar"


class StandardInput(io.BytesIO):
    """The media file on standard input, which can be read only once; its name is `-`."""

    name = STANDARD_INPUT

    def __init__(self) -> None:
        from .processing.media_evacap import DOWNLOAD_BYTES

        super().__init__()
        if sys.stdin.isatty():
            raise ValueError("- is standard input, which is the terminal here: pipe a media file into it")
        while piece := sys.stdin.buffer.read(2**20):
            if self.tell() > DOWNLOAD_BYTES:
                raise ValueError(f"- holds more than {DOWNLOAD_BYTES:,} bytes; store it in a file first")
            self.write(piece)

    def __str__(self) -> str:
        return self.name


Media = str | Path | StandardInput | TarMember


def find_media(names: Iterable[str]) -> list[Media]:
    """Lists each file once, in the order of the names, with the media files in and below a folder in its place.

    In place of a `.tar` shard are its samples. Hidden files and folders are left out.

    Returns:
        A `Path` for everything that exists, so that a file with a name like a URL is not taken for one; a
        [`StandardInput`] for `-`; a [`TarMember`] for a sample; otherwise the name.

    Raises:
        ValueError: If a folder or a shard has no media file, or if a shard cannot be read.
    """
    files: list[Media] = []
    for name in dict.fromkeys(names):
        if name == STANDARD_INPUT:
            files.append(StandardInput())
            continue
        if not os.path.isdir(name):
            files += _samples(Path(name)) if os.path.lexists(name) else [name]
            continue
        found = [
            path
            for path in sorted(Path(name).rglob("*"))
            if path.suffix.lower() in (*SUFFIXES, SHARD)
            and not any(part.startswith(".") for part in path.relative_to(name).parts)
            and path.is_file()
        ]
        if not found:
            raise ValueError(f"{name}: no media files in this folder, such as .mp4 or .wav; name files to read others")
        files += [sample for path in found for sample in _samples(path)]
    return list({str(file): file for file in files}.values())


def _samples(path: Path) -> list[Media]:
    """The clips of a shard, one a sample; another file is itself."""
    if path.suffix.lower() != SHARD or not path.is_file():
        return [path]
    clips = [clip for clip in (media_of(files) for _, files in read_samples(path)) if clip is not None]
    if not clips:
        raise ValueError(f"{path}: no media files in this shard, such as .mp4 or .wav")
    return clips


def require_some(media: list[Media], command: str) -> None:
    """Says which files are missing, before a model is loaded for them.

    Raises:
        FileNotFoundError: If there is none of the files.
    """
    from .processing.media_evacap import is_url

    missing = [
        file
        for file in media
        if not isinstance(file, (StandardInput, TarMember)) and not is_url(file) and not os.path.exists(file)
    ]
    if len(missing) == len(media):
        raise FileNotFoundError(
            f"{missing[0]}: there is no such file; check the path"
            if len(missing) == 1
            else f"there is none of the {len(missing)} files, such as {missing[0]}; check the paths"
        )
    for file in missing:
        print(f"{command}: {printable(file)}: there is no such file; the others are read", file=sys.stderr)
