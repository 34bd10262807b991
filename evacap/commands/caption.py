"""`evacap caption`: captions media files, and shows how far the picture was trusted."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..cli import positive_int, whole_number
from ..training.files import JsonLines, locked
from ..training.terminal import one_line, printable


if TYPE_CHECKING:
    from ..processing.pipeline_evacap import AudioVisualCaptioningPipeline

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Those of the feature extractor, which takes a second to import.
CHANNELS = ("average", "first")
# Suffixes that are searched for in folders; a file that is named itself may have any.
SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .flv .wmv .asf .3gp .ogv .mxf "
    ".wav .mp3 .flac .m4a .aac .ogg .oga .opus .aiff .aif .au .caf .wma .ac3 .eac3 .amr .wv .w64".split()
)
# For a run with an output file. On a CPU too, a batch reads the weights of the decoder once for all its clips.
BATCH_SIZE = 8
MAX_WORKERS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("media", nargs="+", help="media files, URLs, or folders, which are searched recursively")
    parser.add_argument("--model", help="model folder or Hub name (default: the bundled tiny checkpoint)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the fastest available)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: as saved)")
    parser.add_argument("--num-beams", type=positive_int, default=4, help="number of beams (default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        help=f"windows of a batch (default: {BATCH_SIZE} with --output, otherwise 1)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number,
        help=f"reading processes (default: with --output one for each core, at most {MAX_WORKERS}; otherwise 0)",
    )
    parser.add_argument(
        "--channels",
        choices=CHANNELS,
        help="how several sound channels become one (default: as the model was trained)",
    )
    parser.add_argument(
        "--audio-track",
        type=whole_number,
        metavar="N",
        help="number of the sound track of a file, counted from 0 (default: FFmpeg's choice)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line, with gate and agreement over time as far as the model has them (also with "
        "--output)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="write one JSON object per line as each file is done, with `file` and `text`, or `error`; files that it "
        "already has are skipped, so the same call continues where the last one stopped",
    )
    parser.add_argument("--retry-failed", action="store_true", help="try files with an error in --output again")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a model folder instead of this package's"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.retry_failed and not arguments.output:
        raise ValueError("--retry-failed needs --output: it says where the errors are")
    media = find_media(arguments.media)
    if arguments.output:
        return write_captions(arguments, media)
    return print_captions(arguments, media)


def find_media(names: Iterable[str]) -> list[str | Path]:
    """Lists each file once, in the order of the names, with the media files in and below a folder in its place.

    Hidden files and folders are left out.

    Returns:
        A `Path` for everything that exists, so that a file with a name like a URL is not taken for one; otherwise the
        name.

    Raises:
        ValueError: If a folder has no media file.
    """
    files = []
    for name in names:
        if not os.path.isdir(name):
            files.append(Path(name) if os.path.lexists(name) else name)
            continue
        found = [
            path
            for path in sorted(Path(name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(name).parts)
            and path.is_file()
        ]
        if not found:
            raise ValueError(f"{name}: no media files in this folder, such as .mp4 or .wav; name files to read others")
        files += found
    return list(dict.fromkeys(files))


def load_captioner(arguments: argparse.Namespace) -> "AudioVisualCaptioningPipeline":
    from transformers import pipeline

    import evacap

    from ..processing.model_processor import loading

    begin = time.perf_counter()
    model = arguments.model or evacap.TINY
    with loading(model):
        captioner = pipeline(
            evacap.TASK,
            model=model,
            device=arguments.device,
            # With `None` a folder could make it ask at the terminal.
            trust_remote_code=arguments.trust_remote_code,
            **({"dtype": arguments.dtype} if arguments.dtype else {}),
        )
    if arguments.channels:
        captioner.processor.feature_extractor.channels = arguments.channels
    print(f"loaded {printable(captioner.model.name_or_path)} in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return captioner


def print_captions(arguments: argparse.Namespace, media: list[str | Path]) -> int:
    captioner = load_captioner(arguments)
    gated = captioner.model.config.fusion_type == "gated_cross_attention"
    failures, begin = 0, time.perf_counter()

    def show(file: str | Path, result: dict[str, Any]) -> None:
        nonlocal failures, begin
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        if arguments.json:
            print(json.dumps({"media": str(file), **result}), flush=True)
        elif "error" not in result:
            print(f"{printable(file)}: {printable(result['text'])}")
            for chunk in result.get("chunks", []):
                print(f"  {chunk['timestamp'][0]:.2f}–{chunk['timestamp'][1]:.2f} s: {printable(chunk['text'])}")
            if gated:
                gate, entropy = fmean(result["gate"]), fmean(result["entropy"])
                print(f"  gate {gate:.2f} (0 ignores the picture, 1 trusts it), attention entropy {entropy:.2f}")
            print(f"  {seconds:.2f} s", flush=True)
        if "error" in result:
            failures += 1
            print(f"evacap caption: {one_line(result['error'])}", file=sys.stderr)

    caption(
        captioner,
        media,
        show,
        batch_size=arguments.batch_size or 1,
        num_workers=arguments.workers or 0,
        num_beams=arguments.num_beams,
        audio_track=arguments.audio_track,
        return_gate=gated,
        return_agreement=arguments.json and has_agreement(captioner),
    )
    return 1 if failures else 0


def write_captions(arguments: argparse.Namespace, media: list[str | Path]) -> int:
    output = arguments.output
    if output.exists() and not output.is_file():
        raise ValueError(
            f"{output} is not a regular file, so no call could go on with it. Give a file such as captions.jsonl; --json "
            "without --output prints the same."
        )
    with locked(output):
        lines, done = open_results(output, drop_failed=arguments.retry_failed)
        left = [file for file in media if str(file) not in done]
        failures = sum("error" in done[str(file)] for file in media if str(file) in done)
        if len(left) < len(media):
            print(
                f"{len(media) - len(left)} of {len(media)} files are in {printable(output)} already", file=sys.stderr
            )
        if left:
            failures += _append_captions(arguments, lines, left, total=len(media))
    if failures:
        print(
            f"evacap caption: {failures} of {len(media)} files failed: see `error` in {printable(output)}; "
            "--retry-failed tries them again",
            file=sys.stderr,
        )
    return 1 if failures else 0


def _append_captions(arguments: argparse.Namespace, lines: JsonLines, media: list[str | Path], total: int) -> int:
    from tqdm.auto import tqdm

    # Read when torch is loaded. Otherwise its idle threads spin on cores that the reading processes need, which took
    # five times as long with as many threads and processes as cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ..training.cores import usable_cores

    captioner = load_captioner(arguments)
    gated = arguments.json and captioner.model.config.fusion_type == "gated_cross_attention"
    failures = 0
    with tqdm(total=total, initial=total - len(media), unit="clip", smoothing=0.05) as progress:

        def write(file: str | Path, result: dict[str, Any]) -> None:
            nonlocal failures
            lines.append([{"file": str(file), **result}])
            failures += "error" in result
            progress.update()

        caption(
            captioner,
            media,
            write,
            batch_size=arguments.batch_size or BATCH_SIZE,
            num_workers=min(usable_cores(), MAX_WORKERS) if arguments.workers is None else arguments.workers,
            num_beams=arguments.num_beams,
            audio_track=arguments.audio_track,
            return_gate=gated,
            return_agreement=arguments.json and has_agreement(captioner),
        )
    return failures


def has_agreement(captioner: "AudioVisualCaptioningPipeline") -> bool:
    """Whether the model says how far the picture belongs to the sound."""
    config = captioner.model.config
    return config.fusion_type == "gated_cross_attention" and config.gate_type == "agreement"


def open_results(path: Path, drop_failed: bool = False) -> tuple[JsonLines, dict[str, dict[str, Any]]]:
    """Opens an output file to add results, and reads the results that it has, by file.

    An incomplete last line of a killed run is removed, and with `drop_failed` every line with an error.

    Raises:
        ValueError: If the file has other content.
    """
    lines = JsonLines(path, "file", _parse_result, "Give another --output.")
    results = dict(lines.recover())
    kept = {file: result for file, result in results.items() if not (drop_failed and "error" in result)}
    if len(kept) < len(results):
        lines.rewrite({"file": file, **result} for file, result in kept.items())
    return lines, kept


def _parse_result(result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    file = result.pop("file")
    if not isinstance(file, str) or not result.keys() & {"text", "error"}:
        raise ValueError("not a result")
    return file, result


def caption(
    captioner: "AudioVisualCaptioningPipeline",
    media: list[str | Path],
    take: Callable[[str | Path, dict[str, Any]], None],
    num_workers: int,
    batch_size: int,
    **options: Any,
) -> None:
    """Passes each file with its caption or error to `take`, in order, as soon as it is done.

    If a file crashes the process that reads it, for example in a decoder, no other file is lost: the files that were
    being read are read once more, each in its own process.
    """
    from torch.utils.data import Subset

    position = careful = 0
    while position < len(media):
        count = 1 if careful else len(media) - position
        # The signal of an ended process may arrive anywhere in this block, even in `take`.
        try:
            for result in captioner(
                Subset(media, range(position, position + count)),
                num_workers=num_workers,
                batch_size=batch_size,
                on_error="skip",
                **options,
            ):
                take(media[position], result)
                position, careful = position + 1, max(0, careful - 1)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            if careful:
                take(media[position], {"error": f"{media[position]}: it ended the process that read it: {error}"})
                position += 1
            print(f"evacap caption: {one_line(error)}", file=sys.stderr)
            # Enough for all files that the workers are reading, have ready, or were asked for.
            careful = 0 if careful else 4 * num_workers * batch_size
