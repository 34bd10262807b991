"""`evacap evaluate`: caption metrics of checkpoints, with matched, swapped and fewer pictures, or of files."""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import positive_int, whole_number
from ..training.metrics.compute import METRICS, MODEL_METRICS


if TYPE_CHECKING:
    from ..training.evaluation.captioner import MakeClips


MAX_WORKERS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="model folders or Hub names; NAME=CHECKPOINT gives it a name for the tables",
    )
    parser.add_argument("--data", metavar="FOLDER", help="test clips made by `evacap prepare`")
    parser.add_argument(
        "--predictions",
        nargs="+",
        default=[],
        metavar="FILE",
        help="captions instead of checkpoints: .jsonl or .csv files with `id` and `caption`, or from `evacap caption`; "
        "NAME=FILE gives one a name for the tables",
    )
    parser.add_argument(
        "--references",
        metavar="FILE",
        help="their references: a .jsonl or .csv file with `id` and `captions` or `caption`",
    )
    parser.add_argument("--split", default="test", help="split of the clips (default: %(default)s)")
    parser.add_argument(
        "--shuffle",
        nargs="+",
        type=float,
        default=[0.0, 0.05, 0.5, 1.0],
        metavar="SHARE",
        help="shares of videos to shuffle (default: 0 0.05 0.5 1; 0 is always added)",
    )
    parser.add_argument(
        "--frames",
        nargs="+",
        type=whole_number,
        default=[],
        metavar="N",
        help="further numbers of frames to evaluate, with matched videos; 0 is no video",
    )
    parser.add_argument("--beams", type=positive_int, default=4, help="number of beams (default: %(default)s)")
    parser.add_argument("--max-clips", type=positive_int, metavar="N", help="only the first clips")
    parser.add_argument(
        "--output",
        default="evaluation",
        metavar="FOLDER",
        help="folder for tables, plots and captions; the same call continues after an interruption (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=16, help="clips of a batch, in each process (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=whole_number, help=f"reading processes (default: one for each core, at most {MAX_WORKERS})"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=(*METRICS, *MODEL_METRICS),
        default=METRICS,
        metavar="METRIC",
        help=f"metrics among {', '.join(METRICS)} (default: all these), {', '.join(MODEL_METRICS)}",
    )
    parser.add_argument("--sentence-encoder", metavar="FOLDER", help="folder of the sentence encoder for fense")
    parser.add_argument(
        "--fluency-detector",
        metavar="FOLDER",
        help=f"folder of FENSE's error detector and its base model, for {', '.join(MODEL_METRICS)}",
    )
    parser.add_argument(
        "--samples", type=whole_number, default=3, help="clips whose gate is plotted over time (default: %(default)s)"
    )
    parser.add_argument(
        "--resamples", type=positive_int, default=2000, help="resamples of the bootstrap (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="seed of shuffling and bootstrap (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="name of the clips in the tables (default: folder and split)"
    )
    parser.add_argument("--dataset-id", metavar="ORG/NAME", help="name of the clips on the Hub, for model cards")


def run(arguments: argparse.Namespace) -> int:
    from ..training.evaluation.plots import has_matplotlib
    from ..training.evaluation.report import write_report
    from ..training.evaluation.tables import as_text

    make_clips = None
    try:
        if arguments.predictions or arguments.references:
            evaluation = _evaluate_predictions(arguments)
        else:
            evaluation, make_clips = _evaluate_checkpoints(arguments)
    except KeyboardInterrupt:
        print("evacap evaluate: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if evaluation is None:
        return 0
    print(as_text(evaluation))
    write_report(evaluation, arguments.output, make_clips, arguments.samples)
    if not has_matplotlib():
        print("without plots: Matplotlib is not installed: pip install 'evacap[metrics]'")
    print(f"tables, plots and captions: {arguments.output}")
    return 0


def _evaluate_predictions(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..training.evaluation.predictions import evaluate_predictions

    if not arguments.predictions or not arguments.references or arguments.checkpoints or arguments.data:
        raise ValueError("give --predictions with --references, or checkpoints with --data")
    return evaluate_predictions(
        name_checkpoints(arguments.predictions),
        arguments.references,
        arguments.output,
        arguments.dataset,
        **_common(arguments),
    )


def _evaluate_checkpoints(arguments: argparse.Namespace) -> tuple[dict[str, Any] | None, "MakeClips"]:
    from ..training.cores import usable_cores
    from ..training.data.prepared_clips import PreparedClips
    from ..training.evaluation.evaluate import evaluate

    if not arguments.checkpoints or not arguments.data:
        raise ValueError("give checkpoints with --data, or --predictions with --references")
    workers = arguments.workers
    if workers is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(usable_cores() // processes, MAX_WORKERS)
    make_clips = partial(PreparedClips, arguments.data, arguments.split)
    folder = os.path.basename(os.path.normpath(arguments.data))
    evaluation = evaluate(
        name_checkpoints(arguments.checkpoints),
        make_clips,
        arguments.output,
        arguments.dataset or f"{folder} ({arguments.split})",
        shares=arguments.shuffle,
        frames=arguments.frames,
        num_beams=arguments.beams,
        max_clips=arguments.max_clips,
        batch_size=arguments.batch_size,
        num_workers=workers,
        dataset_id=arguments.dataset_id or folder,
        **_common(arguments),
    )
    return evaluation, make_clips


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("metrics", "seed", "resamples", "sentence_encoder", "fluency_detector")
    return {name: getattr(arguments, name) for name in names}


def name_checkpoints(values: list[str]) -> dict[str, str]:
    """Checkpoints by name: the part before a `=`, or as much of the end of the path as makes it unique.

    Raises:
        ValueError: If two have the same name.
    """
    split = [("", value) if "=" not in value or Path(value).exists() else value.split("=", 1) for value in values]
    paths = [Path(folder).resolve() if Path(folder).exists() else Path(folder) for _, folder in split]
    unnamed = {path.parts for (name, _), path in zip(split, paths) if not name}
    depth = 1
    while len({parts[-depth:] for parts in unnamed}) < len(unnamed):
        depth += 1
    named = {}
    for (name, folder), path in zip(split, paths):
        name = name or "/".join(path.parts[-depth:])
        if name in named:
            raise ValueError(f"two checkpoints are called {name!r}: give each once, or name them by NAME=CHECKPOINT")
        named[name] = folder
    return named
