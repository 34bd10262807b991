import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evacap.training.files import (
    JsonLines,
    check_settings,
    differences,
    locked,
    remove_folder,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "below" / "file.txt"
    write_text(path, "first")
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("half")
        1 / 0
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "lone \udc80 surrogate")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    write_json(path, {"a": [1]}, indent=None)
    assert path.read_text() == '{"a": [1]}\n' and list(path.parent.iterdir()) == [path]


def test_two_that_write_one_file_do_not_share_what_is_half_written(tmp_path):
    path = tmp_path / ("n" * 255)
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_links_stay_and_devices_are_left_alone(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    write_text(link, "text")
    assert link.is_symlink() and target.read_text() == "text"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(FileExistsError, match="is not a regular file"):
            write_text(path, "text")
    assert pipe.is_fifo() and Path("/dev/null").is_char_device()


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with whole_folder(target) as partial:
            assert (target / "file").exists() == (content == "new")
            (partial / "file").write_text(content)
    with pytest.raises(ZeroDivisionError), whole_folder(target) as partial:
        (partial / "file").write_text("half")
        1 / 0
    assert (target / "file").read_text() == "new" and list(tmp_path.iterdir()) == [target]
    remove_folder(target)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from evacap.training.files import whole_file, whole_folder
with whole_file(sys.argv[1] + "/file") as file, whole_folder(sys.argv[1] + "/folder") as folder:
    file.write_text("half")
    (folder / "file").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".hidden").write_text("mine")
    remove_leftovers(tmp_path, tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


WRITER = """
import sys
from evacap.training.files import JsonLines
lines = JsonLines(sys.argv[1], "number")
for number in range(10**9):
    lines.append([{"number": number, "text": "x" * 5000}])
"""


def test_lines_survive_kill_9(tmp_path):
    path = tmp_path / "lines.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path])
        size = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size < size + 100_000:
            time.sleep(0.001)
        process.kill()
        process.wait()
        lines = JsonLines(path, "number").recover()
        assert path.read_bytes().count(b"\n") == len(lines) and path.read_bytes().endswith(b"\n")
    numbers = [line["number"] for line in lines]
    assert numbers.count(0) == 3 and all(after in (0, before + 1) for before, after in zip(numbers, numbers[1:]))


def test_half_a_line_is_cut_off_at_every_length(tmp_path):
    path, line = tmp_path / "lines.jsonl", b'{"a": "\\ud800", "b": [1]}\n'
    lines = JsonLines(path, "a", lambda line: line["b"])
    assert lines.read() == lines.recover() == [] and not path.exists()
    for length in range(len(line)):
        path.write_bytes(line + line[:length])
        assert lines.read() == [[1]] and path.read_bytes() == line + line[:length], "reading changes nothing"
        assert lines.recover() == [[1]] and path.read_bytes() == line
    lines.append([{"a": "\udcff", "b": [2]}])
    assert lines.read() == [[1], [2]]
    lines.rewrite([{"a": "", "b": [3]}])
    assert lines.read() == [[3]]


@pytest.mark.parametrize(
    "content", [b"[1]\n", b"a,b\n", b"text", b'{"b": 1}', b'{"b": 1}\n', b'{"a": 1}\n', b"\xff\xfe\0\n", b"\n"]
)
def test_another_file_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other: line 1 was not written by this command\."):
        JsonLines(path, "a", lambda line: line["b"]).recover()
    assert path.read_bytes() == content


def test_other_settings_are_named(tmp_path):
    found = {"a": 1, "b": {"c": [1], "d": 2}, "more": True}
    assert differences(found, {"a": 1, "b": {"c": [1]}}) == []
    check_settings(tmp_path, found, {"b": {"d": 2}}, "Go.")
    with pytest.raises(
        ValueError, match=r"was begun with other settings: `b.c` is \[1\] there and 0 here; `e` is None.*Go"
    ):
        check_settings(tmp_path, found, {"a": 1, "b": {"c": 0}, "e": 5}, "Go.")


HOLDER = """
import sys, time
from evacap.training.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_holder_of_a_lock_is_named_and_its_end_ends_it(tmp_path, is_folder):
    output = tmp_path / "output"
    if is_folder:
        output.mkdir()
    (tmp_path / "link").symlink_to(output)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, output], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        for name in ("output", "link"):
            with pytest.raises(
                BlockingIOError, match=f"output is being written by process {process.pid} on .*, since 2"
            ):
                with locked(tmp_path / name):
                    pass
    finally:
        process.kill()
        process.wait()
    with locked(output):
        pass
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == ({"link", "output"} if is_folder else {"link"}), "a free lock leaves nothing"


WITHOUT_FLOCK = """
import errno, fcntl, sys
def flock(*arguments):
    raise OSError(errno.ENOSYS, "there are no locks")
fcntl.flock = flock
from evacap.training.files import locked
with locked(sys.argv[1]):
    try:
        with locked(sys.argv[1]):
            pass
    except BlockingIOError as error:
        print(error)
"""


def test_a_file_system_without_locks(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_FLOCK, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path} is being written by process ") and list(tmp_path.iterdir()) == []


def test_a_lock_has_one_holder_at_a_time(tmp_path):
    """Many that try again and again, each of whom removes the file of the lock when it is through."""
    output, holders, counts = tmp_path / "file", [], []

    def work():
        for _ in range(60):
            try:
                with locked(output):
                    holders.append(1)
                    counts.append(len(holders))
                    holders.pop()
            except BlockingIOError:
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(counts) == {1}


def test_json_is_read_as_it_was_written(tmp_path):
    content = {"a": [1.5, None, "ü\n"], "b": {}}
    write_json(tmp_path / "file", content)
    assert json.loads((tmp_path / "file").read_text()) == content
