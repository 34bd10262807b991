"""`evacap evaluate --predictions`: captions of files, right and wrong."""

import json
import re
from pathlib import Path

import pytest

from evacap.cli import main
from evacap.training.evaluation.predictions import read_captions
from evacap.training.metrics.compute import compute_metrics


REFERENCES = {
    "a": ["A dog barks", "The dog is barking"],
    "b": ["Rain falls on a roof"],
    "c": ["A woman speaks, then laughs", "A woman talks and laughs", "Speech"],
}
CAPTIONS = {"a": "A dog barks loudly", "b": "", "c": "A woman, then laughter"}
METRICS = ("bleu", "rouge_l", "cider_d")


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def references(tmp_path) -> str:
    # As a manifest has it, and a caption a row.
    rows = [{"id": name, "media": f"{name}.mp4", "captions": captions} for name, captions in REFERENCES.items()]
    rows += [{"id": "b", "caption": "It rains"}]
    return write_lines(tmp_path / "manifest.jsonl", rows)


@pytest.fixture
def predictions(tmp_path) -> str:
    # In another order.
    return write_lines(tmp_path / "mine.jsonl", [{"id": n, "caption": CAPTIONS[n]} for n in reversed(CAPTIONS)])


def run(output: Path, *arguments: str) -> int:
    return main(["evaluate", "--output", str(output), "--resamples", "50", "--metrics", *METRICS, *arguments])


def test_two_systems(references, predictions, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text('id,caption,score\na,"A cat, meowing",1\nb,Rain falls,2\nc,A woman speaks,3\n')
    files = ["--predictions", f"ours={predictions}", f"theirs={other}", "--references", references]
    assert run(tmp_path / "out", *files) == 0
    said = capsys.readouterr().out
    assert "ours" in said and "theirs" in said and "swapped" not in said
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    expected = compute_metrics(
        list(CAPTIONS.values()), [REFERENCES["a"], [*REFERENCES["b"], "It rains"], REFERENCES["c"]], METRICS
    )
    (condition,) = evaluation["checkpoints"]["ours"]["conditions"]
    found = {name: figure["value"] for name, figure in condition["metrics"].items()}
    assert found == pytest.approx(expected["corpus"], abs=1e-9)
    assert all(len(figure["interval"]) == 2 for figure in condition["metrics"].values())
    assert [clip["id"] for clip in condition["clips"]] == ["a", "b", "c"]
    assert {test["metric"] for test in evaluation["tests"]} == set(expected["corpus"])
    tables = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| ours | – |" in tables and "beams" not in tables and "Own videos" not in tables


def test_spice_and_spider(references, predictions, spice_parser, tmp_path):
    files = ["--predictions", predictions, "--references", references, "--metrics", "spice", "spider"]
    assert run(tmp_path / "out", *files) == 0
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["skipped"] == {}
    (condition,) = evaluation["checkpoints"]["mine.jsonl"]["conditions"]
    expected = compute_metrics(
        list(CAPTIONS.values()),
        [REFERENCES["a"], [*REFERENCES["b"], "It rains"], REFERENCES["c"]],
        ("spice", "spider"),
    )
    for name, value in expected["corpus"].items():
        figure = condition["metrics"][name]
        assert figure["value"] == pytest.approx(value, abs=1e-12)
        assert figure["interval"][0] <= value <= figure["interval"][1]
    # Kept for the next time.
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert sorted(entry["spice"] for entry in kept.values()) == sorted(expected["per_clip"]["spice"])


def test_what_evacap_caption_writes(references, tmp_path):
    rows = [{"file": f"clips/{name}.mp4", "text": text} for name, text in CAPTIONS.items()]
    path = write_lines(tmp_path / "captions.jsonl", rows)
    assert read_captions(path) == {name: [text] for name, text in CAPTIONS.items()}
    assert run(tmp_path / "out", "--predictions", path, "--references", references) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"id": "a", "caption": "x"}\n{"caption": "y"}\n', "p.jsonl, line 2: `id` is missing"),
        ("p.jsonl", '{"id": "a", "capton": "x"}\n', "p.jsonl, line 1: `caption` must be a sentence, .* got None"),
        ("p.jsonl", '{"id": "a", "caption": 3}\n', "p.jsonl, line 1: `caption` must be a sentence, .* got 3"),
        ("p.jsonl", '{"id": "a", "caption": "x"\n', "p.jsonl, line 1: is not JSON"),
        ("p.jsonl", '{"file": "b.mp4", "error": "no sound"}\n', "line 1: 'b.mp4' has an error and no caption"),
        ("p.jsonl", '{"id": "a", "caption": "x"}\n', r"2 of its clips have no caption .*: 'b', 'c'$"),
        ("p.csv", "id,caption\na,x\nb,y\nc,z\nd,w\n", r"p.csv: 1 of its clips are not in .*: 'd'"),
        ("p.csv", "id,caption\na,x\nb,y\nc,z\nc,w\n", "1 of its clips have more than one caption: 'c'"),
        ("p.csv", "id,caption\na,x,y\n", "p.csv, line 2: has more or fewer fields"),
        ("p.csv", "id,caption\n", "p.csv: has no rows"),
        ("p.txt", "a x\n", "p.txt: its name must end in .jsonl or .csv"),
        ("p.jsonl", None, "p.jsonl"),
    ],
)
def test_wrong_files_are_a_line(name, text, message, references, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert run(tmp_path / "out", "--predictions", str(tmp_path / name), "--references", references) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evacap evaluate: ")]
    assert re.search(message, line), line


def test_wrong_calls_are_a_line(references, predictions, tmp_path, capsys):
    for arguments in (["--predictions", predictions], ["--references", references], [], ["--data", str(tmp_path)]):
        assert run(tmp_path / "out", *arguments) == 1
        assert "--predictions with --references" in capsys.readouterr().err
