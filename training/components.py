"""The components of a run, made from its configuration: processor, model, clips and collators."""

import difflib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..modeling_evacap.configuration_evacap import EVACapConfig
from ..modeling_evacap.language_model_evacap import captioner_class
from ..modeling_evacap.modeling_evacap import EVACapCaptioner
from ..modeling_evacap.presets import get_preset
from ..processing.model_processor import load_processor, load_tokenizer, loading, make_processor
from ..processing.processing_evacap import EVACapProcessor
from .adapters import add_adapters
from .cores import usable_cores
from .data.augmentation import Augmentation
from .data.collator import EVACapDataCollator
from .data.prepared_clips import PreparedClips, StreamedClips
from .procedural.captions import build_tokenizer
from .procedural.dataset import KeptProceduralClips, ProceduralClips
from .procedural.kinds import KINDS
from .run_config import DataSection, ModelSection, RunConfig


def make_processor_and_config(section: ModelSection) -> tuple[EVACapProcessor, EVACapConfig]:
    """Makes the processor and the configuration of the model to train.

    Raises:
        ValueError: If a field of `model.config` is unknown, or if `model.start` is another variant than
            `model.preset`.
        OSError: If the tokenizer or `model.start` cannot be loaded.
    """
    preset = get_preset(section.preset)
    if section.start is not None:
        with loading(section.start):
            config = EVACapConfig.from_pretrained(section.start)
        # Any variant can be put behind an enrichment, which initially changes nothing, and goes on with it.
        enrichment = {name: value for name, value in section.config.items() if name == "enrichment"}
        found, wanted = EVACapConfig.from_dict(config.to_dict() | enrichment), preset.config(**enrichment)
        if _variant(found) != _variant(wanted):
            advice = "choose the preset that fits"
            if found.enrichment != wanted.enrichment:
                advice += f", or give `model.config.enrichment={found.enrichment or wanted.enrichment}`"
            raise ValueError(
                f"`model.start` {section.start} is {_variant(config)}, but `model.preset` {section.preset!r} is "
                f"{_variant(wanted)}: {advice}, or import the weights with --as {section.preset}."
            )
        config = EVACapConfig.from_dict(_with_fields(config.to_dict(), section.config, "model.config"))
        return load_processor(section.start), config
    if section.tokenizer is None:
        raise ValueError(
            "Give `model.start`, a model folder as `evacap import-weights` makes it, or `model.tokenizer` to begin with "
            "random weights."
        )
    tokenizer = build_tokenizer() if section.tokenizer == "procedural" else load_tokenizer(section.tokenizer)
    text = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    config = preset.config(text_config=text).to_dict()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        config.pop(name)
    config = EVACapConfig.from_dict(_with_fields(config, section.config, "model.config"))
    return make_processor(config, {**preset.processing, **section.processing}, tokenizer), config


def make_model(section: ModelSection, config: EVACapConfig) -> EVACapCaptioner:
    """The model to train, with weights in float32: those of `model.start`, or random ones; with adapters by `model.lora`."""
    model_class = captioner_class(config)
    options = {"attn_implementation": section.attn_implementation, "dtype": torch.float32}
    if section.start is not None:
        with loading(section.start):
            model = model_class.from_pretrained(section.start, config=config, **options)
    else:
        model = model_class._from_config(config, **options)
    if section.lora is not None:
        add_adapters(model, section.lora)
    if section.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Enables gradient checkpointing, whose method has changed its name between versions of Transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def make_clips(
    data: DataSection,
    processor: EVACapProcessor,
    seed: int,
    split: str | None = None,
    augment: bool = True,
    kept_clips: str | None = None,
) -> Dataset:
    """Makes the clips, without augmentation if `augment=False`; procedural ones are kept in the folder `kept_clips`."""
    split = data.split if split is None else split
    if data.procedural is not None:
        if kept_clips is not None:
            return KeptProceduralClips(processor, data.procedural, split, seed, kept_clips, usable_cores())
        return ProceduralClips(processor, data.procedural, split, seed)
    augmentation = None
    if augment and data.augmentation is not None:
        defaults = vars(Augmentation())
        augmentation = Augmentation(**_with_fields(defaults, data.augmentation, "data.augmentation"))
    if data.streamed:
        # A process with one clip more than the others would wait for them forever.
        return StreamedClips(data.prepared, split, processor, augmentation, seed, shuffle=True, even=True)
    return PreparedClips(data.prepared, split, processor, augmentation, seed)


