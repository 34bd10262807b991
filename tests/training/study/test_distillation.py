"""The second stage of DALI: captions written with the picture in view teach the captioner of the sound alone."""

import json

import torch
from safetensors.torch import load_file
from training_runs import forget_accelerator, run, write_config

from evacap.training.run_config import load_run_config
from evacap.training.study.distillation import DistillationRun
from evacap.training.train import train


def test_only_the_projection_learns_from_the_captions_of_both_streams(tmp_path):
    pictures = {"model": {"preset": "video-only"}, "data": {"p_mix": 0}, "optimization": {"max_steps": 1}}
    assert run(write_config(tmp_path / "teacher.yaml", pictures)) == 0
    aligned = {
        "model": {"preset": "audio-only"},
        "alignment": {"teacher": str(tmp_path / "teacher" / "model"), "loss": "contrast"},
    }
    assert run(write_config(tmp_path / "align.yaml", pictures, aligned)) == 0
    changes = {
        "model": {
            "preset": "audio-only",
            "start": str(tmp_path / "align" / "model"),
            "freeze": ["*"],
            "freeze_except": ["model.decoder.prefix_projection.*"],
        },
        "data": {"p_mix": 0, "procedural": 8},
        "optimization": {"epochs": 2},
    }
    config = load_run_config(write_config(tmp_path / "distilled.yaml", changes))
    forget_accelerator()
    distillation = DistillationRun(config)
    lines = (tmp_path / "distilled" / "captions" / "late_concat" / "captions-0.jsonl").read_text().splitlines()
    written = {line["clip"]: line["text"] for line in map(json.loads, lines)}
    assert len(written) == len(distillation.clips) == 8
    processor = distillation.clips.processor
    for index, caption in enumerate(written[f"train-0-{index:06d}"] for index in range(8)):
        assert torch.equal(
            torch.as_tensor(distillation.clips[index]["labels"]),
            torch.as_tensor(processor(text=caption)["labels"][0]),
        )
    forget_accelerator()
    assert train(config, DistillationRun) == 0
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("align", "distilled"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {f"model.decoder.prefix_projection.{part}" for part in ("weight", "bias")}
