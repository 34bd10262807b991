"""Seconds of the video tower by the number of frames, with attention over the clip and within each tubelet."""

import functools
import itertools

import torch

from benchmarks import roofline
from benchmarks.measure import DTYPES, Results, argument_parser, interleave, markdown, seconds, spread, summary
from benchmarks.models import SIZES, make_config, make_inputs, make_model
from evacap.modeling_evacap.configuration_evacap import VIDEO_ATTENTION_TYPES
from evacap.training.files import write_text


SETTINGS = ("size", "dtype", "attention", "frames")


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("video_tower", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--frames", nargs="+", type=int, default=[8, 18, 32, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    for dtype in arguments.dtypes:
        measure(arguments, results, dtype)
    report = table(results)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


@torch.inference_mode()
def measure(arguments, results: Results, dtype: str) -> None:
    """Measures both kinds of attention at every number of frames, alternately, because their ratios matter."""
    runs, operations = {}, {}
    for attention, frames in itertools.product(VIDEO_ATTENTION_TYPES, arguments.frames):
        settings = {"size": arguments.size, "dtype": dtype, "attention": attention, "frames": frames}
        if results.find(**settings) is None:
            config = make_config("video-only", frames, arguments.size, attention)
            tower = make_model(config, dtype, arguments.device).model.encoder.video_tower
            video = make_inputs(config, 1, frames, arguments.device)["pixel_values_videos"]
            name = tuple(settings.items())
            runs[name] = functools.partial(seconds, functools.partial(tower, video), arguments.device)
            operations[name] = roofline.flops(roofline.video_tower(config.video_config, 1, frames))
    for name, times in interleave(runs, arguments.repeats, arguments.budget).items():
        results.add({**dict(name), "seconds": summary(times), "flops": operations[name]})


def table(results: Results) -> str:
    """The measurements in Markdown, with each time divided by that of the fewest frames."""
    rows = []
    for row in results.rows:
        same = [other for other in results.rows if all(other[name] == row[name] for name in SETTINGS[:3])]
        least = min(same, key=lambda other: other["frames"])
        time, base = row["seconds"], least["seconds"]
        rows.append(
            [
                row["dtype"],
                row["attention"],
                row["frames"],
                spread(time),
                f"{time['median'] / base['median']:.2f}",
                f"{row['flops'] / least['flops']:.2f}",
                f"{row['flops'] / time['median'] / 1e9:.0f}",
            ]
        )
    header = [
        "dtype",
        "attention",
        "frames",
        "seconds (least–greatest, runs)",
        "× fewest frames",
        "operations ×",
        "GFLOP/s",
    ]
    return markdown(header, rows) + "\n"


if __name__ == "__main__":
    main()
