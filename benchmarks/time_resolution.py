"""How finely windows tell time: one sound gives way to another at a known moment, and captions say when.

Clips are sound alone, of two sources that the bundled checkpoint tells apart by ear. For each window and hop: the share of
the time at which the caption names the source that sounds and no other, and how far the border between the two in the
captions lies from the true moment. The windows cost what their number says.
"""

import argparse

import numpy as np
from transformers import pipeline

import evacap
from benchmarks.measure import Results, argument_parser, markdown
from evacap.training.files import write_text
from evacap.training.procedural.captions import names_in_caption
from evacap.training.procedural.kinds import KINDS, SOUND_ALIKES
from evacap.training.procedural.scenes import SAMPLING_RATE, Event, Scene, render_waveform


SECONDS, EARLIEST, LATEST = 12.0, 4.0, 8.0
GRID = 0.05
RUNS = ((5.12, 5.12), (5.12, 2.56), (5.12, 1.28), (5.12, 0.64), (2.56, 2.56), (2.56, 1.28), (2.56, 0.64), (1.28, 0.64))
SETTINGS = ("window", "hop", "clips")


def make_clips(count: int) -> list[tuple[float, str, str, np.ndarray]]:
    """Clips as the moment of the change, the source before it, the one after it, and the sound."""
    rng, clips = np.random.default_rng(0), []
    names = [name for name in KINDS if name not in SOUND_ALIKES]
    for index in range(count):
        (first, second), change = rng.choice(names, 2, replace=False), float(rng.uniform(EARLIEST, LATEST))
        events = (
            Event(str(first), 0.0, change, 1.0, 1.0, -3.0, None),
            Event(str(second), change, SECONDS - change, 1.0, 1.0, -3.0, None),
        )
        scene = Scene(0, "test", index, SECONDS, events, (), -40.0)
        clips.append((change, str(first), str(second), render_waveform(scene)))
    return clips


def measure(captioner, clips: list, window: float, hop: float) -> dict[str, float]:
    right, errors, unheard, windows = [], [], 0, 0
    sounds = [{"array": waveform, "sampling_rate": SAMPLING_RATE} for *_, waveform in clips]
    options = {"chunk_length_s": window, "stride_length_s": (window - hop) / 2, "merge_chunks": False}
    for clip, result in zip(clips, captioner(sounds, batch_size=8, num_beams=4, return_timestamps=True, **options)):
        change, first, second, _ = clip
        said = [(*chunk["timestamp"], names_in_caption(chunk["text"])) for chunk in result["chunks"]]
        windows += len(said)
        for start, end, names in said:
            times = np.arange(start, end, GRID)
            right += [names == {first if time < change else second} for time in times]
        begin = next((start for start, _, names in said if second in names), None)
        if begin is None:
            unheard += 1
        else:
            errors.append(abs(begin - change))
    return {
        "right": float(np.mean(right)),
        "median_error": float(np.median(errors)),
        "95%_error": float(np.quantile(errors, 0.95)),
        "unheard": unheard,
        "windows": windows / len(clips),
    }


def table(rows: list[dict]) -> str:
    header = ["window", "hop", "windows", "right", "median error", "95% of errors below", "never named"]
    return markdown(
        header,
        (
            [
                f"{row['window']:g} s",
                f"{row['hop']:g} s",
                f"{row['windows']:.0f}",
                f"{row['right']:.1%}",
                f"{row['median_error']:.2f} s",
                f"{row['95%_error']:.2f} s",
                f"{row['unheard'] / row['clips']:.1%}",
            ]
            for row in rows
        ),
    )


def main(argv: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = argument_parser("time_resolution", __doc__)
    parser.add_argument("--clips", type=int, default=24, help="number of clips (default: %(default)s)")
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    clips = make_clips(arguments.clips)
    captioner = pipeline(evacap.TASK, model=evacap.TINY, device=arguments.device)
    for window, hop in RUNS:
        settings = {"window": window, "hop": hop, "clips": arguments.clips}
        if not results.find(**settings):
            results.add({**settings, **measure(captioner, clips, window, hop)})
    report = table(results.rows) + "\n"
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
