"""Files and folders that are complete or absent, JSON lines that survive a killed process, and locks for outputs."""

import json
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


_NAME_LENGTH = 40
"""Characters of a name that go into its temporary name, which must stay below the limit of the file system."""


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path to write to, and moves the file to `path` at the end.

    No reader ever sees a part of the file, and two processes that write it have different temporary files. Missing folders
    above `path` are made. If the block raises, or if the disk is full, the previous file stays.

    Args:
        path (`str` or `os.PathLike`): The file to write. A symbolic link stays, and its target is replaced.

    Raises:
        FileExistsError: If `path` is a folder, a device or a pipe.
        OSError: If it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is not a regular file. Give another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _neighbour(path, "partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, completely or not at all; see [`whole_file`]."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any, indent: int | None = 2) -> None:
    """Writes `content` as a JSON file, completely or not at all; see [`whole_file`]."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary folder to fill, which becomes `target` at the end.

    Args:
        target (`str` or `os.PathLike`): The folder to make. If it exists it is replaced.
    """
    target = Path(os.path.realpath(target))
    partial = _neighbour(target, "partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(partial: Path, target: Path) -> None:
    """Renames a finished folder to `target`, and replaces what has that name."""
    for file in files_in(partial):
        # Even after a power cut, a folder with its name must have its content.
        sync(file)
    if target.exists():
        remove_folder(target)
    partial.rename(target)


def remove_folder(folder: Path) -> None:
    """Removes a folder; if this is interrupted, no part of it is left under its name."""
    hidden = _neighbour(folder, "old")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(*folders: Path) -> None:
    """Removes the unfinished files that killed processes have left directly in these folders.

    The caller must hold the lock of the output; otherwise this may remove a file that another process is writing.
    """
    for folder in folders:
        for leftover in [*folder.glob(".*.partial"), *folder.glob(".*.old")]:
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def files_in(folder: Path) -> list[Path]:
    """All files in and below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(file: Path) -> None:
    """Waits until the disk has the content of `file`."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _neighbour(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name[:_NAME_LENGTH]}.{uuid.uuid4().hex[:12]}.{kind}")


class JsonLines:
    """A file with one JSON object per line.

    Lines are appended, so a killed process loses only the line that it was writing.

    Args:
        path (`str` or `os.PathLike`): The file; it need not exist.
        first (`str`): The first key of each object, which identifies the file.
        parse (`Callable`, *optional*): Converts an object. It raises `ValueError`, `KeyError`, `TypeError` or
            `AttributeError` for an object that does not belong into the file. By default objects stay unchanged.
        advice (`str`, *optional*): A sentence on what to do if the file has other content.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        first: str,
        parse: Callable[[dict[str, Any]], Any] = dict,
        advice: str = "Give another file, or remove this one.",
    ):
        self.path = Path(path)
        self.begin = f'{{"{first}": '.encode()
        self.parse = parse
        self.advice = advice

    def read(self) -> list[Any]:
        """The content of the complete lines in their order; empty if there is no file.

        Raises:
            ValueError: If a line has other content, or if the rest after the last complete line is not the beginning of a
                line. The file is not changed.
        """
        return self._read()[0]

    def recover(self) -> list[Any]:
        """Removes an incomplete last line of a killed process, and returns the result of [`read`]."""
        parsed, size = self._read()
        if self.path.exists() and size < self.path.stat().st_size:
            os.truncate(self.path, size)
        return parsed

    def _read(self) -> tuple[list[Any], int]:
        """The complete lines, and their number of bytes."""
        parsed, size = [], 0
        if not self.path.exists():
            return parsed, size
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line[: len(self.begin)] != self.begin[: len(line)]:
                        raise ValueError("another file")
                    if line.endswith(b"\n"):
                        parsed.append(self.parse(json.loads(line)))
                        size += len(line)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{self.path}: line {number} was not written by this command. {self.advice}"
                    ) from error
        return parsed, size

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines in one write."""
        with self.path.open("ab") as file:
            file.write(_encode(lines))

    def rewrite(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the content of the file by these lines."""
        with whole_file(self.path) as partial:
            partial.write_bytes(_encode(lines))


def _encode(lines: Iterable[Mapping[str, Any]]) -> bytes:
    # With escapes, because the path of a file may not be valid UTF-8.
    return "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Describes the fields of `expected`, also nested ones, that `found` lacks or has with another value."""
    different = []
    for name, value in expected.items():
        if isinstance(value, Mapping) and isinstance(found.get(name), Mapping):
            different += differences(found[name], value, f"{prefix}{name}.")
        elif found.get(name) != value:
            different.append(f"`{prefix}{name}` is {found.get(name)!r} there and {value!r} here")
    return different


def check_settings(
    output: str | os.PathLike, found: Mapping[str, Any], expected: Mapping[str, Any], advice: str
) -> None:
    """Refuses to continue an output that was started with other settings.

    Args:
        output (`str` or `os.PathLike`): The output.
        found (`Mapping`): The settings that it was started with.
        expected (`Mapping`): The present settings; all of them must be among `found`.
        advice (`str`): A sentence on what to do.

    Raises:
        ValueError: If they differ; the message has the settings.
    """
    different = differences(found, expected)
    if different:
        raise ValueError(f"{output} was begun with other settings: {'; '.join(different)}. {advice}")


@contextmanager
def locked(output: str | os.PathLike) -> Iterator[None]:
    """Locks an output against other processes that call this.

    The lock is a hidden file in the folder, or beside the file. It is released when the process ends, however it ends.

    Args:
        output (`str` or `os.PathLike`): A folder that exists, or a file, which need not exist.

    Raises:
        BlockingIOError: If another process has the lock; the message says which.
    """
    output = Path(os.path.realpath(output))
    path = output / ".lock" if output.is_dir() else output.with_name(f".{output.name[:_NAME_LENGTH]}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"{output} is being written by {_holder(path)}. Wait for it to end, or give another output."
        ) from None
    # On a file system without locks the library's file is the lock itself, and names its holder already.
    is_marker = hasattr(lock, "pid")
    try:
        if not is_marker:
            _name_holder(path)
        yield
    finally:
        if not is_marker:
            with suppress(OSError):
                path.unlink()
        lock.release()


def _name_holder(path: Path) -> None:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = f"{os.getpid()}\n{socket.gethostname()}, since {since} ({command})"
    # Windows locks the content as well, so that nobody can be named there.
    with suppress(OSError):
        path.write_text(holder, encoding="utf-8", errors="backslashreplace")


def _holder(path: Path) -> str:
    try:
        process, machine, *_ = path.read_text(encoding="utf-8").split("\n")
        return f"process {process} on {machine}"
    except (OSError, ValueError):
        return "another process"
