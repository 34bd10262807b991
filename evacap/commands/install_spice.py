"""`evacap install-spice`: the parser that the metric SPICE needs, to the user's cache."""

import argparse
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen
from zipfile import BadZipFile, ZipFile

from tqdm import tqdm

from ..training.metrics.spice import JARS, find_spice_java, jar_folder


ARCHIVE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
CHUNK = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        metavar="ARCHIVE",
        default=ARCHIVE,
        help="the CoreNLP archive of 2015-12-09 as a file or URL, or a folder with its two jars (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    install_spice(arguments.source)
    print(f"SPICE's parser is in {jar_folder()}")
    try:
        print(f"SPICE runs on {find_spice_java().path}")
    except RuntimeError as error:
        print(f"Not ready yet: {error}")


def install_spice(
    source: str | os.PathLike = ARCHIVE,
    folder: str | os.PathLike | None = None,
    jars: Mapping[str, tuple[int, str]] = JARS,
) -> None:
    """
    Puts the jars that SPICE needs into a folder, after a check of their size and checksum, if they are not there yet.

    Args:
        source (`str`, *optional*, defaults to Stanford's): A zip archive with the jars, its URL, or a folder with them.
        folder (`str`, *optional*): Where they go, by default where the metrics look for them.
        jars (`Mapping[str, tuple[int, str]]`, *optional*, defaults to those of CoreNLP 3.6.0): Size in bytes and SHA-256
            of each file.

    Raises:
        ValueError: If the source is no zip archive, misses a jar, or holds another than the right one.
        OSError: If it cannot be read, or the folder not be written.
    """
    folder = jar_folder() if folder is None else Path(folder)
    try:
        for name, (size, checksum) in jars.items():
            _check(folder / name, size, checksum)
        return
    except (OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that moving a jar there is one step.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".install-") as partial:
        if str(source).startswith(("http://", "https://")):
            archive = Path(partial, "archive.zip")
            _download(str(source), archive)
        else:
            archive = Path(source)
        for name, (size, checksum) in jars.items():
            with _open_jar(archive, name, str(source)) as jar:
                _copy(jar, Path(partial, name), size)
            _check(Path(partial, name), size, checksum)
        for name in jars:
            Path(partial, name).replace(folder / name)


def _download(url: str, path: Path) -> None:
    try:
        with urlopen(url, timeout=60) as answer:
            size = int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
            _copy(answer, path, size)
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{url} cannot be fetched ({error}): fetch it elsewhere, then pass the file by --from"
        ) from error
    if size and path.stat().st_size != size:
        raise OSError(f"{url} broke off after {path.stat().st_size} of {size} bytes: try again")


@contextmanager
def _open_jar(source: Path, name: str, called: str) -> Iterator[BinaryIO]:
    if source.is_dir():
        if not (source / name).is_file():
            raise ValueError(f"{called} holds no {name}")
        with open(source / name, "rb") as jar:
            yield jar
        return
    try:
        with ZipFile(source) as archive:
            members = [member for member in archive.namelist() if member.split("/")[-1] == name]
            if not members:
                raise ValueError(f"{called} holds no {name}: it must be the CoreNLP archive of 2015-12-09")
            with archive.open(members[0]) as jar:
                yield jar
    except (BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{called} is no whole zip archive: {error}") from error


def _copy(source: BinaryIO, target: Path, size: int | None) -> None:
    with open(target, "wb") as file, tqdm.wrapattr(source, "read", total=size, desc=target.name) as bytes_read:
        shutil.copyfileobj(bytes_read, file, CHUNK)


def _check(path: Path, size: int, checksum: str) -> None:
    with open(path, "rb") as file:
        found = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    if found != (size, checksum):
        raise ValueError(
            f"{path.name} has {found[0]} bytes and SHA-256 {found[1]}, expected {size} bytes and {checksum}: "
            "it is not that of CoreNLP 3.6.0"
        )
