"""
EVACap: audio-visual captioning for Transformers that does not get fooled when sound and picture disagree.

Importing the package registers its classes with Transformers: afterwards `AutoConfig`, `AutoModel` (which loads the
captioner), `AutoProcessor` and its parts, and `pipeline("audio-visual-captioning", model=…)` know EVACap.
"""

import importlib
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    BertTokenizer,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling_evacap.configuration_evacap import (
    EVACapAudioConfig,
    EVACapConfig,
    EVACapTextConfig,
    EVACapVideoConfig,
)
from .modeling_evacap.modeling_evacap import EVACapForConditionalGeneration, EVACapModel, EVACapPreTrainedModel
from .processing.feature_extraction_evacap import EVACapFeatureExtractor
from .processing.pipeline_evacap import AudioVisualCaptioningPipeline
from .processing.processing_evacap import EVACapProcessor
from .processing.video_processing_evacap import EVACapVideoProcessor


__version__ = "0.1.0"

TASK = "audio-visual-captioning"

TINY = str(Path(__file__).with_name("tiny"))
"""Folder of the bundled checkpoint: a small EVACap trained on procedural clips, for trying and testing."""

# Imported when they are first asked for: training needs more than captioning does.
_LAZY = {"EVACapDataCollator": "training.collator", "import_weights": "commands.import_weights"}

__all__ = [
    "TASK",
    "TINY",
    "AudioVisualCaptioningPipeline",
    "EVACapAudioConfig",
    "EVACapConfig",
    "EVACapFeatureExtractor",
    "EVACapForConditionalGeneration",
    "EVACapModel",
    "EVACapPreTrainedModel",
    "EVACapProcessor",
    "EVACapTextConfig",
    "EVACapVideoConfig",
    "EVACapVideoProcessor",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    AutoConfig.register(EVACapConfig.model_type, EVACapConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForSeq2SeqLM, AutoModelForMultimodalLM):
        auto_class.register(EVACapConfig, EVACapForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(EVACapConfig, EVACapProcessor, exist_ok=True)
    AutoFeatureExtractor.register(EVACapConfig, EVACapFeatureExtractor, exist_ok=True)
    AutoVideoProcessor.register(EVACapConfig, EVACapVideoProcessor, exist_ok=True)
    AutoTokenizer.register(EVACapConfig, BertTokenizer, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=AudioVisualCaptioningPipeline, pt_model=AutoModel, type="multimodal"
        )
    # What is saved carries its code, so that it loads where this package is not installed.
    EVACapConfig.register_for_auto_class()
    EVACapForConditionalGeneration.register_for_auto_class("AutoModel")
    EVACapProcessor.register_for_auto_class("AutoProcessor")
    EVACapFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
    EVACapVideoProcessor.register_for_auto_class("AutoVideoProcessor")


_register()
