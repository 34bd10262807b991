"""Memory of decoding by the number of beams, with the prefix's keys and values shared, and if each beam had a copy."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.measure import DTYPES, Results, argument_parser, markdown, peak_memory
from benchmarks.models import SIZES, make_config, make_inputs, make_model
from evacap.training.files import write_text


SETTINGS = ("size", "dtype", "variant", "batch", "frames", "beams", "new_tokens")


def decoding_calls(
    size: str, dtype: str, variant: str, batch: int, frames: int, beams: list[int], new_tokens: int, device: str
) -> dict[int, Callable[[], Any]]:
    """`generate` on an encoded batch, with each number of beams."""
    config = make_config(variant, frames, size)
    model = make_model(config, dtype, device)
    with torch.inference_mode():
        encoder_outputs = model.get_encoder()(**make_inputs(config, batch, frames, device))

    def call(number: int) -> None:
        model.generate(
            encoder_outputs=encoder_outputs,
            num_beams=number,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )

    return {number: functools.partial(call, number) for number in beams}


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("beams", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--variants", nargs="+", default=["evacap", "avcap"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=18)
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--new-tokens", type=int, default=20)
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    for dtype in arguments.dtypes:
        for variant in arguments.variants:
            settings = {"size": arguments.size, "dtype": dtype, "variant": variant, "batch": arguments.batch}
            settings.update(frames=arguments.frames, new_tokens=arguments.new_tokens)
            beams = [number for number in arguments.beams if results.find(**settings, beams=number) is None]
            values = (arguments.size, dtype, variant, arguments.batch, arguments.frames, beams, arguments.new_tokens)
            peaks = (
                peak_memory(decoding_calls, *values, arguments.device, device=arguments.device, warm_ups=1)
                if beams
                else {}
            )
            config = make_config(variant, arguments.frames, arguments.size)
            for number in beams:
                row = {**settings, "beams": number, "prefix_bytes": prefix_bytes(config, arguments, dtype)}
                results.add({**row, "peak_bytes": peaks[number]})
    report = table(results)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


def prefix_bytes(config, arguments, dtype: str) -> int:
    """The keys and values of the prefix in all layers, once a clip."""
    text, tokens = config.text_config, roofline.prefix_tokens(config, arguments.frames)
    return 2 * text.num_hidden_layers * arguments.batch * tokens * text.hidden_size * DTYPES[dtype].itemsize


def table(results: Results) -> str:
    """The measurements in Markdown."""
    rows = []
    for row in results.rows:
        same = {name: row[name] for name in SETTINGS if name != "beams"}
        one = results.find(**same, beams=1)
        copies = (row["beams"] - 1) * row["prefix_bytes"]
        more = "–"
        if one is not None and row["peak_bytes"] is not None:
            more = f"{(row['peak_bytes'] - one['peak_bytes']) / 1e6:.0f}"
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        rows.append(
            [
                row["variant"],
                row["dtype"],
                row["batch"],
                row["beams"],
                peak,
                more,
                f"{row['prefix_bytes'] / 1e6:.0f}",
                f"{copies / 1e6:.0f}",
            ]
        )
    header = [
        "variant",
        "dtype",
        "batch",
        "beams",
        "peak MB",
        "more than 1 beam, MB",
        "the prefix's keys and values, MB",
    ]
    return markdown(header + ["copies for the other beams would take, MB"], rows) + "\n"


if __name__ == "__main__":
    main()
