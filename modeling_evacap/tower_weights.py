"""Weights of CED and CLIP for the towers of LAVCap.

Take CED from its port to Transformers (Apache-2.0, such as `mispeech/ced-base`); the original repository is GPL-3.0. CLIP is
under the MIT licence.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .checkpoint_reader import read_checkpoint
from .configuration_evacap import EVACapCEDConfig, EVACapCLIPConfig
from .import_weights import errors_alone
from .modeling_evacap import EVACapCEDTower, EVACapCLIPTower


_CED_NAMES = (
    (r"init_bn\.(?:1\.)?(\w+)", r"embeddings.input_norm.\1"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.\1"),
    (r"time_pos_embed", "embeddings.time_embeddings"),
    (r"freq_pos_embed", "embeddings.frequency_embeddings"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"layers.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"layers.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.(qkv|[qkv]_proj)\.(\w+)", r"layers.\1.self_attn.\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"layers.\1.self_attn.o_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"layers.\1.mlp.\2.\3"),
    (r"norm\.(\w+)", r"layernorm.\1"),
)
# The tagging head and the filterbank of CED.
_CED_UNUSED = r"output_?layer\..+|front_end\..+"


def ced_state(state: dict[str, torch.Tensor], num_steps: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights of [`EVACapCEDTower`] from those of CED, of its port to Transformers, or of LAVCap.

    Args:
        state (`dict`): The tensors, by their names.
        num_steps (`int`): Time steps of the tower; a shorter table is stretched, a longer one is cut (LAVCap).

    Returns:
        The weights, and the names of tensors that the tower does not use.

    Raises:
        ValueError: If a tensor is unknown.
    """
    converted, unused = {}, []
    for name, tensor in state.items():
        short = name.removeprefix("encoder.")
        if re.fullmatch(_CED_UNUSED, short):
            unused.append(name)
            continue
        for pattern, replacement in _CED_NAMES:
            match = re.fullmatch(pattern, short)
            if match:
                break
        else:
            raise ValueError(f"{name} is not a tensor of CED.")
        target = match.expand(replacement)
        if ".qkv." in target:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                converted[target.replace(".qkv.", f".{part}_proj.")] = rows
        elif short == "time_pos_embed":
            if tensor.shape[3] < num_steps:
                tensor = F.interpolate(tensor, size=(1, num_steps), mode="bilinear", align_corners=False)
            converted[target] = tensor[0, :, 0, :num_steps].T.contiguous()
        elif short == "freq_pos_embed":
            converted[target] = tensor[0, :, :, 0].T.contiguous()
        else:
            converted[target] = tensor
    return converted, unused


def load_ced(folder: str | os.PathLike, max_frames: int = 1024) -> EVACapCEDTower:
    """The audio tower from a folder of CED's port to Transformers.

    Args:
        folder (`str` or `os.PathLike`): It has `config.json` and `model.safetensors` or `pytorch_model.bin`.
        max_frames (`int`, *optional*, defaults to 1024): Filterbank frames; the table of positions is stretched (LAVCap).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is not a CED.
    """
    folder = Path(folder)
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: has no config.json, or neither model.safetensors nor pytorch_model.bin. Give a downloaded folder of "
            "CED for Transformers, such as mispeech/ced-base."
        )
    values, _ = EVACapCEDConfig.get_config_dict(folder)
    if values.get("model_type") != EVACapCEDConfig.model_type:
        raise ValueError(f"{folder}: `model_type` is {values.get('model_type')!r}, but 'ced' was expected.")
    known = {*EVACapCEDConfig().to_dict(), *EVACapCEDConfig.attribute_map} - {"target_length", "max_frames"}
    config = EVACapCEDConfig(**{name: value for name, value in values.items() if name in known}, max_frames=max_frames)
    tower = EVACapCEDTower(config)
    try:
        state, _ = ced_state(read_checkpoint(files[0]), tower.embeddings.num_steps)
        tower.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{files[0]}: not the weights of this CED: {error}") from error
    return tower


def load_clip(name: str | os.PathLike, num_frames: int = 20) -> EVACapCLIPTower:
    """The video tower from a CLIP for Transformers: its vision model and the projection of it.

    Args:
        name (`str` or `os.PathLike`): A folder or a name on the Hub, such as `openai/clip-vit-large-patch14`.
        num_frames (`int`, *optional*, defaults to 20): Frames of a clip.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If weights are missing.
    """
    values: dict[str, Any] = CLIPVisionConfig.from_pretrained(name).to_dict()
    # It would warn of the text model, which is not needed.
    with errors_alone():
        vision, loading = CLIPVisionModelWithProjection.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    if loading["missing_keys"]:
        raise ValueError(f"{name}: not a whole CLIP: it lacks {', '.join(sorted(loading['missing_keys'])[:5])}.")
    values |= {"projection_dim": vision.config.projection_dim, "num_frames": num_frames}
    tower = EVACapCLIPTower(EVACapCLIPConfig(**values))
    tower.clip.load_state_dict(vision.state_dict())
    return tower
