"""The gain of `torch.compile`, for the encoder and for decoding with a static cache.

Decoding has one graph for the first pass and one for all others. Further clips of the same shape must not compile
anything; the graphs that they compile are counted.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch._dynamo.utils import counters

from benchmarks.measure import DTYPES, Results, argument_parser, markdown, seconds, spread, timed
from benchmarks.models import SIZES, make_config, make_inputs, make_model
from evacap.training.files import write_text


SETTINGS = ("size", "dtype", "variant", "batch", "frames", "beams", "part", "way")


def graphs() -> int:
    """The number of graphs compiled in this process so far."""
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def measure(arguments, results: Results, dtype: str, beams: int) -> None:
    """Measures encoder and decoding of `arguments.clips` clips, alternately compiled and not compiled."""
    torch.compiler.reset()
    device = arguments.device
    config = make_config(arguments.variant, arguments.frames, arguments.size)
    model = make_model(config, dtype, device)
    encoder = model.get_encoder()
    clips = []
    for seed in range(arguments.clips):
        torch.manual_seed(seed)
        inputs = make_inputs(config, arguments.batch, arguments.frames, device)
        clips.append({name: torch.randn_like(values) for name, values in inputs.items()})
    encoded = [encoder(**clip) for clip in clips]
    next_clip, next_encoded = itertools.cycle(clips).__next__, itertools.cycle(encoded).__next__

    # On CUDA, CUDA graphs replace single kernel launches. There `generate` compiles by itself, but never in beam
    # search.
    options = {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead" if "cuda" in device else "default"}
    compiled_encoder = torch.compile(encoder, **options)
    eager_forward, compiled_forward = model.forward, torch.compile(model.forward, **options)

    def decode(forward: Callable = eager_forward, **options) -> None:
        model.forward = forward
        model.generate(
            encoder_outputs=next_encoded(),
            num_beams=beams,
            do_sample=False,
            min_new_tokens=arguments.new_tokens,
            max_new_tokens=arguments.new_tokens,
            disable_compile=True,
            **options,
        )

    runs = {
        ("encoder", "eager"): lambda: encoder(**next_clip()),
        ("encoder", "compiled"): lambda: compiled_encoder(**next_clip()),
        ("decoding", "dynamic cache"): decode,
        ("decoding", "static cache"): functools.partial(decode, cache_implementation="static"),
        ("decoding", "static cache, compiled"): functools.partial(
            decode, compiled_forward, cache_implementation="static"
        ),
    }
    first, compiled = {}, {}
    for name, run in runs.items():
        before = graphs()
        first[name] = seconds(run, device)
        compiled[name] = graphs() - before
    before = graphs()
    times = timed(runs, device, repeats=max(arguments.repeats, arguments.clips), budget=arguments.budget)
    again = graphs() - before
    for (part, way), taken in times.items():
        row = {"size": arguments.size, "dtype": dtype, "variant": arguments.variant, "batch": arguments.batch}
        row.update(frames=arguments.frames, beams=beams, part=part, way=way, new_tokens=arguments.new_tokens)
        row.update(
            first_seconds=first[part, way], seconds=taken, graphs=compiled[part, way], graphs_of_later_clips=again
        )
        results.add(row)


def table(results: Results) -> str:
    """The measurements in Markdown."""
    rows = []
    for row in results.rows:
        same = {name: row[name] for name in SETTINGS if name != "way"}
        eager = results.find(**same, way={"encoder": "eager", "decoding": "dynamic cache"}[row["part"]])
        time = row["seconds"]
        rows.append(
            [
                *(row[name] for name in ("variant", "dtype", "batch", "beams", "part", "way")),
                spread(time),
                f"{eager['seconds']['median'] / time['median']:.2f}",
                f"{row['first_seconds']:.3g}",
                row["graphs"],
                row["graphs_of_later_clips"],
            ]
        )
    header = ["variant", "dtype", "batch", "beams", "part", "way", "seconds (least–greatest, runs)", "times faster"]
    return markdown(header + ["first call, seconds", "graphs", "graphs of all later clips"], rows) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("compiling", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--variant", default="evacap")
    parser.add_argument("--frames", type=int, default=18)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--clips", type=int, default=4, help="different clips of one shape (default: %(default)s)")
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    for dtype, beams in itertools.product(arguments.dtypes, arguments.beams):
        settings = {"size": arguments.size, "dtype": dtype, "variant": arguments.variant, "batch": arguments.batch}
        if results.find(**settings, frames=arguments.frames, beams=beams) is None:
            measure(arguments, results, dtype, beams)
    report = table(results)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
