"""Configurations of training runs that take seconds."""

import json
from pathlib import Path
from typing import Any

import yaml
from accelerate.state import AcceleratorState, GradientState

from evacap.modeling_evacap.presets import get_preset
from evacap.training.run_config import load_run_config
from evacap.training.train import train


SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# 40,000 parameters, most of them tables, with dropout; five seconds of sound in 64 frames, two pictures of 32 pixels.
SMALL = {
    "base": "tiny",
    "model": {
        "processing": {"frame_shift_ms": 80},
        "config": {
            "audio_config": {**SIZE, "num_mel_bins": 32, "max_frames": 64},
            "video_config": {**SIZE, "num_frames": 2, "image_size": 32},
            "text_config": SIZE,
        },
    },
    "data": {"procedural": 24, "p_mix": 0.3},
    "optimization": {"epochs": 2, "batch_size": 4, "warmup_epochs": 0.5},
    "validation": {"every_steps": None},
    "saving": {"every_steps": 4, "code": False},
    "logging": {"every_steps": 1, "trackers": []},
    "resources": {"mixed_precision": "no", "cpu": True, "num_workers": 0, "num_threads": None},
}


def write_config(path: Path, *changes: dict[str, Any]) -> Path:
    """Writes a small run with `changes` to a YAML file; its output is the folder of the same name."""
    values = {**SMALL, "output": str(path.with_suffix(""))}
    for change in changes:
        values = merge(values, change)
    path.write_text(yaml.safe_dump(values))
    return path


def merge(values: dict, changes: dict) -> dict:
    merged = dict(values)
    for key, value in changes.items():
        inner = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if inner else value
    return merged


def forget_accelerator() -> None:
    """Accelerate keeps its settings as long as a process lives; a run has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(config: str | Path, *overrides: str) -> int:
    """Trains in this process."""
    forget_accelerator()
    return train(load_run_config(config, overrides))


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def sum_of_objectives(line: dict[str, float]) -> float:
    """The loss of a run with the preset `evacap-caste-losses`, from its terms in a line of its log."""
    config = get_preset("evacap-caste-losses").config()
    terms = {
        "matching_loss": config.matching_weight,
        "heard_words": config.hearing_weight,
        "caption_contrast": config.caption_contrast_weight,
        "picture_entropy": config.entropy_weight,
    }
    return line["caption_loss"] + sum(weight * line[name] for name, weight in terms.items())
