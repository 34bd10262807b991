"""`evacap check`: whether the picture of media files belongs to their sound, window by window."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import positive_int, whole_number
from ..training.terminal import one_line, printable
from .caption import add_model_arguments, caption, find_media, load_captioner, require_some


if TYPE_CHECKING:
    from ..processing.pipeline_evacap import AudioVisualCaptioningPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "media",
        nargs="+",
        metavar="FILE",
        help="media files, URLs, folders, which are searched recursively, or - for standard input",
    )
    add_model_arguments(
        parser, "model folder or Hub name with gate_type='agreement' (default: the bundled checkpoint)"
    )
    parser.add_argument(
        "--threshold", type=probability, help="below it a picture does not belong (default: the model's own)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=1, help="windows at a time (default: %(default)s)")
    parser.add_argument("--workers", type=whole_number, default=0, help="processes that read (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line; folders always give that")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw frames, filterbank, agreement and gate of the one file"
    )


def probability(text: str) -> float:
    """An argument that must lie between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1")
    return value


def run(arguments: argparse.Namespace) -> int:
    from ..processing.captioning_evacap import require_agreement
    from ..processing.pipeline_evacap import AudioVisualCaptioningPipeline

    media = find_media(arguments.media)
    require_some(media, "evacap check")
    if arguments.plot is not None:
        from ..training.evaluation.plots import has_matplotlib

        if len(media) != 1:
            raise ValueError(f"--plot draws one file, but there are {len(media)}: name one")
        if not has_matplotlib():
            raise ImportError("--plot needs Matplotlib: pip install matplotlib")
    captioner = load_captioner(arguments)
    require_agreement(captioner.model.config)
    threshold = arguments.threshold or captioner.model.config.agreement_threshold or 0.5
    as_json = arguments.json or any(os.path.isdir(name) for name in arguments.media)

    class Checker(AudioVisualCaptioningPipeline):
        """Encodes the windows as the captioner does, and says nothing of what it hears."""

        def _forward(self, model_inputs: dict[str, Any], **options) -> dict[str, Any]:
            encoded = self.model.get_encoder()(**model_inputs)
            outputs = {"agreement": encoded.agreement, "agreement_by_step": encoded.agreement_by_step}
            outputs["gate"] = encoded.fusion_gate.unflatten(1, (-1, encoded.agreement_by_step.shape[1])).mean(1)
            return {name: value.cpu().double() for name, value in outputs.items()}

        def postprocess(self, windows: list[dict[str, Any]], **options) -> dict[str, Any]:
            return self.over_time(windows)

    checker = Checker(captioner.model, processor=captioner.processor, device=captioner.device)
    failures, results = 0, {}

    def show(file: str | Path, result: dict[str, Any]) -> None:
        nonlocal failures
        if "error" in result:
            failures += 1
            print(f"evacap check: {one_line(result['error'])}", file=sys.stderr)
        else:
            results[file] = result
            for window in result["agreement"]:
                window["verdict"] = verdict(window["probability"], threshold)
        if as_json:
            print(json.dumps({"file": str(file), **result}), flush=True)
        elif "error" not in result:
            windows = [
                f"{window['timestamp'][0]:.2f}–{window['timestamp'][1]:.2f} s: {window['verdict']}"
                + ("" if window["probability"] is None else f" ({window['probability']:.2f})")
                for window in result["agreement"]
            ]
            print(f"{printable(file)}: {'; '.join(windows)}", flush=True)

    caption(checker, media, show, num_workers=arguments.workers, batch_size=arguments.batch_size)
    if arguments.plot is not None and results:
        draw(checker, media[0], results[media[0]], threshold, arguments.plot)
        print(printable(arguments.plot), file=sys.stderr)
    return 1 if failures else 0


def verdict(agreement: float | None, threshold: float) -> str:
    """What the probability of a window means; `None` where nothing is to be seen."""
    if agreement is None:
        return "nothing to see"
    return "belongs" if agreement >= threshold else "does not belong"


def draw(
    checker: "AudioVisualCaptioningPipeline", file: str | Path, result: dict[str, Any], threshold: float, path: Path
) -> None:
    """Writes a picture of a file over time: frames, filterbank, and agreement and gate."""
    import numpy as np
    from matplotlib.figure import Figure

    from ..processing.pipeline_evacap import read_windows
    from ..training.evaluation.plots import COLORS, clean_axes, save_figure

    extractor, video = checker.processor.feature_extractor, checker.processor.video_processor
    pictures, banks, times = [], [], []
    for window in read_windows(file, checker.processor, checker.processor.window_seconds):
        start, end = window["timestamp"]
        frames = round((end - start) * extractor.sampling_rate / extractor.hop_length)
        banks.append(window["inputs"]["input_features"][0, :frames])
        if "pixel_values_videos" in window["inputs"]:
            seen = window["inputs"]["pixel_values_videos"][0]
            seen = seen.permute(0, 2, 3, 1).numpy() * np.array(video.image_std) + np.array(video.image_mean)
            pictures += list(seen)
            times += [start + number / len(seen) * (end - start) for number in range(len(seen))]
    total, shown = end, max(1, -(-len(pictures) // 10))
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    strip, bank, curves = figure.subplots(3, 1, sharex=True, height_ratios=[1.2, 1, 1.3])
    width = total / max(1, len(pictures[::shown]))
    for picture, time in zip(pictures[::shown], times[::shown]):
        strip.imshow(picture.clip(0, 1), extent=(time, time + 0.95 * width, 0, 1), aspect="auto")
    strip.set_yticks([])
    strip.set_title(Path(file).name, fontsize=9)
    bank.imshow(np.concatenate(banks).T, origin="lower", extent=(0, total, 0, 1), aspect="auto", cmap="magma")
    bank.set_yticks([])
    bank.set_ylabel("mel", fontsize=8)
    steps = np.array(result["times"])
    agreement = np.array([np.nan if value is None else value for value in result["agreement_by_step"]], dtype=float)
    curves.plot(steps, agreement, color=COLORS[0], label="agreement")
    curves.plot(steps, result["gate"], color=COLORS[1], label="gate")
    curves.axhline(threshold, color="0.6", linewidth=0.8, linestyle="--", label="threshold")
    curves.set_xlim(0, total)
    curves.set_ylim(-0.02, 1.02)
    curves.set_xlabel("seconds", fontsize=8)
    curves.legend(fontsize=8, frameon=False, ncols=3, loc="upper right")
    for axes in (strip, bank, curves):
        clean_axes(axes)
        axes.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, 120)
