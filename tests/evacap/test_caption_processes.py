"""One `evacap caption` in two processes."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evacap.cli import main
from evacap.training.procedural.scenes import make_scene, write_clip


GUIDE = Path(__file__).parents[2] / "docs" / "scale.md"
CLIPS = 5
SECONDS = 400


@pytest.fixture
def folder(tmp_path) -> Path:
    for index in range(CLIPS - 1):
        write_clip(make_scene(0, "test", index), tmp_path / "CLIPS" / f"{index}.mp4")
    (tmp_path / "CLIPS" / "bad.mp4").write_bytes(b"no media")
    return tmp_path


@pytest.mark.slow
def test_two_processes_caption_every_clip_once(folder):
    (command,) = re.findall(r"^accelerate launch .+$", GUIDE.read_text(), re.MULTILINE)
    for shown, here in (("--num_processes 8", "--num_processes 2 --main_process_port 0"), (" --model FOLDER", "")):
        assert shown in command
        command = command.replace(shown, here)
    command = command.replace(" --dtype bfloat16", "").split()[1:] + ["--output", "captions.csv", "--workers", "0"]

    def launch() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    done = launch()
    assert done.returncode == 1 and f"1 of {CLIPS} files failed" in done.stderr, done.stderr
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    names = sorted(str(path.relative_to(folder)) for path in (folder / "CLIPS").iterdir())
    assert sorted(line["file"] for line in lines) == names
    assert ["error" in line for line in sorted(lines, key=lambda line: line["file"])] == [False] * 4 + [True]
    # A file of all clips has them in their order, whoever was first.
    with (folder / "captions.csv").open(newline="") as file:
        assert list(dict.fromkeys(row["file"] for row in csv.DictReader(file))) == names

    shutil.copy(folder / "CLIPS" / "0.mp4", folder / "CLIPS" / "new.mp4")
    done = launch()
    assert f"{CLIPS} of {CLIPS + 1} files are in captions.jsonl already" in done.stderr, done.stderr
    assert len((folder / "captions.jsonl").read_text().splitlines()) == CLIPS + 1


@pytest.mark.parametrize(
    ("options", "machine", "message"),
    [
        (["clip.mp4"], "2", "give files, and --output"),
        (["-", "--output", "captions.jsonl"], "2", "give files, and --output"),
        (["clip.mp4", "--output", "captions.jsonl"], "1", "several machines"),
    ],
)
def test_what_several_processes_cannot_do(tmp_path, monkeypatch, capsys, options, machine, message):
    write_clip(make_scene(0, "test", 0), tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    for name, value in (("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", machine)):
        monkeypatch.setenv(name, value)
    assert main(["caption", *options]) == 1
    assert message in capsys.readouterr().err
