"""What judgements of one captioner have in common: how they load it, and their command."""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig

from ...modeling_evacap.modeling_evacap import EVACapCaptioner
from ...processing.processing_evacap import EVACapProcessor


def load_captioner(
    checkpoint: str | os.PathLike, require: Callable[[PreTrainedConfig], None]
) -> tuple[EVACapCaptioner, EVACapProcessor]:
    """Loads a captioner in evaluation mode, on the accelerator if there is one, and its processor.

    Args:
        checkpoint (`str` or `os.PathLike`): A model folder with its processor.
        require (`Callable`): Raises a `ValueError` for a configuration that cannot be judged.
    """
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=False).eval()
    require(model.config)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return model.to(device), EVACapProcessor.from_pretrained(checkpoint)


def print_judgement(
    judge: Callable[[str, int], Any], module: str, description: str, needed: str, arguments: list[str] | None
) -> None:
    """Prints, as JSON, what `judge` says of the captioner and the number of clips that the command line names.

    Args:
        judge (`Callable`): Takes a model folder and a number of clips.
        module (`str`): The module of the command.
        description (`str`): What the command does.
        needed (`str`): The setting of a captioner that it takes.
        arguments (`list[str]`, *optional*): Instead of the command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m evacap.training.study.{module}", description=description)
    parser.add_argument("model", metavar="MODEL", help=f"folder of a captioner with {needed}")
    parser.add_argument("--num-clips", type=int, default=500, help="number of test clips (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(json.dumps(judge(options.model, options.num_clips), indent=1))
