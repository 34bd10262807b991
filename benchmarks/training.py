"""Clips per second and peak memory of one optimisation step, and the time that it waits for its data.

Measured by variant, attention and gradient checkpointing; on a CPU each combination runs in its own process. The data
comes from a data loader as in training. A batch that does not fit in the memory is split into parts, whose gradients
add up to the same step; the table has the size of the parts.
"""

import argparse
import contextlib
import itertools
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import compile_regions
from torch.utils.data import DataLoader, Dataset

from benchmarks import roofline
from benchmarks.measure import (
    Results,
    argument_parser,
    in_own_process,
    markdown,
    peak_bytes,
    product_seconds,
    spread,
    summary,
    synchronize,
)
from benchmarks.models import SIZES, make_config, make_model
from evacap.modeling_evacap.presets import get_preset
from evacap.processing.model_processor import make_processor
from evacap.training.components import enable_checkpointing
from evacap.training.data.collator import EVACapDataCollator
from evacap.training.data.prepared_clips import PreparedClips
from evacap.training.files import write_text
from evacap.training.optimization import make_optimizer
from evacap.training.procedural.captions import build_tokenizer
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.run_config import OptimizationSection


SETTINGS = ("size", "variant", "attention", "checkpointing", "precision", "compiled", "batch", "frames")
# Side of the square matrix product that measures the peak rate of the device.
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}
# One batch of these clips is used for all steps.
DISTINCT_CLIPS = 8


def make_clips(arguments: argparse.Namespace, config, num_clips: int) -> Dataset:
    """Prepared clips if a folder is given, otherwise procedural clips, rendered on access."""
    processor = make_processor(config, get_preset(arguments.variant).processing, build_tokenizer())
    if arguments.prepared is None:
        return ProceduralClips(processor, num_clips)
    return PreparedClips(arguments.prepared, "train", processor)


class Training:
    """A model, its optimiser and its batches; each call of `step` is one optimisation step."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        torch.manual_seed(0)
        transformers.logging.set_verbosity_error()
        self.config = make_config(arguments.variant, arguments.frames, arguments.size)
        self.model = make_model(self.config, device=arguments.device).train()
        self.model.set_attn_implementation(arguments.attention)
        if arguments.checkpointing:
            enable_checkpointing(self.model)
        # Layers of one class and shape share their compiled code: the whole model takes minutes instead.
        self.forward = compile_regions(self.model, dynamic=False) if arguments.compiled else self.model
        self.optimizer = make_optimizer(self.model, OptimizationSection())
        if arguments.one_batch:
            clips = make_clips(arguments, self.config, DISTINCT_CLIPS)
            clips = [clips[index] for index in range(DISTINCT_CLIPS)]
            batch = EVACapDataCollator()([clips[index % DISTINCT_CLIPS] for index in range(arguments.batch)])
            if torch.device(arguments.device).type == "cuda":
                batch = {name: values.pin_memory() for name, values in batch.items()}
            self.batches: Iterator[dict[str, torch.Tensor]] = itertools.repeat(batch)
            return
        # One batch before the first measured wait, then one for each step.
        batches = arguments.warm_ups + arguments.repeats + 1
        clips = make_clips(arguments, self.config, batches * arguments.batch)
        loader = DataLoader(
            clips,
            batch_size=arguments.batch,
            collate_fn=EVACapDataCollator(),
            num_workers=arguments.workers,
            pin_memory=torch.device(arguments.device).type == "cuda",
            # `fork` would copy a process that computes with several threads.
            multiprocessing_context="spawn" if arguments.workers else None,
        )
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step(self, batch: dict[str, torch.Tensor], part: int) -> None:
        """Forward and backward in parts of `part` clips, clipping, and the optimiser's step."""
        device = self.arguments.device
        tokens = (batch["labels"] != -100).sum().item()
        autocast = contextlib.nullcontext()
        if self.arguments.precision == "bfloat16":
            autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
        for start in range(0, self.arguments.batch, part):
            rows = {name: values[start : start + part].to(device, non_blocking=True) for name, values in batch.items()}
            with autocast:
                loss = self.forward(**rows, num_items_in_batch=tokens).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(arguments: argparse.Namespace, part: int) -> dict[str, Any] | None:
    """Measures one combination in this process; `None` if a part of the batch does not fit in the memory."""
    _limit_memory(arguments.device)
    training = Training(arguments)
    batch = next(training.batches)
    waits, steps, peak = [], [], None

    def step() -> None:
        synchronize(arguments.device)
        start = time.perf_counter()
        training.step(batch, part)
        synchronize(arguments.device)
        steps.append(time.perf_counter() - start)

    try:
        for index in range(arguments.warm_ups + arguments.repeats):
            if index == 0:
                # It makes the optimiser's state too.
                peak = peak_bytes(step, arguments.device)
            else:
                step()
            start = time.perf_counter()
            batch = next(training.batches)
            waits.append(time.perf_counter() - start)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        return None
    length = batch["labels"].shape[1]
    waits, steps = waits[arguments.warm_ups :], steps[arguments.warm_ups :]
    return {
        "part": part,
        "step_seconds": summary(steps),
        "wait_share": sum(waits) / (sum(waits) + sum(steps)),
        "peak_bytes": peak,
        "flops": roofline.training_step(training.config, arguments.batch, arguments.frames, length),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
    }


