"""The GPU check on the CPU, at a size that tells nothing of speed."""

import json
import sys

import pytest

from benchmarks import device_checks, gpu_check
from benchmarks.measure import Results


def check(folder, *options: str) -> int:
    return gpu_check.main(["--size", "small", "--device", "cpu", "--output", str(folder), *options])


def test_a_part_runs_once_and_is_reported(tmp_path, capfd):
    assert check(tmp_path, "--parts", "latency") == 0
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["parts"]["latency"]["status"] == "done" and report["machine"]["device"] == "cpu"
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| bfloat16 | 2 | 4 | evacap |" in text and text in capfd.readouterr().out
    before = report["parts"]
    assert check(tmp_path, "--parts", "latency") == 0
    assert json.loads((tmp_path / "gpu_check.json").read_text())["parts"] == before


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit('broken')", "failed"), ("while True: pass", "out of")]
)
def test_a_part_that_breaks_or_hangs_stops_no_other(tmp_path, monkeypatch, code, status):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(gpu_check, "PARTS", {"fusion": 1, "tests": 1})
    assert check(tmp_path, "--size", "full", "--seconds", "20") == 1
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert [*parts] == ["fusion", "tests"] and all(part["status"].startswith(status) for part in parts.values())
    assert ("broken" in (tmp_path / "gpu_check.md").read_text()) == (status == "failed")


@pytest.mark.parametrize(
    "name",
    ["rates", "fusion", "fusion module", "sdpa", "captions", pytest.param("two processes", marks=pytest.mark.slow)],
)
def test_the_checks_pass_on_a_cpu(tmp_path, monkeypatch, name):
    every = dict(device_checks.checks("cpu", "small"))
    monkeypatch.setattr(device_checks, "VARIANTS", ("evacap",))
    monkeypatch.setattr(device_checks, "checks", lambda device, size: [(name, every[name])])
    results = Results(tmp_path / "checks.json", ("group", "check"), "cpu")
    device_checks.run(results, "cpu", "small", are_compiled=False)
    # The CPU's loop rounds scores to half precision, the entropy with them.
    failed = [row for row in results.rows if not row["passed"] and "entropy" not in row["check"]]
    assert results.rows and not failed


def test_a_check_that_breaks_is_a_row(tmp_path, monkeypatch):
    def broken():
        yield "first", 1.0, 0.5
        raise ValueError("no\nsuch thing")

    monkeypatch.setattr(device_checks, "checks", lambda device, size: [("group", broken)])
    results = Results(tmp_path / "checks.json", ("group", "check"), "cpu")
    device_checks.run(results, "cpu", "small", are_compiled=False)
    assert [row["passed"] for row in results.rows] == [False, False]
    table = device_checks.table(results)
    assert "| first | 1 | 0.5 | **no** |" in table and "ValueError: no such thing" in table


@pytest.mark.slow
def test_the_whole_check(tmp_path):
    assert check(tmp_path, "--seconds", "1000") == 0
