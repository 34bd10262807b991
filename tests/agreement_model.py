"""A model with an agreement gate, for tests."""

from pathlib import Path

import torch

import evacap


def save_agreement_model(path: Path) -> None:
    """Saves the bundled checkpoint with a head that says 0.88 of every picture."""
    model = evacap.EVACapForConditionalGeneration.from_pretrained(evacap.TINY)
    model.config.agreement_temperature, model.config.agreement_threshold = 1.0, 0.5
    head = model.model.encoder.matching_head
    with torch.no_grad():
        for layer in (head.clip_out, head.step_out):
            layer.weight.zero_()
            layer.bias.fill_(2.0)
    model.save_pretrained(path)
    evacap.EVACapProcessor.from_pretrained(evacap.TINY).save_pretrained(path)
