"""Processor and model configuration of the run configuration `tiny`, for tests and examples."""

import dataclasses
from typing import Any

from transformers import BertTokenizer

from ..modeling_evacap.configuration_evacap import EVACapConfig
from ..processing.processing_evacap import EVACapProcessor
from .components import make_processor_and_config
from .run_config import load_run_config


def tiny_processor(fusion_type: str = "gated_cross_attention") -> EVACapProcessor:
    """The processor of the tiny size: 64 mel bins, 256 frames of 20 ms (5.12 s), 8 pictures of 64 × 64."""
    return _make(fusion_type=fusion_type)[0]


def tiny_config(tokenizer: BertTokenizer, fusion_type: str = "gated_cross_attention", **fields: Any) -> EVACapConfig:
    """The tiny size: about 2.3 million parameters.

    Args:
        tokenizer (`BertTokenizer`): The tokenizer of [`tiny_processor`].
        fusion_type (`str`): See [`EVACapConfig`].
        fields: Other fields of [`EVACapConfig`].
    """
    config = _make(fusion_type=fusion_type, **fields)[1]
    assert config.text_config.vocab_size == len(tokenizer)
    return config


def _make(**fields: Any) -> tuple[EVACapProcessor, EVACapConfig]:
    section = load_run_config("tiny").model
    return make_processor_and_config(dataclasses.replace(section, config={**section.config, **fields}))
