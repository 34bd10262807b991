"""Seconds, memory and operations of captioning one batch, by variant and number of frames, beside the machine's floor.

`avcap-recomputed` is AVCap's variant decoded the way AVCap's code does it: attention written out, no cache, the whole
prefix through the whole decoder for every beam at every step. A few of its steps are measured and scaled to all.
"""

import argparse
import functools
import itertools
import operator
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import roofline
from benchmarks.measure import (
    DTYPES,
    Results,
    argument_parser,
    interleave,
    markdown,
    peak_memory,
    summary,
    synchronize,
)
from benchmarks.models import SIZES, make_config, make_inputs, make_model
from evacap.training.evaluation.plots import new_figure, save_figure
from evacap.training.files import write_text


RECOMPUTED = "avcap-recomputed"
VARIANTS = ("audio-only", "avcap", "evacap", RECOMPUTED)
PARTS = ("encoder", "prefill", "decoding")
SETTINGS = ("size", "dtype", "batch", "beams", "frames", "variant", "new_tokens")
# Its time alone would fill the grid: one clip, float32 and frames as in the paper's figure are what is compared.
RECOMPUTED_MAX_FRAMES = 18


def caption(model: PreTrainedModel, encoder_outputs, beams: int, new_tokens: int, device: str) -> dict[str, float]:
    """The seconds of `generate` up to the end of its first forward pass and from there on."""
    passes = []

    def note_first(*_) -> None:
        if not passes:
            synchronize(device)
        passes.append(time.perf_counter())

    hook = model.register_forward_hook(note_first)
    synchronize(device)
    start = time.perf_counter()
    ids = model.generate(
        encoder_outputs=encoder_outputs,
        num_beams=beams,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    synchronize(device)
    end = time.perf_counter()
    hook.remove()
    if ids.shape[1] != new_tokens + 1 or len(passes) != new_tokens:
        raise RuntimeError(f"{len(passes)} passes made {ids.shape[1] - 1} tokens instead of {new_tokens}.")
    return {"prefill": passes[0] - start, "decoding": end - passes[0]}


def recompute(model: PreTrainedModel, encoder_outputs, beams: int, tokens: int, device: str) -> list[float]:
    """The seconds of each of `tokens` greedy steps that share nothing: neither between steps nor between beams."""
    prefix = encoder_outputs.last_hidden_state.repeat_interleave(beams, 0)
    ids = torch.full((len(prefix), 1), model.config.decoder_start_token_id, device=prefix.device)
    took = []
    for _ in range(tokens):
        synchronize(device)
        start = time.perf_counter()
        logits = model(decoder_input_ids=ids, encoder_outputs=(prefix,), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        synchronize(device)
        took.append(time.perf_counter() - start)
    return took


class Subject:
    """A variant with its inputs; calling it measures one batch for every number of beams in `beams`."""

    def __init__(self, variant: str, arguments: argparse.Namespace, dtype: str, batch: int, frames: int):
        self.variant, self.arguments = variant, arguments
        preset = "avcap" if variant == RECOMPUTED else variant
        self.config = make_config(preset, frames, arguments.size)
        self.model = make_model(self.config, dtype, arguments.device)
        if variant == RECOMPUTED:
            self.model.set_attn_implementation("eager")
            # AVCap's last layer computes the prefix too, though nothing reads it.
            self.model.model.decoder.layers[-1].is_last = False
        self.inputs = make_inputs(self.config, batch, frames, arguments.device)
        self.beams: list[int] = []

    @torch.inference_mode()
    def __call__(self) -> dict[int, dict[str, float]]:
        device, new_tokens = self.arguments.device, self.arguments.new_tokens
        synchronize(device)
        start = time.perf_counter()
        encoder_outputs = self.model.get_encoder()(**self.inputs)
        synchronize(device)
        encoder = time.perf_counter() - start
        times = {}
        for beams in self.beams:
            if self.variant == RECOMPUTED:
                tokens = min(self.arguments.recomputed_tokens, new_tokens)
                steps = recompute(self.model, encoder_outputs, beams, tokens, device)
                times[beams] = {"prefill": steps[0], "decoding": sum(steps) / tokens * new_tokens - steps[0]}
            else:
                times[beams] = caption(self.model, encoder_outputs, beams, new_tokens, device)
            times[beams] = {"encoder": encoder, **times[beams]}
            times[beams]["total"] = sum(times[beams].values())
        return times


def captioning_calls(
    arguments: argparse.Namespace, batch: int, frames: int, beams: dict[tuple[str, str], list[int]]
) -> dict[tuple[str, str, int], Callable[[], Any]]:
    """The captioning of one batch, for each variant, dtype and number of `beams`, to measure its memory."""
    subjects = {(variant, dtype): Subject(variant, arguments, dtype, batch, frames) for variant, dtype in beams}
    return _calls(subjects, beams)


def _calls(
    subjects: dict[tuple[str, str], Subject], beams: dict[tuple[str, str], list[int]]
) -> dict[tuple[str, str, int], Callable[[], Any]]:
    def call(subject: Subject, number: int) -> None:
        subject.beams = [number]
        subject()

    return {
        (*name, number): functools.partial(call, subjects[name], number)
        for name, numbers in beams.items()
        for number in numbers
    }


def measure_group(arguments: argparse.Namespace, results: Results, batch: int, frames: int) -> None:
    """Measures all variants and dtypes for `batch` clips of `frames` frames, in turn, where `results` lacks them."""
    subjects: dict[tuple[str, str], Subject] = {}
    for dtype, variant in itertools.product(arguments.dtypes, arguments.variants):
        if variant == RECOMPUTED and (dtype != "float32" or batch > 1 or frames > RECOMPUTED_MAX_FRAMES):
            continue
        settings = {"size": arguments.size, "dtype": dtype, "batch": batch, "frames": frames, "variant": variant}
        settings["new_tokens"] = arguments.new_tokens
        beams = [number for number in arguments.beams if not results.find(**settings, beams=number)]
        if variant == RECOMPUTED:
            # The comparison is that of beam search.
            beams = [number for number in beams if number == max(arguments.beams)]
        if beams:
            subject = subjects[variant, dtype] = Subject(variant, arguments, dtype, batch, frames)
            subject.beams = beams
    if not subjects:
        return
    print(f"batch {batch}, {frames} frames: " + ", ".join(" ".join(name) for name in subjects), flush=True)
    measured = interleave(subjects, arguments.repeats, arguments.budget)
    configs = {name: subject.config for name, subject in subjects.items()}
    beams = {name: subject.beams for name, subject in subjects.items() if name[0] != RECOMPUTED}
    peaks = {}
    if arguments.memory and torch.device(arguments.device).type == "cuda":
        peaks = peak_memory(_calls, subjects, beams, device=arguments.device)
    # On a CPU the memory is measured in a process of its own, which needs the place.
    subjects.clear()
    if arguments.memory and not peaks:
        peaks = peak_memory(captioning_calls, arguments, batch, frames, beams, device=arguments.device)
    for (variant, dtype), times in measured.items():
        for number in times[0]:
            peak = peaks.get((variant, dtype, number))
            config = configs[variant, dtype]
            results.add(_row(arguments, config, dtype, variant, batch, number, frames, times, peak))


def _row(
    arguments: argparse.Namespace,
    config,
    dtype: str,
    variant: str,
    batch: int,
    beams: int,
    frames: int,
    times: list[dict[int, dict[str, float]]],
    peak_bytes: int | None,
) -> dict[str, Any]:
    new_tokens, prefix = arguments.new_tokens, roofline.prefix_tokens(config, frames)
    row = {
        "size": arguments.size,
        "dtype": dtype,
        "batch": batch,
        "beams": beams,
        "frames": frames,
        "variant": variant,
        "new_tokens": new_tokens,
        "seconds": {part: summary(time[beams][part] for time in times) for part in (*PARTS, "total")},
        "peak_bytes": peak_bytes,
    }
    if variant == RECOMPUTED:
        return {**row, "measured_tokens": min(arguments.recomputed_tokens, new_tokens)}
    operations = {
        "encoder": roofline.flops(roofline.encoder(config, batch, frames)),
        "prefill": roofline.flops(roofline.prefill(config, batch, beams, prefix)),
        "decoding": roofline.flops(roofline.decoding(config, batch, beams, prefix, new_tokens)),
    }
    operations["total"] = sum(operations.values())
    floor = roofline.floor(config, batch, frames, beams, new_tokens, dtype, arguments.device)
    return {**row, "flops": operations, "floor": floor, "ratio": row["seconds"]["total"]["median"] / floor["total"]}


def tables(results: Results) -> str:
    """The measurements in Markdown: a table for each dtype, batch and number of beams."""
    text = []
    order = {variant: index for index, variant in enumerate(VARIANTS)}
    keys = sorted({(row["dtype"], row["batch"], row["beams"]) for row in results.rows}, key=lambda key: (key[1:], key))
    for dtype, batch, beams in keys:
        rows = [row for row in results.rows if (row["dtype"], row["batch"], row["beams"]) == (dtype, batch, beams)]
        rows.sort(key=lambda row: (row["frames"], order[row["variant"]]))
        text.append(f"### {dtype}, batch {batch}, {beams} beam{'s' * (beams > 1)}\n")
        header = [
            "frames",
            "variant",
            *PARTS,
            "total (least–greatest, runs)",
            "TFLOP",
            "floor",
            "total / floor",
            "peak MB",
        ]
        text.append(markdown(header, [_cells(row) for row in rows]) + "\n")
    return "\n".join(text)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    total = row["seconds"]["total"]
    yield str(row["frames"])
    yield row["variant"] + (f" ({row['measured_tokens']} steps scaled)" if row["variant"] == RECOMPUTED else "")
    yield from (f"{row['seconds'][part]['median']:.3g}" for part in PARTS)
    yield f"**{total['median']:.3g}** ({total['min']:.3g}–{total['max']:.3g}, {total['repeats']})"
    yield f"{row['flops']['total'] / 1e12:.3g}" if "flops" in row else "–"
    yield f"{row['floor']['total']:.3g}" if "floor" in row else "–"
    yield f"{row['ratio']:.2f}" if "ratio" in row else "–"
    yield f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] is not None else "–"


def comparisons(results: Results) -> str:
    """How often faster EVACap is than AVCap, with AVCap's decoding and with ours."""
    rows = []
    key = operator.itemgetter("batch", "beams", "dtype", "frames")
    for row in sorted((row for row in results.rows if row["variant"] == "evacap"), key=key):
        same = {name: row[name] for name in ("size", "batch", "beams", "frames", "new_tokens")}
        recomputed = results.find(**same, dtype="float32", variant=RECOMPUTED)
        avcap = results.find(**same, dtype=row["dtype"], variant="avcap")
        float32 = results.find(**same, dtype="float32", variant="evacap")
        total = row["seconds"]["total"]["median"]
        ratios = [
            "–" if other is None else f"{other['seconds']['total']['median'] / total:.1f}"
            for other in (avcap, float32, recomputed)
        ]
        rows.append([row["dtype"], row["batch"], row["beams"], row["frames"], *ratios, f"{row['ratio']:.2f}"])
    header = [
        "EVACap in",
        "batch",
        "beams",
        "frames",
        "× AVCap",
        "× float32",
        "× AVCap recomputed (float32)",
        "÷ floor",
    ]
    return "### EVACap: times faster than …\n\n" + markdown(header, rows) + "\n"


def plot(results: Results, path: Path) -> None:
    """Total time against the number of frames, one clip, most beams: the paper's figure 2 with the floor beside it."""
    rows = results.rows
    batch, beams = min(row["batch"] for row in rows), max(row["beams"] for row in rows)
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    figure = new_figure(5 * len(dtypes), 4)
    axes = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)
    for axis, dtype in zip(axes[0], dtypes):
        for color, variant in enumerate(VARIANTS):
            points = [row for row in rows if (row["dtype"], row["variant"]) == (dtype, variant)]
            points = [row for row in points if (row["batch"], row["beams"]) == (batch, beams)]
            if not points:
                continue
            points.sort(key=lambda row: row["frames"])
            frames, totals = [row["frames"] for row in points], [row["seconds"]["total"] for row in points]
            medians = [total["median"] for total in totals]
            spread = [[t["median"] - t["min"] for t in totals], [t["max"] - t["median"] for t in totals]]
            axis.errorbar(frames, medians, spread, marker="o", capsize=3, color=f"C{color}", label=variant)
            if variant != RECOMPUTED:
                axis.plot(frames, [row["floor"]["total"] for row in points], ":", color=f"C{color}")
        axis.set(title=dtype, xlabel="video frames", ylabel="seconds (dotted: floor)", yscale="log")
        axis.grid(axis="y", alpha=0.3)
        axis.legend()
    figure.suptitle(f"Captioning, batch {batch}, {beams} beams")
    save_figure(figure, path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("latency", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--frames", nargs="+", type=int, default=[0, 1, 4, 8, 18, 64])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], dest="batches")
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--recomputed-tokens", type=int, default=3, help="measured steps of avcap-recomputed")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    parser.add_argument("--quick", action="store_true", help="batch 1, 0 and 18 frames, 4 beams")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.batches, arguments.frames, arguments.beams = [1], [0, 18], [4]
    results = Results(arguments.output, SETTINGS, arguments.device)
    for batch, frames in itertools.product(arguments.batches, arguments.frames):
        measure_group(arguments, results, batch, frames)
    report = tables(results) + "\n" + comparisons(results)
    write_text(arguments.output.with_suffix(".md"), report)
    plot(results, arguments.output.with_suffix(".png"))
    print(report)


if __name__ == "__main__":
    main()
