"""Checks that a device computes the same as the CPU in float32.

The checks cover the model, its gradients and captions, training, and two processes on one device. Each check is a row
with the difference that was found and the difference that is allowed.
"""

import contextlib
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import AutoModel, AutoProcessor
from transformers.utils import is_flash_attn_2_available

import evacap
from benchmarks.fusion import fusion_calls
from benchmarks.measure import Results, argument_parser, bandwidth, markdown, seconds
from benchmarks.models import SIZES, make_config, make_inputs, make_model
from benchmarks.training import peak_rate
from evacap.modeling_evacap.fusion_evacap import attention_and_entropy, fused_attention_and_entropy
from evacap.training.data.collator import EVACapDataCollator
from evacap.training.files import write_text
from evacap.training.procedural.dataset import ProceduralClips
from evacap.training.run_config import load_run_config
from evacap.training.train import train


VARIANTS = ("evacap", "avcap", "audio-only", "video-only")
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Distances to float32, relative to what is measured: of one rounding, of a pass through a model, of its gradient.
LIMITS = {"float32": (1e-5, 1e-4, 1e-3), "float16": (1e-3, 0.02, 0.05), "bfloat16": (5e-3, 0.1, 0.2)}
CLIPS, FRAMES, LENGTH = 3, 4, 7


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64 on the CPU."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return ((found - expected).norm() / expected.norm()).item()


def rates(device: str) -> Iterator[tuple[str, float, None]]:
    """What the device can do: not checked, but the tables are measured against it."""
    for precision in ("bfloat16", "float32"):
        yield f"a large product's TFLOP/s in {precision}", peak_rate(precision, device) / 1e12, None
    yield "memory read, TB/s", bandwidth(device) / 1e12, None


