"""Timing in turn, memory of a call, and results that a run can be continued from."""

import json

import pytest
import torch

from benchmarks.measure import Results, in_own_process, interleave, markdown, peak_memory, product_seconds, summary


def test_interleave_calls_in_turn_after_a_warm_up():
    calls = []
    results = interleave({name: lambda name=name: calls.append(name) or len(calls) for name in "AB"}, repeats=2)
    assert "".join(calls) == "ABABAB"
    assert results == {"A": [3, 5], "B": [4, 6]}


def test_interleave_keeps_the_warm_up_of_a_long_run():
    calls = []
    results = interleave({"A": lambda: calls.append(1) or len(calls)}, repeats=3, long_run=0.0)
    assert results == {"A": [1, 2, 3]}


def test_summary():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": 3}


def allocate(numbers: list[int]):
    def call(number: int) -> float:
        return torch.ones(number).sum().item()

    return {number: lambda number=number: call(number) for number in numbers}


def test_peak_memory():
    peaks = peak_memory(allocate, [2**22, 2**25])
    assert peaks[2**22] == pytest.approx(2**24, rel=0.2, abs=2**21)
    assert peaks[2**25] == pytest.approx(2**27, rel=0.2)


def fail() -> None:
    raise SystemExit(7)


def test_a_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match=r"fail\(\) ended with status 7"):
        in_own_process(fail)


def test_a_part_of_a_large_product_stands_for_it(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.MAX_PRODUCT_FLOPS", {"cpu": 2 * 8 * 16 * 16})
    seconds = product_seconds(1, 8, 16, 16, "float32", "cpu")
    assert product_seconds(1, 24, 16, 16, "float32", "cpu") == pytest.approx(3 * seconds)


def test_results_are_continued(tmp_path):
    path = tmp_path / "new" / "file.json"
    results = Results(path, ("batch",), "cpu")
    results.add({"batch": 1, "seconds": 2.0})
    results.add({"batch": 8, "seconds": 9.0})
    again = Results(path, ("batch",), "cpu")
    assert again.find(batch=8) == {"batch": 8, "seconds": 9.0}
    assert again.find(batch=2) is None
    again.add({"batch": 1, "seconds": 1.0})
    assert json.loads(path.read_text())["rows"] == [{"batch": 1, "seconds": 1.0}, {"batch": 8, "seconds": 9.0}]


def test_results_of_another_machine_are_refused(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"machine": {"cpu": "another"}, "rows": []}))
    with pytest.raises(ValueError, match="file.json was begun with other settings: .*another"):
        Results(path, ("batch",), "cpu")


def test_markdown():
    assert markdown(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"
