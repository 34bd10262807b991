"""`evacap prepare`: makes features for training from media files and captions."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import positive_int
from ..modeling_evacap.presets import PRESETS
from ..stream_captions import Captions, add_caption_arguments, captions_of, read_captions
from ..training.terminal import printable


if TYPE_CHECKING:
    from ..training.data.manifest import Entry

SPLITS = {
    "train": ("train", "training", "development"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "evaluation"),
}
WITH_MEDIA = {
    "audiocaps": "one of AudioCaps' files, version 1 or 2",
    "clotho": "one of Clotho's caption files",
    "vggsound": "VGGSound's file, of which --split (train or test) is taken; labels are captions",
}
"""The data sets that are a list of captions, and a folder with clips."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    for name, title in WITH_MEDIA.items():
        source.add_argument(f"--{name}", metavar="CSV", help=f"{title}; needs --media")
    source.add_argument(
        "--folder",
        help="clips of your own, with metadata.csv or .jsonl as `datasets` has it, or NAME.txt beside NAME.mp4",
    )
    source.add_argument(
        "--webdataset", nargs="+", metavar="SHARD", help=".tar files with KEY.mp4 and KEY.json or KEY.txt"
    )
    source.add_argument("--manifest", metavar="FILE", help="a list of clips of your own, .jsonl or .csv")
    parser.add_argument("--media", metavar="FOLDER", help="folder with the clips of the CSV file")
    parser.add_argument(
        "--no-captions",
        action="store_true",
        help="prepare the clips of --folder or --manifest without captions, for `evacap train align`",
    )
    parser.add_argument(
        "--video-features",
        metavar="FOLDER",
        help="instead of pictures, ID.npy of this folder for each clip: vectors of a video tower, (frames, width)",
    )
    add_caption_arguments(parser)
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="the prepared folder; each split is added to it"
    )
    parser.add_argument(
        "--split", help="name of the split (default: train, validation or test, from the name of the list or folder)"
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
    from ..training.data.prepare import prepare

    entries, split = read_clips(arguments)
    if arguments.video_features is not None:
        entries = with_features(entries, Path(arguments.video_features))
    captions = read_captions(arguments)
    if captions:
        entries = with_captions(entries, captions)
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


def with_features(entries: list["Entry"], folder: Path) -> list["Entry"]:
    """The clips with the vectors of `folder` instead of their pictures."""
    found = {entry.id: str(folder / f"{entry.id}.npy") for entry in entries if (folder / f"{entry.id}.npy").is_file()}
    if not found:
        raise ValueError(f"{folder}: has no file of the clips, such as {entries[0].id}.npy")
    return [replace(entry, video=None, frames=None, video_features=found.get(entry.id)) for entry in entries]


def with_captions(entries: list["Entry"], captions: Captions) -> list["Entry"]:
    """The clips with `audio_caption` and `video_caption` among their fields, those of the window in which they begin."""
    from ..processing.pipeline_evacap import caption_at

    found = []
    for entry in entries:
        said = captions_of(captions, audio=entry.media or entry.audio, video=entry.media or entry.video)
        sentences = {name: caption_at(of_windows, entry.start) for name, of_windows in said.items()}
        found.append({name: sentence for name, sentence in sentences.items() if sentence is not None})
    for name, of_files in captions.items():
        lacking = [entry.id for entry, those in zip(entries, found) if name not in those]
        if len(lacking) == len(entries):
            raise ValueError(
                f"none of the {len(entries)} clips has an `{name}`: of {len(of_files)} captioned files, such as "
                f"{next(iter(of_files), 'none')}, none is one of theirs, such as {entries[0].path}"
            )
        if lacking:
            print(f"note: {len(lacking)} of {len(entries)} clips have no `{name}`, such as {printable(lacking[0])}")
    return [replace(entry, extra={**entry.extra, **those}) for entry, those in zip(entries, found)]


def read_clips(arguments: argparse.Namespace) -> tuple[list["Entry"], str]:
    """The clips that the options name, and their split."""
    from ..training.data.audiocaps import read_audiocaps
    from ..training.data.clotho import read_clotho
    from ..training.data.manifest import read_manifest
    from ..training.data.media_folder import read_folder
    from ..training.data.vggsound import read_vggsound
    from ..training.data.webdataset import read_webdataset

    with_media = next((name for name in WITH_MEDIA if getattr(arguments, name) is not None), None)
    if with_media and arguments.media is None:
        raise ValueError(f"--{with_media} needs --media, the folder with the clips")
    if not with_media and arguments.media is not None:
        raise ValueError(f"--media belongs to --{', --'.join(WITH_MEDIA)}, which are lists without their clips")
    if arguments.no_captions and not (arguments.folder or arguments.manifest):
        raise ValueError("--no-captions belongs to --folder and --manifest; the other lists have captions")
    shards = arguments.webdataset
    source = getattr(arguments, with_media) if with_media else arguments.manifest or arguments.folder or shards[0]
    split = arguments.split or split_of(source)
    if arguments.audiocaps:
        return read_audiocaps(source, arguments.media), split
    if arguments.clotho:
        return read_clotho(source, arguments.media), split
    if arguments.vggsound:
        return read_vggsound(source, arguments.media, split), split
    if arguments.folder:
        return read_folder(source, not arguments.no_captions), split
    return (read_webdataset(shards) if shards else read_manifest(source, not arguments.no_captions)), split


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
