"""`evacap caption`: captions media files, and shows how far the picture was trusted."""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..cli import positive, positive_int, whole_number
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
BEAMS = 4
STANDARD_INPUT = "-"
# A model below this loads before a progress bar could be read.
SMALL_MODEL_BYTES = 2**28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "media",
        nargs="+",
        metavar="FILE",
        help="media files, URLs, folders, which are searched recursively, or - for standard input",
    )
    add_model_arguments(parser, "model folder or Hub name (default: the bundled checkpoint, which is for trying)")
    parser.add_argument(
        "--beams", "--num-beams", type=positive_int, help=f"number of beams (default: {BEAMS}; 1 with --temperature)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, metavar="N", help="longest caption (default: the model's own)"
    )
    parser.add_argument(
        "--temperature", type=positive, metavar="T", help="draw the words at random, with this temperature"
    )
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


def add_model_arguments(parser: argparse.ArgumentParser, model_help: str) -> None:
    """The options of [`load_captioner`], which the commands that run a captioner on media files share."""
    parser.add_argument("--model", help=model_help)
    parser.add_argument("--device", help="such as cpu or cuda (default: the fastest available)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: as saved)")
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads of the model (default: PyTorch's choice)"
    )
    parser.add_argument(
        "--channels",
        choices=CHANNELS,
        help="how several sound channels become one (default: as the model was trained)",
    )
    parser.add_argument("--quiet", action="store_true", help="print only results and errors")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a model folder instead of this package's"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.retry_failed and not arguments.output:
        raise ValueError("--retry-failed needs --output: it says where the errors are")
    media = find_media(arguments.media)
    require_some(media, "evacap caption")
    if arguments.output:
        return write_captions(arguments, media)
    return print_captions(arguments, media)


class StandardInput(io.BytesIO):
    """The media file on standard input, which can be read only once; its name is `-`."""

    name = STANDARD_INPUT

    def __init__(self) -> None:
        from ..processing.media_evacap import DOWNLOAD_BYTES

        super().__init__()
        if sys.stdin.isatty():
            raise ValueError("- is standard input, which is the terminal here: pipe a media file into it")
        while piece := sys.stdin.buffer.read(2**20):
            if self.tell() > DOWNLOAD_BYTES:
                raise ValueError(f"- holds more than {DOWNLOAD_BYTES:,} bytes; store it in a file first")
            self.write(piece)

    def __str__(self) -> str:
        return self.name


def find_media(names: Iterable[str]) -> list[str | Path | StandardInput]:
    """Lists each file once, in the order of the names, with the media files in and below a folder in its place.

    Hidden files and folders are left out.

    Returns:
        A `Path` for everything that exists, so that a file with a name like a URL is not taken for one; a
        [`StandardInput`] for `-`; otherwise the name.

    Raises:
        ValueError: If a folder has no media file.
    """
    files = []
    for name in dict.fromkeys(names):
        if name == STANDARD_INPUT:
            files.append(StandardInput())
            continue
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


def require_some(media: Iterable[str | Path | StandardInput], command: str) -> None:
    """Says which files are missing, before a model is loaded for them.

    Raises:
        FileNotFoundError: If there is none of the files.
    """
    from ..processing.media_evacap import is_url

    media = list(media)
    missing = [
        file for file in media if not isinstance(file, StandardInput) and not is_url(file) and not os.path.exists(file)
    ]
    if len(missing) == len(media):
        raise FileNotFoundError(
            f"{missing[0]}: there is no such file; check the path"
            if len(missing) == 1
            else f"there is none of the {len(missing)} files, such as {missing[0]}; check the paths"
        )
    for file in missing:
        print(f"{command}: {printable(file)}: there is no such file; the others are read", file=sys.stderr)


def load_captioner(arguments: argparse.Namespace) -> "AudioVisualCaptioningPipeline":
    """Loads the model that the options of [`add_model_arguments`] name."""
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    import evacap

    from ..processing.model_processor import loading

    begin = time.perf_counter()
    model = arguments.model or evacap.TINY
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quiet:
        logging.set_verbosity_error()
    with loading(model), _without_bar(arguments.quiet or _is_small(model)):
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
    if not arguments.quiet:
        seconds = time.perf_counter() - begin
        print(f"loaded {printable(captioner.model.name_or_path)} in {seconds:.1f} s", file=sys.stderr)
        if not arguments.model:
            print(
                "note: this is the bundled checkpoint, which is for trying: it knows eighteen kinds of synthesised "
                "sounds and no real recordings. For others, give --model.",
                file=sys.stderr,
            )
    return captioner


def _is_small(model: str) -> bool:
    return os.path.isdir(model) and sum(path.stat().st_size for path in Path(model).glob("*")) < SMALL_MODEL_BYTES


@contextmanager
def _without_bar(wanted: bool) -> Iterator[None]:
    """Loads weights without a progress bar if `wanted`."""
    from transformers.utils import logging

    if not wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` that the options ask for."""
    options: dict[str, Any] = {"num_beams": arguments.beams or (1 if arguments.temperature else BEAMS)}
    if arguments.temperature:
        options |= {"do_sample": True, "temperature": arguments.temperature}
    if arguments.max_new_tokens:
        options["max_new_tokens"] = arguments.max_new_tokens
    return options


def print_captions(arguments: argparse.Namespace, media: list[str | Path]) -> int:
    captioner = load_captioner(arguments)
    gated = captioner.model.config.fusion_type == "gated_cross_attention"
    failures, begin = 0, time.perf_counter()

    def show(file: str | Path, result: dict[str, Any]) -> None:
        nonlocal failures, begin
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        if arguments.json:
            print(json.dumps({"file": str(file), **result}), flush=True)
        elif "error" not in result:
            print(f"{printable(file)}: {printable(result['text'])}")
            for chunk in result.get("chunks", []):
                print(f"  {chunk['timestamp'][0]:.2f}–{chunk['timestamp'][1]:.2f} s: {printable(chunk['text'])}")
            if gated and not arguments.quiet:
                gate, entropy = fmean(result["gate"]), fmean(result["entropy"])
                print(f"  gate {gate:.2f} (0 ignores the picture, 1 trusts it), attention entropy {entropy:.2f}")
            if not arguments.quiet:
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
        **generation_options(arguments),
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
        # What standard input holds now need not be what it held then.
        left = [file for file in media if isinstance(file, StandardInput) or str(file) not in done]
        failures = sum("error" in done[str(file)] for file in media if file not in left)
        if len(left) < len(media) and not arguments.quiet:
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
    with tqdm(
        total=total, initial=total - len(media), unit="clip", smoothing=0.05, disable=arguments.quiet
    ) as progress:

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
            **generation_options(arguments),
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
