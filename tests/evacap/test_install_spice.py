import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from evacap.cli import main
from evacap.commands.install_spice import MAVEN_FOLDER, install_spice
from evacap.training.metrics.spice import JARS, jar_folder


CONTENT = {"parser.jar": b"parser" * 1000, "parser-models.jar": bytes(range(256)) * 20_000}
SMALL_JARS = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENT.items()}


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "server" / "archive.zip"
    path.parent.mkdir()
    with ZipFile(path, "w", ZIP_DEFLATED) as file:
        file.writestr("corenlp/README.txt", "more than the jars")
        for name, data in CONTENT.items():
            file.writestr(f"corenlp/{name}", data)
    return path


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "cache" / "spice"


class Resuming(BaseHTTPRequestHandler):
    """Sends `content`, the first time no more than the half of it."""

    content = b""
    asked: list[str | None] = []

    def do_GET(self):
        span = self.headers["Range"]
        first = int(span.removeprefix("bytes=").removesuffix("-")) if span else 0
        self.asked.append(span)
        left = self.content[first:]
        self.send_response(206 if left and span else 200 if left else 416)
        self.send_header("Content-Length", str(len(left)))
        self.end_headers()
        self.wfile.write(left if len(self.asked) > 1 else left[: len(left) // 2])


def serve(handler: type) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def server(archive) -> Iterator[str]:
    yield from serve(partial(SimpleHTTPRequestHandler, directory=archive.parent))


def assert_installed(folder: Path) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT


def test_from_an_archive_and_once_only(archive, target):
    install_spice(archive, target, SMALL_JARS)
    assert_installed(target)
    archive.unlink()
    install_spice(archive, target, SMALL_JARS)
    (target / "parser.jar").write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match="archive.zip"):
        install_spice(archive, target, SMALL_JARS)


def test_from_a_folder(tmp_path, target):
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    install_spice(tmp_path, target, SMALL_JARS)
    assert_installed(target)


@pytest.mark.parametrize("repository", ["repository", "."])
def test_from_a_maven_repository(tmp_path, target, repository):
    folder = tmp_path / "m2" / repository / MAVEN_FOLDER
    folder.mkdir(parents=True)
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    install_spice(tmp_path / "m2", target, SMALL_JARS)
    assert_installed(target)


def test_the_command_says_what_it_fetches_and_where_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["install-spice", "--from", str(tmp_path)]) == 1
    assert capsys.readouterr().out == (
        f"SPICE's parser: 2 files of Stanford CoreNLP 3.6.0, 385 MB, to {tmp_path}/cache/evacap/spice\n"
    )


def test_from_a_server(server, target, capsys):
    install_spice(f"{server}/archive.zip", target, SMALL_JARS)
    assert_installed(target)
    assert "archive.zip: 100%" in capsys.readouterr().err


def test_a_server_without_it(server, target):
    with pytest.raises(OSError, match="nothing.zip cannot be fetched .*404.*--from"):
        install_spice(f"{server}/nothing.zip", target, SMALL_JARS)
    assert not any(target.iterdir())


def test_a_download_that_breaks_off_goes_on(archive, target):
    handler = type("Handler", (Resuming,), {"content": archive.read_bytes(), "asked": []})
    for url in serve(handler):
        with pytest.raises(OSError, match="broke off after|IncompleteRead"):
            install_spice(f"{url}/archive.zip", target, SMALL_JARS)
        (partial,) = target.iterdir()
        here = partial.stat().st_size
        assert 0 < here < len(handler.content)
        install_spice(f"{url}/archive.zip", target, SMALL_JARS)
        assert handler.asked == [None, f"bytes={here}-"]
    assert_installed(target)


def test_a_download_that_is_whole_but_not_unpacked_is_not_fetched_again(archive, target):
    handler = type("Handler", (Resuming,), {"content": archive.read_bytes(), "asked": []})
    for url in serve(handler):
        name = hashlib.sha256(f"{url}/archive.zip".encode()).hexdigest()[:8]
        target.mkdir(parents=True)
        (target / f"{name}.partial").write_bytes(handler.content)
        install_spice(f"{url}/archive.zip", target, SMALL_JARS)
        assert handler.asked == [f"bytes={len(handler.content)}-"]
    assert_installed(target)


def test_another_jar_is_refused_and_none_is_placed(archive, target):
    size, checksum = SMALL_JARS["parser-models.jar"]
    for wrong in ((size + 1, checksum), (size, "0" * 64)):
        with pytest.raises(ValueError, match=f"parser-models.jar has {size} bytes and SHA-256 {checksum}, expected"):
            install_spice(archive, target, SMALL_JARS | {"parser-models.jar": wrong})
        assert not any(target.iterdir())


def test_a_damaged_archive(archive, target):
    data = bytearray(archive.read_bytes())
    start = data.index(b"parser-models.jar") + 40
    data[start : start + 8] = b"\x55" * 8
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="not a complete zip archive"):
        install_spice(archive, target, SMALL_JARS)
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a complete zip archive"):
        install_spice(archive, target, SMALL_JARS)
    assert not any(target.iterdir())


def test_the_command_refuses_another_archive_in_one_line(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["install-spice", "--from", str(archive)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evacap install-spice: ") and "stanford-corenlp-3.6.0.jar" in line
    assert main(["install-spice", "--from", str(tmp_path)]) == 1
    assert f"{tmp_path} holds no {next(iter(JARS))}" in capsys.readouterr().err
    assert jar_folder() == tmp_path / "cache" / "evacap" / "spice" and not any(jar_folder().iterdir())
