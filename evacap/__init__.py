"""EVACap: audio-visual captioning for Transformers that is seldom fooled when sound and picture disagree.

Importing the package makes its classes known to Transformers: `AutoConfig`, `AutoModel` (which loads the captioner),
`AutoProcessor` and its parts, and `pipeline("audio-visual-captioning", model=…)` load EVACap, whichever is imported first.
The names below are imported when they are first asked for.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .modeling_evacap.versions_evacap import warn_if_untested
from .registration import register_when_needed


if TYPE_CHECKING:
    from .caption_files import write_captions
    from .commands.import_weights import import_weights
    from .modeling_evacap.configuration_evacap import (
        EVACapAudioConfig,
        EVACapConfig,
        EVACapTextConfig,
        EVACapVideoConfig,
    )
    from .modeling_evacap.language_model_evacap import EVACapForCausalLM
    from .modeling_evacap.modeling_evacap import EVACapForConditionalGeneration, EVACapModel, EVACapPreTrainedModel
    from .processing.feature_extraction_evacap import EVACapFeatureExtractor
    from .processing.pipeline_evacap import AudioVisualCaptioningPipeline
    from .processing.processing_evacap import EVACapProcessor
    from .processing.video_processing_evacap import EVACapVideoProcessor
    from .training.collator import EVACapDataCollator

__version__ = "0.1.0"

TASK = "audio-visual-captioning"

TINY = str(Path(__file__).with_name("tiny"))
"""Folder of the bundled checkpoint: a small EVACap trained on procedural clips, for trying and testing."""

_MODULES = {
    "caption_files": ["write_captions"],
    "commands.import_weights": ["import_weights"],
    "modeling_evacap.configuration_evacap": [
        "EVACapAudioConfig",
        "EVACapConfig",
        "EVACapTextConfig",
        "EVACapVideoConfig",
    ],
    "modeling_evacap.language_model_evacap": ["EVACapForCausalLM"],
    "modeling_evacap.modeling_evacap": ["EVACapForConditionalGeneration", "EVACapModel", "EVACapPreTrainedModel"],
    "processing.feature_extraction_evacap": ["EVACapFeatureExtractor"],
    "processing.pipeline_evacap": ["AudioVisualCaptioningPipeline"],
    "processing.processing_evacap": ["EVACapProcessor"],
    "processing.video_processing_evacap": ["EVACapVideoProcessor"],
    "training.data.collator": ["EVACapDataCollator"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "TASK",
    "TINY",
    "AudioVisualCaptioningPipeline",
    "EVACapAudioConfig",
    "EVACapConfig",
    "EVACapDataCollator",
    "EVACapFeatureExtractor",
    "EVACapForCausalLM",
    "EVACapForConditionalGeneration",
    "EVACapModel",
    "EVACapPreTrainedModel",
    "EVACapProcessor",
    "EVACapTextConfig",
    "EVACapVideoConfig",
    "EVACapVideoProcessor",
    "import_weights",
    "write_captions",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_if_untested()
register_when_needed()