def make_validation_clips(config: RunConfig, processor: EVACapProcessor) -> Dataset:
    """Makes the clips of the validation."""
    section = config.validation
    if section.procedural is not None:
        source = DataSection(procedural=section.procedural)
    else:
        source = DataSection(prepared=section.prepared or config.data.prepared)
    return make_clips(source, processor, config.seed, section.split, augment=False)


def make_collators(config: RunConfig, processor: EVACapProcessor, model_config: EVACapConfig):
    """Makes the collator of the training, which swaps videos, and that of the validation, which does not."""
    video_shape = None
    if processor.modalities != "audio":
        # The other processes wait for the gradients of the video tower, so it also runs for a batch without a picture.
        video = model_config.video_config
        video_shape = (video.num_frames, video.num_channels, video.image_size, video.image_size)
    data = config.data
    training = EVACapDataCollator(
        data.p_mix,
        config.seed,
        keep_matched=model_config.semantic_consistency_weight > 0,
        fixed_points=data.fixed_points,
        whole_batch=data.whole_batch,
        video_shape=video_shape,
    )
    return training, EVACapDataCollator(p_mix=0.0, video_shape=video_shape)


def describe_training(config: RunConfig, num_clips: int) -> dict[str, Any]:
    """The content of `training.json`, from which the model card describes the training data."""
    data = config.data
    if data.procedural is not None:
        source = (
            f"{num_clips:,} procedural clips of 5 s (`python -m evacap.training.procedural.scenes`, seed {config.seed}): "
            f"synthesised sounds of {len(KINDS)} kinds and drawn pictures of their sources. For trying and testing: a "
            "model of them knows these kinds and nothing of real recordings"
        )
    else:
        source = f"{num_clips:,} clips of `{os.path.basename(os.path.normpath(data.prepared))}` (split `{data.split}`)"
    swaps = f"{data.p_mix:.0%} of the videos were those of other clips" if data.p_mix else "no video was swapped"
    if config.alignment is not None:
        teacher = os.path.basename(os.path.normpath(config.alignment.teacher))
        swaps = (
            f"their captions were not read: the encoder of the sound was aligned with the picture's tokens in the captioner "
            f"`{teacher}` by `{config.alignment.loss}`, and joint block and decoder are those of that captioner"
        )
    epochs = config.optimization.epochs
    length = f"{epochs} epochs" if epochs > 1 else "One epoch"
    if config.optimization.max_steps is not None:
        length += f", at most {config.optimization.max_steps:,} steps"
    return {"data": f"{source}. {length}; {swaps}.", "datasets": data.hub_datasets}


def _variant(config: EVACapConfig) -> str:
    parts = {
        "gate": config.gate_type if config.fusion_type == "gated_cross_attention" else None,
        "text fusion": None if config.text_fusion == "prefix" else config.text_fusion,
        "enrichment": config.enrichment,
    }
    named = " and ".join(f"{name} {value}" for name, value in parts.items() if value is not None)
    return f"{config.fusion_type} with {named}" if named else config.fusion_type


def _with_fields(values: Mapping[str, Any], changes: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`values` with `changes`; only existing keys may be changed."""
    result = dict(values)
    for name, change in changes.items():
        if name not in values:
            near = difflib.get_close_matches(name, values, n=3) or sorted(values)
            raise ValueError(
                f"`{key}.{name}` is not a field. Did you mean {' or '.join(f'`{key}.{n}`' for n in near)}?"
            )
        inner = isinstance(change, Mapping) and isinstance(values[name], Mapping)
        result[name] = _with_fields(values[name], change, f"{key}.{name}") if inner else change
    return result
