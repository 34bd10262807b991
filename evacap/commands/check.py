"""`evacap check`: whether the picture of media files belongs to their sound, window by window."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..cli import positive_int, whole_number
from ..media_list import find_media, require_some
from ..training.terminal import one_line, printable
from .caption import add_model_arguments, caption, load_captioner


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
    from ..processing.pipeline_evacap import AudioVisualCaptioningPipeline, read_windows

    media = find_media(arguments.media)
    require_some(media, "evacap check")
    if arguments.plot is not None:
        from ..training.evaluation.plots import has_matplotlib, plot_over_time, save_figure

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
        file = media[0]
        windows = read_windows(file, checker.processor, checker.processor.window_seconds)
        figure = plot_over_time(windows, results[file], checker.processor, Path(str(file)).name, threshold)
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, arguments.plot, 120)
        print(printable(arguments.plot), file=sys.stderr)
    return 1 if failures else 0


def verdict(agreement: float | None, threshold: float) -> str:
    """What the probability of a window means; `None` where nothing is to be seen."""
    if agreement is None:
        return "nothing to see"
    return "belongs" if agreement >= threshold else "does not belong"
