"""Tables and plots of an evaluation of the bundled checkpoints."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from small_models import save_untrained_model

import evacap
from evacap.model_card import fill_model_card
from evacap.processing.processing_evacap import EVACapProcessor
from evacap.training.evaluation.evaluate import evaluate
from evacap.training.evaluation.plots import make_plots, make_sample_plots
from evacap.training.evaluation.report import write_report
from evacap.training.evaluation.tables import as_markdown, as_text
from evacap.training.metrics.compute import METRIC_TITLES
from evacap.training.procedural.dataset import ProceduralClips


def procedural(processor: EVACapProcessor) -> ProceduralClips:
    return ProceduralClips(processor, 6, "test")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    checkpoints = {"looks": evacap.TINY, "listens": Path(evacap.TINY).with_name("tiny_audio_only")}
    return evaluate(
        checkpoints,
        procedural,
        tmp_path_factory.mktemp("evaluation"),
        "six clips",
        shares=(0.5, 1),
        frames=(0, 8),
        num_beams=1,
        metrics=("bleu", "rouge_l"),
        resamples=50,
        dataset_id="org/six",
    )


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of the first Markdown table under each heading."""
    found: dict[str, list[list[str]]] = {}
    for part in text.split("\n## ")[1:]:
        heading, *lines = part.splitlines()
        rows = [line for line in lines if line.startswith("|")]
        found[heading] = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return found


def test_markdown_has_the_papers_tables(evaluation):
    found = tables(as_markdown(evaluation))
    names = [METRIC_TITLES[name] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")]
    first = found["Own videos (layout of the paper's Table 1)"]
    assert first[0] == ["model", "params", *names]
    assert [row[0] for row in first[2:]] == ["looks", "listens"]
    assert first[2][1] == "2.4 M"
    figures = evaluation["checkpoints"]["looks"]["conditions"][0]["metrics"]
    low, high = (f"{bound:.3f}".removeprefix("0") for bound in figures["rouge_l"]["interval"])
    assert first[2][-1] == f"{figures['rouge_l']['value']:.3f}<br><sub>{low}–{high}</sub>"
    third = found["Shuffled test videos (layout of the paper's Table 3)"]
    shares = [(row[0], row[1]) for row in third[2:8]]
    assert shares == [(share, name) for share in ("0 %", "50 %", "100 %") for name in ("looks", "listens")]
    assert {len(row) for row in third} == {7}
    # Of a model that does not look nothing is left or lost.
    assert [row[:2] for row in third[10:]] == [["50 %", "looks"], ["100 %", "looks"]]
    assert [row[:2] for row in found["Fewer frames, own videos"][2:]] == [["0", "looks"], ["8", "looks"]]
    assert [row[:3] for row in found["Gate and entropy"][2:]] == [["50 %", "looks", "3"], ["100 %", "looks", "6"]]
    assert found["Sources named"][0][2:4] == ["set", "sound-alikes"]
    assert len(found["Differences from looks"]) == 2 + 5


def test_the_terminal_shows_values_over_intervals(evaluation):
    lines = as_text(evaluation).splitlines()
    assert lines[0].split() == ["B1", "B2", "B3", "B4", "ROUGE-L"]
    figures = evaluation["checkpoints"]["looks"]["conditions"][0]["metrics"]
    assert lines[1].split()[:4] == ["looks", "0", "%", "swapped"]
    assert lines[1].split()[-1] == f"{figures['rouge_l']['value']:.3f}"
    assert lines[2].split()[-1].split("–")[0] == f"{figures['rouge_l']['interval'][0]:.3f}".removeprefix("0")
    # The ends of the columns stand below each other.
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


def test_what_is_missing_is_said(evaluation):
    without = copy.deepcopy(evaluation) | {"skipped": {"spice": "no parser", "spider": "no parser"}}
    for text in (as_text(without), as_markdown(without)):
        assert "without spice, spider: no parser" in text
    for entry in without["checkpoints"].values():
        for condition in entry["conditions"]:
            condition["metrics"] = {}
    assert "Gate and entropy" in as_markdown(without)
    assert "looks  50 % swapped" in as_text(without)


def test_the_card_of_a_model_shows_its_results(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "out")
    for source in (tmp_path / "out" / "evaluation.json", tmp_path / "out" / "cards" / "looks" / "evaluation.json"):
        model = tmp_path / f"model-{source.parent.name}"
        shutil.copytree(evacap.TINY, model)
        shutil.copy(source, model)
        card = str(fill_model_card(model, "org/name"))
        value = evaluation["checkpoints"]["looks"]["conditions"][0]["metrics"]["rouge_l"]["value"]
        assert "| six clips | B1 | B2 | B3 | B4 | ROUGE-L |" in card
        assert f"{value:.3f}" in card and "org/six" in card
        assert "| 100 % of the videos swapped |" in card and "| no video |" in card


def test_files_and_plots(evaluation, tmp_path):
    pytest.importorskip("matplotlib")
    files = write_report(evaluation, tmp_path, procedural, samples=2)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(evaluation))
    names = ["shuffle_metrics", "shuffle_naming", "frames_metrics", "frames_naming", "gate_histograms"]
    names += ["sample_1", "sample_2"]
    assert {file.name for file in files if file.suffix == ".png"} == {f"{name}.png" for name in names}
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == sorted(files)
    markdown = (tmp_path / "evaluation.md").read_text()
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert pixels.std() > 10 and pixels.shape[1] > 500
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f"]({name}.png)" in markdown


