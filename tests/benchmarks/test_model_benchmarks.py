"""The benchmarks of the model run from their command line to their files, at a size that tells nothing of speed."""

import json

import pytest
import torch

from benchmarks import agreement, beams, compiling, exported, fusion, latency, quantization, training, video_tower
from benchmarks.models import make_config, make_inputs, make_model


def run(benchmark, folder, *options: str) -> list[dict]:
    output = folder / "figures.json"
    benchmark.main(["--size", "small", "--device", "cpu", "--output", str(output), *options])
    assert output.with_suffix(".md").read_text().count("|") > 20
    return json.loads(output.read_text())["rows"]


LATENCY = ("--frames", "0", "4", "--batch", "1", "--beams", "1", "2", "--new-tokens", "4", "--repeats", "1")


def test_latency(tmp_path):
    rows = run(latency, tmp_path, *LATENCY, "--no-memory", "--dtypes", "float32", "--variants", "evacap", "avcap")
    assert len(rows) == 8 and (tmp_path / "figures.png").stat().st_size > 0
    assert all(row["ratio"] > 0 and row["seconds"]["total"]["repeats"] >= 1 for row in rows)

    # What is there stays as it is, and what is missing is added.
    options = ("--no-memory", "--dtypes", "float32", "--recomputed-tokens", "2")
    more = run(latency, tmp_path, *LATENCY, *options, "--variants", "evacap", "avcap", "avcap-recomputed")
    assert more[:8] == rows
    assert {(row["variant"], row["beams"], row["measured_tokens"]) for row in more[8:]} == {("avcap-recomputed", 2, 2)}
    assert "avcap-recomputed (2 steps scaled)" in (tmp_path / "figures.md").read_text()


@pytest.mark.slow
def test_latency_with_memory(tmp_path):
    rows = run(latency, tmp_path, *LATENCY)
    assert all(row["peak_bytes"] >= 0 for row in rows if row["variant"] != "avcap-recomputed")


def test_recomputing_decodes_the_same_tokens():
    """Without a cache and with a prefix for every beam, the model says what it says with both."""
    model = make_model(make_config("avcap", 4, "small"))
    with torch.no_grad():
        encoded = model.get_encoder()(**make_inputs(model.config, 1, 4))
        cached = model.generate(encoder_outputs=encoded, min_new_tokens=5, max_new_tokens=5, output_logits=True)
        asked = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: asked.append(kwargs["decoder_input_ids"]), with_kwargs=True
        )
        steps = latency.recompute(model, encoded, beams=2, tokens=6, device="cpu")
        hook.remove()
    assert len(steps) == 6
    assert torch.equal(asked[-1], cached.expand(2, -1))


@pytest.mark.parametrize("frames", [2, 8])
def test_plain_fusion_is_the_module(frames):
    calls = fusion.fusion_calls("small", "float32", 2, frames, False, "cpu")
    for ours, theirs in zip(calls["module"](), calls["plain"]()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_video_tower(tmp_path):
    rows = run(video_tower, tmp_path, "--frames", "2", "8", "--dtypes", "float32", "--repeats", "1")
    operations = {(row["attention"], row["frames"]): row["flops"] for row in rows}
    assert operations["frame", 8] == 4 * operations["frame", 2]
    assert operations["full", 8] > 4 * operations["full", 2]


@pytest.mark.slow
def test_fusion(tmp_path):
    rows = run(fusion, tmp_path, "--frames", "4", "--repeats", "1")
    assert {(row["dtype"], row["backward"], row["way"]) for row in rows} == {
        (dtype, backward, way)
        for dtype in ("float32", "bfloat16")
        for backward in (False, True)
        for way in ("module", "plain")
    }
    assert all(row["difference"] < (1e-5 if row["dtype"] == "float32" else 0.05) for row in rows)


@pytest.mark.slow
def test_the_agreement_gate_is_cheap(tmp_path, capsys):
    # Operations are counted, so that the bound can be one: 5 % of a training step, 3 % of the encoder.
    agreement.main(["--no-time", "--output", str(tmp_path / "new" / "agreement.json")])
    rows = json.loads((tmp_path / "new" / "agreement.json").read_text())["rows"]
    assert [(row[0], 1 < float(row[3]) < bound) for row, bound in zip(rows, (1.05, 1.03))] == [
        ("training step", True),
        ("encoder", True),
    ]
    assert "| training step |" in capsys.readouterr().out


def test_beams(tmp_path):
    rows = run(beams, tmp_path, "--batch", "2", "--frames", "2", "--beams", "1", "3")
    prefixes = {(row["variant"], row["beams"]): row["prefix_bytes"] for row in rows}
    assert prefixes["evacap", 1] == prefixes["evacap", 3] < prefixes["avcap", 1]


@pytest.mark.slow
def test_compiling(tmp_path):
    options = ("--frames", "2", "--dtypes", "float32", "--beams", "1", "2", "--repeats", "1", "--new-tokens", "4")
    rows = run(compiling, tmp_path, *options)
    graphs = {(row["beams"], row["part"], row["way"]): row["graphs"] for row in rows}
    assert all(graphs[number, "encoder", "compiled"] == 1 for number in (1, 2))
    assert all(graphs[number, "decoding", "static cache, compiled"] == 2 for number in (1, 2))
    assert all(row["graphs_of_later_clips"] == 0 for row in rows)


@pytest.mark.slow
def test_training(tmp_path):
    options = ("--frames", "4", "--batch", "2", "--variants", "evacap", "--attentions", "sdpa")
    rows = run(training, tmp_path, *options)
    assert [row["checkpointing"] for row in rows] == [False, True]
    assert all(row["part"] == 2 and row["step_seconds"]["median"] > 0 and row["flops"] > 0 for row in rows)
    assert all(0 <= row["wait_share"] < 1 for row in rows)


@pytest.mark.slow
def test_quantization(tmp_path):
    rows = run(quantization, tmp_path, "--frames", "4", "--batch", "2", "--clips", "4", "--repeats", "1")
    assert {row["way"] for row in rows} == set(quantization.WAYS)
    assert all(row["weight_bytes"] < rows[0]["weight_bytes"] and row["equal_captions"] >= 2 for row in rows[1:])


@pytest.mark.slow
def test_exported(tmp_path):
    rows = run(exported, tmp_path, "--frames", "4", "--batch", "2", "--repeats", "1")
    assert len(rows) == 3 and all(row["seconds"]["median"] > 0 for row in rows)
