"""What the README shows is what runs."""

import re
from pathlib import Path

import pytest
import torch

from evacap.training.clips import make_scene, write_clip


README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    write_clip(make_scene(0, "test", 0), tmp_path / "sample.mp4")
    write_clip(make_scene(0, "test", 1), tmp_path / "other.mp4")
    write_clip(make_scene(0, "test", 2, duration=10.0), tmp_path / "long.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_examples_run(folder, block, capsys):
    torch.manual_seed(0)
    exec(compile(block, str(README), "exec"), {})


def test_there_is_an_example_for_each_way_in():
    for way in ("pipeline(", "AutoProcessor", "Trainer("):
        assert any(way in block for block in BLOCKS)


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"`?make ([a-z-]+)", README.read_text(encoding="utf-8"))
    makefile = README.with_name("Makefile").read_text(encoding="utf-8")
    assert {"caption", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
