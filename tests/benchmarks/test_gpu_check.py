"""The GPU check on the CPU, at a size that tells nothing of speed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import device_checks, gpu_check
from benchmarks.measure import Results


def check(folder, *options: str) -> int:
    return gpu_check.main(["--size", "small", "--device", "cpu", "--output", str(folder), *options])


def test_a_part_is_reported(tmp_path):
    gpu_check.run_part("latency", tmp_path, "small", "cpu")
    report = gpu_check.Report(tmp_path, "cpu")
    report.parts["latency"] = {"status": "done", "seconds": 1.0}
    report.write()
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| bfloat16 | 2 | 4 | evacap |" in text and "| latency | done | 1.0 |" in text
    assert json.loads((tmp_path / "gpu_check.json").read_text())["machine"]["device"] == "cpu"
    # What is done is not run again.
    before = (tmp_path / "latency.json").stat().st_mtime_ns
    assert check(tmp_path, "--parts", "latency") == 0
    assert (tmp_path / "latency.json").stat().st_mtime_ns == before


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


@pytest.mark.slow
def test_a_check_that_is_ended_leaves_a_report_and_no_process(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--size", "small", "--device", "cpu", "--parts", "checks"]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([*command, "--output", str(tmp_path)], cwd=root)
    log = tmp_path / "checks.log"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.05)
    (child,) = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not Path("/proc", child).exists()
    assert json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["checks"]["status"] == "interrupted"


@pytest.mark.parametrize(
    "name",
    [
        *("fusion", "fusion module", "sdpa", "captions"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("rates", "two processes")),
    ],
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