def test_plots_show_the_figures(evaluation):
    pytest.importorskip("matplotlib")
    figure = make_plots(evaluation)["shuffle_metrics"]
    axes = next(axes for axes in figure.axes if axes.get_title() == "ROUGE-L")
    for container, name in zip(axes.containers, ("looks", "listens"), strict=True):
        conditions = evaluation["checkpoints"][name]["conditions"][:3]
        assert container.get_label() == name
        assert list(container.lines[0].get_ydata()) == [c["metrics"]["rouge_l"]["value"] for c in conditions]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0 %", "50 %", "100 %"]
    sample = make_sample_plots(evaluation, procedural, 1)["sample_1"]
    own, other = (c["clips"][0] for c in (evaluation["checkpoints"]["looks"]["conditions"][i] for i in (0, 2)))
    gate = next(axes for axes in sample.axes if axes.get_ylabel() == "gate")
    for line, clip in zip(gate.lines, (own, other), strict=True):
        assert list(line.get_ydata()) == clip["gate_over_time"]
    strips = [axes.images[0].get_array() for axes in sample.axes[:2]]
    assert strips[0].shape == strips[1].shape and (strips[0] != strips[1]).any()


def test_the_transport_plans_of_sample_clips(tmp_path):
    pytest.importorskip("matplotlib")
    save_untrained_model("lavcap", tmp_path / "model")
    result = evaluate(
        {"aligns": tmp_path / "model"},
        procedural,
        tmp_path / "evaluation",
        "six clips",
        shares=(1,),
        frames=(),
        num_beams=1,
        metrics=("rouge_l",),
        resamples=10,
    )
    plots = make_sample_plots(result, procedural, 2)
    assert list(plots) == ["transport_1", "transport_2"]
    maps = [axes.images[0].get_array() for axes in plots["transport_1"].axes]
    # Tubelets, and time steps of the sound.
    assert [plan.shape for plan in maps] == [(4, 16)] * 2 and (maps[0] != maps[1]).any()
    assert all(plan.sum() == pytest.approx(1, abs=1e-4) for plan in maps)


def test_there_is_nothing_to_plot_of_one_condition(evaluation):
    pytest.importorskip("matplotlib")
    entry = evaluation["checkpoints"]["listens"]
    single = {**evaluation, "checkpoints": {"listens": {**entry, "conditions": entry["conditions"][:1]}}}
    assert make_plots(single) == {} and make_sample_plots(single, procedural) == {}


def test_without_matplotlib_there_are_tables(evaluation, tmp_path):
    (tmp_path / "in.json").write_text(json.dumps(evaluation))
    code = """
import json, sys
sys.modules["matplotlib"] = None
from evacap.training.evaluation.plots import has_matplotlib
from evacap.training.evaluation.report import write_report
assert not has_matplotlib()
print(*(file.name for file in write_report(json.load(open("in.json")), "out")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["evaluation.json", "evaluation.md", "evaluation.json", "evaluation.json"], (
        done.stderr
    )
