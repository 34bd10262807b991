"""The benchmarks of the pipeline and of start-up run from their command line to their files; the figures tell nothing."""

import json

import pytest

from benchmarks import long_files, many_clips, startup, throughput, time_resolution
from evacap.training.procedural.scenes import make_scene, write_clip


def run(benchmark, folder, *options: str) -> list[dict]:
    output = folder / "figures.json"
    benchmark.main(["--device", "cpu", "--output", str(output), "--repeats", "1", *options])
    assert output.with_suffix(".md").read_text().count("|") > 20
    return json.loads(output.read_text())["rows"]


def test_throughput(tmp_path):
    write_clip(make_scene(0, "test", 0), tmp_path / "clips" / "clip.mp4")
    options = ["--models", "tiny", "--media", str(tmp_path / "clips"), "--clips", "2", "2", "--shares", "1:1"]
    (row,) = run(throughput, tmp_path, *options)
    assert row["clips"] == 2 and row["ratio"] > 0
    assert all(row[name]["core_seconds"]["median"] > 0 for name in ("reading", "model_alone", "together"))
    assert run(throughput, tmp_path, *options) == [row], "what is there is not measured again"


@pytest.mark.slow
def test_long_files(tmp_path):
    rows = run(long_files, tmp_path, "--models", "tiny", "--lengths", "6", "20")
    assert [row["length"] for row in rows] == [6, 20]
    assert all(row["seconds"] > 0 and row["memory"] >= 0 for row in rows)


@pytest.mark.slow
def test_startup(tmp_path):
    rows = {row["what"]: row for row in run(startup, tmp_path, "--size", "small")}
    assert rows["load small as float32"]["initialised"] == 0 and rows["load small as float32"]["mapped"]
    assert rows["import evacap"]["seconds"]["median"] > 0


@pytest.mark.slow
def test_time_resolution(tmp_path):
    rows = run(time_resolution, tmp_path, "--clips", "2")
    assert [row["windows"] for row in rows[:2]] == [3, 4] and all(0 <= row["right"] <= 1 for row in rows)


@pytest.mark.slow
def test_many_clips(tmp_path):
    rows = run(many_clips, tmp_path, "--clips", "4", "--batch", "2")
    assert [row["way"] for row in rows] == ["pipeline", "Captioner", "Ray Data"]
    assert all(row["seconds"]["median"] > 0 for row in rows)
