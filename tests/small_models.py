"""Untrained models of the study's size, for tests."""

from pathlib import Path

import torch

from evacap.training.components import make_model, make_processor_and_config
from evacap.training.run_config import load_run_config


def save_untrained_model(preset: str, path: Path) -> None:
    """Saves an untrained captioner of a preset, at the size of the study, with its processor."""
    section = load_run_config("study/tiny", (f"model.preset={preset}",)).model
    processor, config = make_processor_and_config(section)
    torch.manual_seed(0)
    make_model(section, config).save_pretrained(path)
    processor.save_pretrained(path)
