"""Long files in windows: seconds of work per second of the file (the real-time factor), and peak memory.

Each file is captioned in its own process, after a short file. The memory is what captioning the file adds to the
process that reads it and runs the model; it must not grow with the length of the file.
"""

import itertools
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from benchmarks.measure import DTYPES, Results, argument_parser, markdown, peak_memory, seconds
from benchmarks.throughput import GENERATION, MODELS, make_captioner
from evacap.training.files import write_text


RATE = 16_000
FPS = 25
WIDTH, HEIGHT = 320, 240
WARM_UP = 11
SETTINGS = ("model", "attention", "dtype", "length", "batch_size")


def write_file(path: Path, length: int) -> None:
    """Writes `length` seconds of a moving pattern with a gliding tone, in H.264 and AAC."""
    pattern = np.add.outer(np.arange(HEIGHT), np.arange(WIDTH))[..., None] * (1, 2, 3)
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=FPS, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        video.options = {"preset": "ultrafast", "g": str(10 * FPS)}
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        for second in range(length):
            for index in range(second * FPS, (second + 1) * FPS):
                picture = ((pattern + 4 * index) % 256).astype(np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            time = second + np.arange(RATE, dtype=np.float64) / RATE
            sound = 0.3 * np.sin(2 * np.pi * (300 + 200 * np.sin(time)) * time).astype(np.float32)
            block = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            block.sample_rate, block.time_base, block.pts = RATE, Fraction(1, RATE), second * RATE
            container.mux(audio.encode(block))
        container.mux(video.encode())
        container.mux(audio.encode())


def captioning(
    model: str, attention: str, dtype: str, device: str, folder: str, length: int, batch_size: int
) -> Callable[[], None]:
    """A function that captions a file of `folder` and writes there how long it took."""
    captioner = make_captioner(model, dtype, device, attention)

    def run(name: int = length) -> None:
        took = seconds(lambda: captioner(f"{folder}/{name}.mp4", batch_size=batch_size, **GENERATION), device)
        Path(folder, "seconds").write_text(str(took))

    run(WARM_UP)
    return run


def table(rows: list[dict]) -> str:
    header = ["model", "video attention", "dtype", "batch", "file", "work", "real-time factor", "peak memory"]
    return (
        markdown(
            header,
            (
                [
                    *(row[name] for name in ("model", "attention", "dtype", "batch_size")),
                    f"{row['length']} s",
                    f"{row['seconds']:.1f} s",
                    f"{row['seconds'] / row['length']:.3f}",
                    "" if row["memory"] is None else f"{row['memory'] / 1e6:,.0f} MB",
                ]
                for row in rows
            ),
        )
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("long_files", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--attentions", nargs="+", choices=("full", "frame"), default=["full", "frame"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[60, 600], help="seconds (default: 60 600)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows at a time (default: %(default)s)")
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        for length in (WARM_UP, *arguments.lengths):
            write_file(Path(folder, f"{length}.mp4"), length)
        runs = itertools.product(arguments.models, arguments.attentions, arguments.dtypes, arguments.lengths)
        for run in runs:
            model, attention, dtype, length = run
            settings = dict(zip(SETTINGS, (*run, arguments.batch_size), strict=True))
            # The bundled checkpoint has the attention that it was trained with.
            if results.find(**settings) or (model == "tiny" and attention == "frame"):
                continue
            options = (model, attention, dtype, arguments.device, folder, length, arguments.batch_size)
            memory = peak_memory(captioning, *options, device=arguments.device)
            took = float(Path(folder, "seconds").read_text())
            results.add({**settings, "seconds": took, "memory": memory})
    report = table(results.rows)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
