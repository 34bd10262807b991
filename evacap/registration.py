"""Registration of EVACap with the Auto classes and pipelines of Transformers, delayed until these are imported."""

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


# Every Auto class and `pipeline` import the first. The others are ours: only after registration does their
# `save_pretrained` also save the code.
_AWAITED = (
    "transformers.models.auto.configuration_auto",
    "evacap.modeling_evacap.configuration_evacap",
    "evacap.processing.feature_extraction_evacap",
    "evacap.processing.video_processing_evacap",
)
_WATCHED = ("transformers.", "evacap.")


def register() -> None:
    """Registers all classes and the task of the pipeline with Transformers. Further calls change nothing."""
    from transformers import (
        AutoConfig,
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForSeq2SeqLM,
        AutoProcessor,
        AutoTokenizer,
        AutoVideoProcessor,
        BertTokenizer,
    )
    from transformers.pipelines import PIPELINE_REGISTRY

    from . import TASK
    from .modeling_evacap.configuration_evacap import EVACapConfig
    from .modeling_evacap.language_model_evacap import EVACapForCausalLM
    from .modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
    from .processing.feature_extraction_evacap import EVACapFeatureExtractor
    from .processing.pipeline_evacap import AudioVisualCaptioningPipeline
    from .processing.processing_evacap import EVACapProcessor
    from .processing.video_processing_evacap import EVACapVideoProcessor

    AutoConfig.register(EVACapConfig.model_type, EVACapConfig, exist_ok=True)
    # Of several classes the one that `architectures` names, or else the first.
    AutoModel.register(EVACapConfig, (EVACapForConditionalGeneration, EVACapForCausalLM), exist_ok=True)
    AutoModelForSeq2SeqLM.register(EVACapConfig, EVACapForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(EVACapConfig, EVACapProcessor, exist_ok=True)
    AutoFeatureExtractor.register(EVACapConfig, EVACapFeatureExtractor, exist_ok=True)
    AutoVideoProcessor.register(EVACapConfig, EVACapVideoProcessor, exist_ok=True)
    AutoTokenizer.register(EVACapConfig, BertTokenizer, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=AudioVisualCaptioningPipeline, pt_model=AutoModel, type="multimodal"
        )
    # Saved folders carry their code, so that they load without this package.
    EVACapConfig.register_for_auto_class()
    EVACapForConditionalGeneration.register_for_auto_class("AutoModel")
    EVACapForCausalLM.register_for_auto_class("AutoModel")
    EVACapProcessor.register_for_auto_class("AutoProcessor")
    EVACapFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
    EVACapVideoProcessor.register_for_auto_class("AutoVideoProcessor")


def register_when_needed() -> None:
    """Registers now if a module that needs it is already imported, otherwise right after such an import.

    Registering at once would import torch and the whole model with every `import evacap`. The lazy tables of
    Transformers only take its own models, and change between versions. So a hook of the import system chooses the
    moment.
    """
    if not _register_if_awaited():
        sys.meta_path.insert(0, _Watcher())


def _register_if_awaited() -> bool:
    awaited = any(name in sys.modules for name in _AWAITED)
    if awaited:
        register()
    return awaited


class _Watcher:
    """An import hook that registers after the outermost import, when no module is half imported."""

    def __init__(self):
        self.local = threading.local()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(_WATCHED) or getattr(self.local, "finding", None) == name:
            return None
        self.local.finding = name
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.local.finding = None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    @contextmanager
    def importing(self) -> Iterator[None]:
        depth = getattr(self.local, "depth", 0)
        self.local.depth = depth + 1
        try:
            yield
            if depth == 0 and _register_if_awaited() and self in sys.meta_path:
                sys.meta_path.remove(self)
        finally:
            self.local.depth = depth


class _Loader:
    """Wraps the loader of a module and tells the watcher when it is done."""

    def __init__(self, loader: Any, watcher: _Watcher):
        self.loader, self.watcher = loader, watcher

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        with self.watcher.importing():
            self.loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
