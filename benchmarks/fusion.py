"""Time and peak memory of the entropy-gated cross-attention, compared with its formula written out.

On a GPU it is also compared with the loop over blocks that a CPU takes.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks import roofline
from benchmarks.measure import DTYPES, Results, argument_parser, markdown, peak_memory, timed
from benchmarks.models import SIZES, make_config
from evacap.modeling_evacap import fusion_evacap
from evacap.modeling_evacap.fusion_evacap import EVACapGatedCrossAttention
from evacap.training.files import write_text


SETTINGS = ("size", "dtype", "batch", "frames", "backward", "way")


def plain(
    fusion: EVACapGatedCrossAttention, audio: torch.Tensor, video: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fused sequence, gate and entropy, by the paper's equations 1 to 3 written out."""
    query, key, value = (
        projection(states).unflatten(-1, (fusion.num_heads, fusion.head_dim)).transpose(1, 2)
        for projection, states in ((fusion.q_proj, audio), (fusion.k_proj, video), (fusion.v_proj, video))
    )
    probabilities = torch.softmax((query @ key.transpose(2, 3)).float() * fusion.scaling, dim=-1)
    context = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
    entropy = -torch.xlogy(probabilities, probabilities).sum(-1).mean(1)
    entropy = entropy / torch.log(torch.tensor(float(video.shape[1])))
    gate = torch.sigmoid(fusion.gate_weight.float() * entropy + fusion.gate_bias.float())
    mixed = (1 - gate[..., None]) * audio.float() + gate[..., None] * context.float()
    return mixed.to(audio.dtype), gate, entropy


def fusion_calls(
    size: str, dtype: str, batch: int, frames: int, backward: bool, device: str
) -> dict[str, Callable[[], Any]]:
    """The module, the written-out formula and, on a GPU, the loop of the CPU, on the same random tokens."""
    config = make_config("evacap", frames, size)
    torch.manual_seed(0)
    fusion = EVACapGatedCrossAttention(config)
    # The module alone has no initialisation of these two.
    nn.init.constant_(fusion.gate_weight, config.gate_weight_init)
    nn.init.constant_(fusion.gate_bias, config.gate_bias_init)
    fusion = fusion.to(device, DTYPES[dtype])
    tokens = (roofline.audio_tokens(config), roofline.video_tokens(config, frames))
    audio, video = (
        torch.randn(batch, number, width, dtype=DTYPES[dtype], device=device, requires_grad=backward)
        for number, width in zip(tokens, (config.audio_config.hidden_size, config.video_config.hidden_size))
    )

    def call(function: Callable) -> tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(backward):
            outputs = function(audio, video)[:3]
            if backward:
                sum(output.float().square().sum() for output in outputs).backward()
                fusion.zero_grad()
                audio.grad = video.grad = None
            return outputs

    @mock.patch.object(fusion_evacap, "has_kernel", new=lambda query: False)
    def loop() -> tuple[torch.Tensor, ...]:
        return call(fusion)

    calls = {
        "module": functools.partial(call, fusion),
        "plain": functools.partial(call, functools.partial(plain, fusion)),
    }
    return {**calls, "loop": loop} if torch.device(device).type == "cuda" else calls


def measure(arguments: argparse.Namespace, results: Results, settings: dict[str, Any]) -> None:
    """Measures all of them and adds them to `results`."""
    values = (*settings.values(), arguments.device)
    calls = fusion_calls(*values)
    difference = max(
        (ours.float() - theirs.float()).abs().max().item() for ours, theirs in zip(calls["module"](), calls["plain"]())
    )
    seconds = timed(calls, arguments.device, repeats=arguments.repeats, budget=arguments.budget)
    calls.clear()
    peaks = peak_memory(fusion_calls, *values, device=arguments.device, warm_ups=1)
    for way, taken in seconds.items():
        row = {**settings, "way": way, "seconds": taken, "peak_bytes": peaks.get(way), "difference": difference}
        results.add(row)


def table(results: Results) -> str:
    """The measurements in Markdown."""
    rows = []
    for other in (row for row in results.rows if row["way"] != "module"):
        row = results.find(**{**{name: other[name] for name in SETTINGS}, "way": "module"})
        ours, theirs = row["seconds"], other["seconds"]
        memory = ["–"] * 3
        if row["peak_bytes"] is not None:
            ratio = other["peak_bytes"] / max(row["peak_bytes"], 1)
            memory = [f"{row['peak_bytes'] / 1e6:.0f}", f"{other['peak_bytes'] / 1e6:.0f}", f"{ratio:.1f}"]
        rows.append(
            [
                row["dtype"],
                row["batch"],
                row["frames"],
                "forward and backward" if row["backward"] else "forward",
                other["way"],
                *(f"{t['median'] * 1e3:.3g} ({t['min'] * 1e3:.3g}–{t['max'] * 1e3:.3g})" for t in (ours, theirs)),
                f"{theirs['median'] / ours['median']:.2f}",
                *memory,
                f"{row['difference']:.1e}",
            ]
        )
    header = ["dtype", "batch", "frames", "pass", "against", "module, ms", "other, ms", "times faster"]
    header += ["module, peak MB", "other, peak MB", "times less", "largest difference to plain"]
    return markdown(header, rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("fusion", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--frames", nargs="+", type=int, default=[18, 64])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], dest="batches")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    for dtype in arguments.dtypes:
        for batch in arguments.batches:
            for frames in arguments.frames:
                for backward in (False, True):
                    settings = {"size": arguments.size, "dtype": dtype, "batch": batch}
                    settings.update(frames=frames, backward=backward)
                    if results.find(**settings) is None:
                        measure(arguments, results, settings)
    report = table(results)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