def _limit_memory(device: str) -> None:
    """Makes a step that is too large fail by itself, before the system ends some process for lack of memory."""
    if torch.device(device).type == "cpu" and platform.system() == "Linux":
        import resource

        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * available),) * 2)


def combinations(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The settings to measure."""
    on_cpu = torch.device(arguments.device).type == "cpu"
    for variant, attention, checkpointing, precision, compiled in itertools.product(
        arguments.variants, arguments.attentions, arguments.checkpointings, arguments.precisions, arguments.compile
    ):
        if compiled and (checkpointing or attention == "eager"):
            continue
        if on_cpu and attention == "eager" and checkpointing and not arguments.thorough:
            continue
        yield {
            "size": arguments.size,
            "variant": variant,
            "attention": attention,
            "checkpointing": checkpointing,
            "precision": precision,
            "compiled": compiled,
            "batch": arguments.batch,
            "frames": arguments.frames,
        }


def table(results: Results, device: str) -> str:
    """The measurements in Markdown."""
    rows = []
    for row in results.rows:
        step, rate = row["step_seconds"], row["flops"] / row["step_seconds"]["median"]
        rows.append(
            [
                *(row[name] for name in ("variant", "attention")),
                *("yes" if row[name] else "no" for name in ("checkpointing", "compiled")),
                row["precision"],
                row["part"],
                spread(step),
                f"{row['batch'] / step['median']:.3g}",
                "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['wait_share']:.1%}",
                f"{rate / 1e12:.3g}",
                f"{rate / row['peak_rate']:.0%}",
            ]
        )
    header = ["variant", "attention", "checkpointing", "compiled", "precision", "clips at a time"]
    header += ["step, seconds (least–greatest, runs)", "clips/s", "peak GB beside the weights", "waits for data"]
    header += ["TFLOP/s", "of a large product's rate"]
    return markdown(header, rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("training", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--variants", nargs="+", default=["evacap", "avcap"])
    parser.add_argument("--attentions", nargs="+", choices=("sdpa", "eager"), default=["sdpa", "eager"])
    parser.add_argument("--checkpointing", nargs="+", choices=("no", "yes"), default=["no", "yes"])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), help="bfloat16: autocast")
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), help="with sdpa, without checkpointing")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=18)
    parser.add_argument("--workers", type=int, help="processes that make the data; 1 on a CPU, 8 on CUDA")
    parser.add_argument("--warm-ups", type=int, help="steps before the measured ones; 0 on a CPU, 3 on CUDA")
    parser.add_argument("--prepared", type=Path, help="a folder of `evacap prepare`; procedural clips without it")
    parser.add_argument(
        "--one-batch", action="store_true", help="the same batch in all steps, instead of a data loader's"
    )
    parser.add_argument("--thorough", action="store_true", help="on a CPU also eager attention with checkpointing")
    # A step of the full size takes a minute on two CPU cores.
    parser.set_defaults(repeats=None)
    arguments = parser.parse_args(argv)
    on_cpu = torch.device(arguments.device).type == "cpu"
    defaults = {"repeats": 1, "warm_ups": 0, "workers": 1, "precisions": ["float32"], "compile": ["no"]}
    if not on_cpu:
        defaults = {"repeats": 10, "warm_ups": 3, "workers": 8, "precisions": ["float32", "bfloat16"]}
        defaults["compile"] = ["no", "yes"]
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.checkpointings = [answer == "yes" for answer in arguments.checkpointing]
    arguments.compile = [answer == "yes" for answer in arguments.compile]

    results = Results(arguments.output, SETTINGS, arguments.device)
    for settings in combinations(arguments):
        if results.find(**settings) is None:
            print(settings, flush=True)
            results.add({**settings, **measure_in_parts(argparse.Namespace(**{**vars(arguments), **settings}))})
    report = table(results, arguments.device)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


def peak_rate(precision: str, device: str) -> float:
    """The operations per second of a large square product."""
    side = PEAK_SIDE[torch.device(device).type]
    return 2 * side**3 / product_seconds(1, side, side, side, precision, device)


def measure_in_parts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one combination with the largest part of the batch that fits in the memory."""
    rate = peak_rate(arguments.precision, arguments.device)
    part = arguments.batch
    while part:
        # Running out of GPU memory does not end the process.
        on_cpu = torch.device(arguments.device).type == "cpu"
        row = in_own_process(measure, arguments, part) if on_cpu else measure(arguments, part)
        if row is not None:
            return {**row, "peak_rate": rate}
        part //= 2
    raise RuntimeError(f"Not even one clip of {arguments.variant} fits in the memory.")


if __name__ == "__main__":
    main()
