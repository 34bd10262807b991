"""`evacap install-spice`: the parser that the metric SPICE needs, to the user's cache."""

import argparse
import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile

from tqdm import tqdm

from ..training.files import locked
from ..training.metrics.java import find_java
from ..training.metrics.spice import JARS, jar_folder


ARCHIVE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
MAVEN_FOLDER = "edu/stanford/nlp/stanford-corenlp/3.6.0"
CHUNK = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        default=ARCHIVE,
        help="the CoreNLP archive of 2015-12-09 as a file or URL, a folder with its two jars, or a local Maven "
        "repository that has them, such as ~/.m2 (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    size = sum(size for size, _ in JARS.values())
    print(f"SPICE's parser: {len(JARS)} files of Stanford CoreNLP 3.6.0, {size / 1e6:.0f} MB, to {jar_folder()}")
    install_spice(arguments.source)
    print("SPICE's parser is there")
    try:
        print(f"SPICE runs on {find_java().path}")
    except RuntimeError as error:
        print(f"Not ready yet: {error}")


def install_spice(
    source: str | os.PathLike = ARCHIVE,
    folder: str | os.PathLike | None = None,
    jars: Mapping[str, tuple[int, str]] = JARS,
) -> None:
    """Installs the jars that SPICE needs into a folder, and checks their size and checksum.

    An interrupted download is kept beside them and continued by the same call.

    Args:
        source (`str`, *optional*, defaults to Stanford's): A zip archive with the jars, its URL, a folder with them,
            or a local Maven repository or the folder of one.
        folder (`str`, *optional*): The folder; by default the one in which the metrics look for them.
        jars (`Mapping[str, tuple[int, str]]`, *optional*, defaults to those of CoreNLP 3.6.0): Size in bytes and
            SHA-256 of each file.

    Raises:
        ValueError: If the source is not a zip archive, or if it lacks a jar or has a wrong one.
        OSError: If the source cannot be read or the folder cannot be written.
    """
    folder = jar_folder() if folder is None else Path(folder)
    try:
        for name, (size, checksum) in jars.items():
            _check(folder / name, size, checksum)
        return
    except (OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that moving a jar there is one step.
    with locked(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".install-") as partial:
        download = None
        if str(source).startswith(("http://", "https://")):
            # Each source has its own file.
            download = folder / f"{hashlib.sha256(str(source).encode()).hexdigest()[:8]}.partial"
            _download(str(source), download)
        archive = download or Path(source)
        try:
            for name, (size, checksum) in jars.items():
                with _open_jar(archive, name, str(source)) as jar:
                    _copy(jar, Path(partial, name), size, name)
                _check(Path(partial, name), size, checksum)
        except ValueError:
            # Continuing it would not help.
            if download:
                download.unlink()
            raise
        for name in jars:
            Path(partial, name).replace(folder / name)
        if download:
            download.unlink()


def _download(url: str, path: Path) -> None:
    """Downloads the missing part of `path`."""
    here = path.stat().st_size if path.exists() else 0
    request = Request(url, headers={"Range": f"bytes={here}-"} if here else {})
    try:
        with urlopen(request, timeout=60) as answer:
            here = here if answer.status == HTTPStatus.PARTIAL_CONTENT else 0
            length = answer.headers["Content-Length"]
            size = here + int(length) if length else None
            _copy(answer, path, size, url.split("/")[-1], here)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError) and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            # Nothing is missing.
            return
        raise OSError(
            f"{url} cannot be fetched ({error}): try again, or fetch it elsewhere, or by Maven, and pass the file or the "
            "folder by --from"
        ) from error
    if size and path.stat().st_size != size:
        raise OSError(
            f"{url} broke off after {path.stat().st_size} of {size} bytes: the same command goes on from there"
        )


@contextmanager
def _open_jar(source: Path, name: str, called: str) -> Iterator[BinaryIO]:
    if source.is_dir():
        places = [source / place / name for place in ("", MAVEN_FOLDER, f"repository/{MAVEN_FOLDER}")]
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            raise ValueError(f"{called} holds no {name}, nor does it as a Maven repository ({MAVEN_FOLDER})")
        with open(path, "rb") as jar:
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
        raise ValueError(f"{called} is not a complete zip archive: {error}") from error


def _copy(source: BinaryIO, target: Path, size: int | None, name: str, here: int = 0) -> None:
    """Appends `source` to `target`, which has `here` bytes."""
    with (
        open(target, "ab" if here else "wb") as file,
        tqdm.wrapattr(source, "read", total=size, initial=here, desc=name) as bytes_read,
    ):
        shutil.copyfileobj(bytes_read, file, CHUNK)


def _check(path: Path, size: int, checksum: str) -> None:
    with open(path, "rb") as file:
        found = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    if found != (size, checksum):
        raise ValueError(
            f"{path.name} has {found[0]} bytes and SHA-256 {found[1]}, expected {size} bytes and {checksum}: "
            "it is not that of CoreNLP 3.6.0"
        )
