"""`evacap prepare`: makes features for training from media files and captions."""

import argparse
import re
from pathlib import Path

from ..cli import positive_int
from ..modeling_evacap.presets import PRESETS
from ..training.terminal import printable


SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audiocaps", metavar="CSV", help="one of AudioCaps' files; needs --media")
    source.add_argument("--manifest", metavar="FILE", help="a list of clips of your own, .jsonl or .csv")
    parser.add_argument("--media", metavar="FOLDER", help="folder with the clips of AudioCaps")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="the prepared folder; each split is added to it"
    )
    parser.add_argument(
        "--split", help="name of the split (default: train, validation or test, from the name of the list)"
    )
    processing = parser.add_mutually_exclusive_group()
    processing.add_argument("--model", metavar="FOLDER", help="a model folder or Hub name with the processor to use")
    processing.add_argument(
        "--preset", choices=PRESETS, default="evacap", help="or a variant of the paper (default: %(default)s)"
    )
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--num-frames", type=positive_int, metavar="N", help="number of frames to store for each clip, or"
    )
    frames.add_argument(
        "--fps",
        type=float,
        metavar="RATE",
        help="store all frames at this rate (default: the frames that the processor samples)",
    )
    parser.add_argument("--max-clips", type=positive_int, metavar="N", help="take only the first clips of the list")
    parser.add_argument(
        "--shard-size", type=positive_int, default=256, metavar="N", help="rows of a shard (default: %(default)s)"
    )
    parser.add_argument("--workers", type=positive_int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="seconds that a clip may take; one that takes longer twice is left out (default: %(default)g)",
    )
    parser.add_argument(
        "--accept-failures",
        action="store_true",
        help="complete the split without the clips whose failure may pass, such as a missing file",
    )
    parser.add_argument(
        "--jpeg-quality", type=positive_int, default=95, help="quality of the frames (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..training.data.audiocaps import read_audiocaps
    from ..training.data.manifest import read_manifest
    from ..training.data.prepare import prepare

    if (arguments.audiocaps is None) != (arguments.media is None):
        raise ValueError("--audiocaps and --media belong together: the captions, and the folder with the clips")
    source = arguments.audiocaps or arguments.manifest
    if arguments.audiocaps is not None:
        entries = read_audiocaps(arguments.audiocaps, arguments.media)
    else:
        entries = read_manifest(arguments.manifest)
    split = arguments.split or split_of(source)
    try:
        counts = prepare(
            entries[: arguments.max_clips],
            arguments.output,
            _processor(arguments.model, arguments.preset),
            split,
            num_frames=arguments.num_frames,
            fps=arguments.fps,
            jpeg_quality=arguments.jpeg_quality,
            shard_size=arguments.shard_size,
            num_workers=arguments.workers,
            time_limit=arguments.time_limit,
            accept_failures=arguments.accept_failures,
        )
    except KeyboardInterrupt:
        print("evacap prepare: stopped; the same command goes on from here")
        return 130
    print(
        f"{split}: {counts['clips']:,} of {counts['rows']:,} clips, {counts['without_picture']:,} of them without a "
        f"picture, {counts['damaged']:,} damaged but usable"
    )
    if counts["clips"] < counts["rows"] or counts["damaged"]:
        print(printable(f"why: {Path(arguments.output) / 'report.jsonl'}"))
    return 0


def split_of(source: str) -> str:
    """The split in the name of a list, or of its folder; `"train"` if there is none."""
    for name in (Path(source).stem, Path(source).resolve().parent.name):
        words = re.split(r"[^a-z]+", name.lower())
        for split, synonyms in SPLITS.items():
            if any(word in words for word in synonyms):
                return split
    return "train"


def _processor(model: str | None, preset: str):
    from ..processing.model_processor import load_processor, make_processor
    from ..training.procedural.captions import build_tokenizer

    if model is not None:
        return load_processor(model)
    chosen = PRESETS[preset]
    # Features do not depend on the tokenizer, but a processor needs one.
    return make_processor(chosen.config(), chosen.processing, build_tokenizer())
