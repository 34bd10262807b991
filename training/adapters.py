"""Low-rank adapters (LoRA, by `peft`) in a model that is trained, and their merging into its weights."""

from typing import Any

import torch
from torch import nn

from .run_config import LoraSection


def add_adapters(model: nn.Module, section: LoraSection) -> None:
    """Puts adapters into a model. All of its parameters stay trainable; `model.freeze` says which are not.

    Args:
        model (`nn.Module`): The model, which is changed.
        section ([`LoraSection`]): Size and places of the adapters.

    Raises:
        ImportError: If `peft` is not installed.
        ValueError: If `target_modules` fits no module.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("`model.lora` needs peft: pip install 'evacap[lora]'") from error
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    config = LoraConfig(
        r=section.r, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=section.target_modules
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"`model.lora.target_modules` is {section.target_modules!r}: {error}") from error
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name or name.replace(".base_layer.", ".") in trained)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters."""
    return any("lora_" in name for name, _ in model.named_modules())


def merged(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of the model without adapters, with what they add to its weights.

    Args:
        model (`nn.Module`): A model with adapters.
        state (`dict`): Its whole state dict, which stays as it is.
    """
    result = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if f"{name}.lora_A.default.weight" in state:
            down, up = (state[f"{name}.lora_{part}.default.weight"] for part in "AB")
            change = torch.matmul(up.float(), down.float()) * module.scaling["default"]
            weight = result[f"{name}.weight"]
            # Layers of GPT-2 hold their weights transposed.
            change = change.T if getattr(module, "fan_in_fan_out", False) else change
            result[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return result