def fusion(device: str, size: str) -> Iterator[tuple[str, float, float]]:
    """Attention and entropy against the formula in float32 on the same numbers, with masks, forwards and backwards."""
    queries, keys = (512, 1764) if size == "full" else (70, 45)
    for (name, dtype), head_dim in itertools.product({"float32": torch.float32, **HALVES}.items(), (16, 64, 128)):
        generator = torch.Generator().manual_seed(head_dim)
        inputs = [
            torch.randn(2, length, 3, head_dim, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
            for length in (queries, keys, keys)
        ]
        mask = torch.arange(keys, device=device) < torch.tensor([[keys], [keys // 3]], device=device)
        results = []
        for attend, tensors in (
            (fused_attention_and_entropy, inputs),
            (attention_and_entropy, [tensor.detach().float().requires_grad_() for tensor in inputs]),
        ):
            context, entropy, _ = attend(*tensors, mask, head_dim**-0.5)
            loss = (context.float() * torch.linspace(-1, 1, head_dim, device=device)).sum() + entropy.square().sum()
            results.append((context, entropy, *torch.autograd.grad(loss, tensors)))
        (context, entropy, *gradients), (exact_context, exact_entropy, *exact_gradients) = results
        what = f"fusion, {name}, head_dim {head_dim}"
        yield f"{what}: entropy, greatest difference", (entropy - exact_entropy).abs().max().item(), 1e-3
        yield f"{what}: context", distance(context, exact_context), LIMITS[name][0]
        furthest = max(distance(found, exact) for found, exact in zip(gradients, exact_gradients))
        yield f"{what}: gradients", furthest, LIMITS[name][1]


def module(device: str, size: str) -> Iterator[tuple[str, float, float]]:
    """The module with its gate against the paper's equations, in float32 with the module's own projections."""
    calls = fusion_calls(size, "float32", 2, 18, False, device)
    names = ("fused sequence", "gate", "entropy")
    for name, found, expected in zip(names, calls["module"](), calls["plain"]()):
        yield f"fusion module, float32: {name}", distance(found, expected), 1e-4


@functools.cache
def _reference(variant: str) -> tuple[nn.Module, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """A small model on the CPU, its inputs, and what it makes of them in float32."""
    model = make_model(make_config(variant, FRAMES, "small"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Far from their birth values, where every block is close to the identity.
                parameter.mul_(8)
    inputs = make_inputs(model.config, CLIPS, FRAMES)
    generator = torch.Generator().manual_seed(1)
    if variant == "video-only":
        inputs.pop("input_features")
    elif "pixel_values_videos" in inputs:
        # A whole clip, half a clip, and one without a picture.
        inputs["pixel_values_videos_mask"] = torch.arange(FRAMES) < torch.tensor([[FRAMES], [FRAMES // 2], [0]])
    labels = torch.randint(3, model.config.text_config.vocab_size, (CLIPS, LENGTH), generator=generator)
    labels[0, -2:] = -100
    inputs["labels"] = labels
    return model, inputs, _outputs(model, inputs)


def _outputs(model: nn.Module, inputs: dict[str, torch.Tensor], autocast=contextlib.nullcontext()):
    """Logits, and the gradient of the loss as one vector."""
    model.zero_grad()
    with autocast:
        output = model(**inputs, use_cache=False)
    output.loss.backward()
    gradients = [parameter.grad.float().flatten() for parameter in model.parameters() if parameter.grad is not None]
    return output.logits.detach().float(), torch.cat(gradients)


def _generate(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    streams = {name: values for name, values in inputs.items() if name != "labels"}
    return model.generate(**streams, num_beams=4, max_new_tokens=8).cpu()


def models(device: str, attention: str, variants: tuple[str, ...], precisions: tuple[str, ...]):
    """Small models of each variant: logits, gradients, and in float32 the tokens of a beam search."""
    for variant, precision in itertools.product(variants, precisions):
        reference, inputs, expected = _reference(variant)
        half, _, autocast = precision.partition(" ")
        dtype = torch.float32 if autocast else HALVES.get(half, torch.float32)
        model = make_model(reference.config, device=device)
        model.load_state_dict(reference.state_dict())
        model = model.to(dtype)
        model.set_attn_implementation(attention)
        inputs = {name: values.to(device) for name, values in inputs.items()}
        context = torch.autocast(torch.device(device).type, HALVES[half]) if autocast else contextlib.nullcontext()
        logits, gradient = _outputs(model, inputs, context)
        what = f"{variant}, {attention}, {precision}"
        yield f"{what}: logits", distance(logits, expected[0]), LIMITS[half][1]
        yield f"{what}: gradient", distance(gradient, expected[1]), LIMITS[half][2]
        if half == "float32":
            same = torch.equal(_generate(model, inputs), _generate(reference, _reference(variant)[1]))
            yield f"{what}: captions of a beam search that differ", float(not same), 0.0


def compiled(device: str) -> Iterator[tuple[str, float, float]]:
    """One graph of the whole model, forwards and backwards."""
    reference, inputs, expected = _reference("evacap")
    model = make_model(reference.config, device=device)
    model.load_state_dict(reference.state_dict())
    inputs = {name: values.to(device) for name, values in inputs.items()}
    found = _outputs(torch.compile(model, fullgraph=True), inputs)
    yield "evacap, compiled, float32: logits", distance(found[0], expected[0]), LIMITS["float32"][1]
    yield "evacap, compiled, float32: gradient", distance(found[1], expected[1]), LIMITS["float32"][2]


def captions(device: str, clips: int) -> Iterator[tuple[str, float, float]]:
    """The captions of the bundled checkpoint for procedural clips."""
    processor = AutoProcessor.from_pretrained(evacap.TINY)
    rendered = ProceduralClips(processor, clips, split="test")
    batch = EVACapDataCollator(p_mix=0)([rendered[index] for index in range(clips)])
    batch.pop("labels")
    batch = {name: values for name, values in batch.items() if name.startswith(("input_features", "pixel_values"))}

    def say(device: str, dtype: torch.dtype) -> list[str]:
        model = AutoModel.from_pretrained(evacap.TINY, dtype=dtype).to(device).eval()
        tokens = model.generate(**{name: values.to(device) for name, values in batch.items()}, num_beams=4)
        return processor.batch_decode(tokens, skip_special_tokens=True)

    expected = say("cpu", torch.float32)
    for name, dtype in {"float32": torch.float32, **HALVES}.items():
        differing = sum(found != caption for found, caption in zip(say(device, dtype), expected)) / clips
        yield f"bundled checkpoint, {name}: share of captions that differ", differing, 0 if name == "float32" else 0.1


def training_run(device: str, precision: str, clips: int) -> Iterator[tuple[str, float, float]]:
    """A short run of the training's own code: the loss at its end over that at its beginning."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "output": folder,
            "data.procedural": clips,
            "optimization.batch_size": 16,
            "optimization.warmup_epochs": 0,
            "validation.every_steps": "null",
            "saving.every_steps": "null",
            "saving.code": "false",
            "logging.every_steps": 1,
            "logging.trackers": "[]",
            "resources.mixed_precision": {"bfloat16": "bf16", "float16": "fp16"}.get(precision, "no"),
            "resources.cpu": str(torch.device(device).type == "cpu").lower(),
        }
        # Accelerate keeps its settings as long as a process lives; a run has its own.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train(load_run_config("tiny", [f"{name}={value}" for name, value in overrides.items()]))
        losses = [json.loads(line)["loss"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    yield f"training, {precision}: last loss / first loss", losses[-1] / losses[0], 0.95


def _process(rank: int, folder: str, device: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    reference, inputs, _ = _reference("evacap")
    model = make_model(reference.config, device=device)
    model.load_state_dict(reference.state_dict())
    parallel = nn.parallel.DistributedDataParallel(model)
    half = {name: values[rank : rank + 1].to(device) for name, values in inputs.items()}
    _, gradient = _outputs(parallel, half)
    if rank == 0:
        torch.save(gradient.cpu(), Path(folder, "gradient.pt"))
    torch.distributed.destroy_process_group()


def two_processes(device: str) -> Iterator[tuple[str, float, float]]:
    """DDP over two processes that share the device (by gloo, as NCCL wants a device for each)."""
    reference, inputs, _ = _reference("evacap")
    gradients = [_outputs(reference, {name: rows[i : i + 1] for name, rows in inputs.items()})[1] for i in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder, device), nprocs=2)
        gradient = torch.load(Path(folder, "gradient.pt"), weights_only=True)
    yield "two processes on one device: gradient", distance(gradient, sum(gradients) / 2), LIMITS["float32"][2]


COMPILED = ("compiled", "flex")
"""The checks that wait for a compiler, a minute or so."""


def checks(device: str, size: str) -> Iterator[tuple[str, Callable[[], Iterator[tuple[str, float, float | None]]]]]:
    """All checks by name, the most telling first."""
    on_cpu = torch.device(device).type == "cpu"
    yield "rates", functools.partial(rates, device)
    yield "fusion", functools.partial(fusion, device, size)
    yield "fusion module", functools.partial(module, device, size)
    precisions = ("float32", "bfloat16", "float16", "bfloat16 autocast")
    yield "sdpa", functools.partial(models, device, "sdpa", VARIANTS, precisions)
    yield "captions", functools.partial(captions, device, 50 if size == "full" else 2)
    yield "eager", functools.partial(models, device, "eager", VARIANTS, precisions[:3])
    if is_flash_attn_2_available() and not on_cpu:
        yield "flash", functools.partial(models, device, "flash_attention_2", VARIANTS, precisions[1:3])
    for precision in ("bfloat16", "float16", "float32")[: 3 if size == "full" else 1]:
        clips = 160 if size == "full" else 96
        yield f"training, {precision}", functools.partial(training_run, device, precision, clips)
    yield "two processes", functools.partial(two_processes, device)
    if not on_cpu:
        yield "compiled", functools.partial(compiled, device)
        yield "flex", functools.partial(models, device, "flex_attention", ("evacap",), ("bfloat16", "float32"))


def run(results: Results, device: str, size: str, are_compiled: bool) -> None:
    """Runs what `results` lacks, of what is compiled or of the rest. A check that breaks is a row with its error."""
    # PyTorch computes the convolutions of patch embeddings in TF32 otherwise.
    torch.backends.cudnn.allow_tf32 = False
    for name, check in checks(device, size):
        if (name in COMPILED) != are_compiled or any(row["group"] == name for row in results.rows):
            continue
        rows: list[dict] = []

        def collect(name: str = name, check: Callable = check, rows: list[dict] = rows) -> None:
            try:
                for what, value, limit in check():
                    passed = limit is None or value <= limit
                    rows.append({"group": name, "check": what, "value": value, "limit": limit, "passed": passed})
            except Exception as error:
                message = f"{type(error).__name__}: {error}"[:2000]
                rows.append({"group": name, "check": name, "value": None, "limit": None, "passed": False})
                rows[-1]["error"] = message

        took = seconds(collect, "cpu")
        print(f"{name}: {sum(row['passed'] for row in rows)} of {len(rows)} in {took:.1f} s", flush=True)
        for row in rows:
            results.add({**row, "seconds": took})


def table(results: Results) -> str:
    """The checks in Markdown."""
    rows = []
    for row in results.rows:
        found = "–" if row["value"] is None else f"{row['value']:.3g}"
        verdict = row.get("error", "yes" if row["passed"] else "**no**").replace("\n", " ").replace("|", "/")[:300]
        rows.append([row["check"], found, "–" if row["limit"] is None else f"{row['limit']:g}", verdict])
    return markdown(["check", "found", "at most", "passed"], rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("device_checks", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--compiled", action="store_true", help="only the checks that wait for a compiler")
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, ("group", "check"), arguments.device)
    run(results, arguments.device, arguments.size, arguments.compiled)
    report = table(results)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
