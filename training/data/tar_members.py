"""Files within `.tar` archives, read where they are: shards in the format of WebDataset."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from .youtube_clips import EXTENSIONS


class TarMember:
    """A file within an uncompressed archive, as a binary file object that can be copied to other processes.

    Args:
        archive (`str` or `os.PathLike`): The archive.
        member (`str`): Its name there.
        offset (`int`): Where its content begins in the archive, in bytes.
        size (`int`): The length of its content, in bytes.
    """

    def __init__(self, archive: str | os.PathLike, member: str, offset: int, size: int):
        self.archive, self.member, self.offset, self.size = os.fspath(archive), member, offset, size
        self.position = 0

    @property
    def name(self) -> str:
        """The name in messages: that of the archive, and that in the archive."""
        return f"{self.archive}/{self.member}"

    def __str__(self) -> str:
        return self.name

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        # Opened each time: a million open files are too many, and processes that share one would share its position.
        with open(self.archive, "rb", buffering=0) as file:
            file.seek(self.offset + self.position)
            data = file.read(left if size is None or size < 0 else min(size, left)) or b""
        self.position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"{self}: byte {position} lies before its beginning")
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True


def read_samples(archive: str | os.PathLike) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """The samples of a shard in the format of WebDataset: their keys, and their files by suffix.

    Files in a row whose names are equal up to the first dot after the folder are one sample.

    Raises:
        FileNotFoundError: If there is no such archive.
        ValueError: If it is compressed, damaged or not an archive.
    """
    archive = Path(archive)
    key, files = None, {}
    for member in _members(archive):
        folder, _, base = member.member.rpartition("/")
        stem, _, suffix = base.partition(".")
        name = f"{folder}/{stem}" if folder else stem
        if name != key and files:
            yield key, files
            files = {}
        key = name
        files.setdefault(f".{suffix.rpartition('.')[2].lower()}", member)
    if files:
        yield key, files


def media_of(files: dict[str, TarMember]) -> TarMember | None:
    """The clip among the files of a sample, if there is one."""
    suffixes = (*EXTENSIONS["video"], *EXTENSIONS["audio"])
    return next((files[suffix] for suffix in suffixes if suffix in files), None)


def _members(archive: Path) -> Iterator[TarMember]:
    size = archive.stat().st_size
    try:
        with tarfile.open(archive, "r:") as file:
            for member in file:
                if not member.isreg() or member.issparse() or os.path.basename(member.name).startswith("."):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it breaks off in {member.name}")
                yield TarMember(archive, member.name, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{archive}: cannot be read as an uncompressed .tar archive ({error}). Give one that is whole and not compressed."
        ) from error
