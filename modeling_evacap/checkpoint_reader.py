"""Reading of checkpoint files of other projects, without running code that they may contain."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net")
_PREFIXES = ("module.", "_orig_mod.")


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads a state dict. The file stays memory-mapped if its format allows it.

    Args:
        path (`str` or `os.PathLike`): A `.safetensors` file, or a file from `torch.save` with a state dict or with a
            dict that has one under `"model"`, `"state_dict"` or the like.

    Returns:
        `dict[str, torch.Tensor]`: The tensors, by names without the prefix of a parallel or compiled wrapper
        (`module.`, `_orig_mod.`).

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a checkpoint, if it has objects other than tensors, or more than one state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. Give the path of a .pth, .pt or .safetensors file.")
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error}). Is the download complete?") from error
    else:
        state = _find_state_dict(path, _load_tensors_only(path))
    if not state:
        raise ValueError(f"{path}: it holds no tensors, but a state dict was expected.")
    for prefix in _PREFIXES:
        while all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _load_tensors_only(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        if found is None:
            raise ValueError(f"{path}: not a file that `torch.save` wrote. Is the download complete?") from error
        raise ValueError(
            f"{path}: refused, as it holds pickled Python objects ({found[1]}) beside its tensors and loading those "
            "could run any code. Have its author save the tensors alone: torch.save(model.state_dict(), path)."
        ) from error
    except Exception as error:
        # For a damaged file, the unpickler and the archive reader raise errors without a common type.
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path}: not a file that `torch.save` wrote ({reason[0] if reason else 'it ends too early'}). Is the "
            "download complete?"
        ) from error


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(item, torch.Tensor) for name, item in value.items())
    )


def _find_state_dict(path: Path, content: Any) -> dict[str, torch.Tensor]:
    if _is_state_dict(content):
        return content
    candidates = (
        {key: value for key, value in content.items() if _is_state_dict(value)} if isinstance(content, dict) else {}
    )
    for key in _WRAPPERS:
        if key in candidates:
            return candidates[key]
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    found = ", ".join(map(repr, content)) if isinstance(content, dict) else type(content).__name__
    raise ValueError(
        f"{path}: it holds {found}, but a dict of tensors was expected, or a dict with one under "
        f"{', '.join(map(repr, _WRAPPERS))}."
    )
