"""`evacap caption`: captions media files, and tells how far the picture was trusted."""

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


if TYPE_CHECKING:
    from ..processing.pipeline_evacap import AudioVisualCaptioningPipeline

DTYPES = ("auto", "float32", "bfloat16", "float16")
# As of the feature extractor, which takes a second to import.
CHANNELS = ("average", "first")
# What is looked for in a folder; a file that is named may be called anything.
SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .flv .wmv .asf .3gp .ogv .mxf "
    ".wav .mp3 .flac .m4a .aac .ogg .oga .opus .aiff .aif .au .caf .wma .ac3 .eac3 .amr .wv .w64".split()
)
# Of a run that writes a file: on a CPU, too, a batch reads the decoder's weights once for all its clips.
BATCH_SIZE = 8
MAX_WORKERS = 16

_LINE = b'{"file": '


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "media", nargs="+", help="media files, URLs, or folders, which are searched with all below them"
    )
    parser.add_argument("--model", help="model folder or Hub name (default: the bundled tiny checkpoint)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they were saved)")
    parser.add_argument("--num-beams", type=positive_int, default=4, help="beams of the search (default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        help=f"windows captioned at a time (default: {BATCH_SIZE} with --output, else 1)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number,
        help=f"processes that read (default: one a core with --output, {MAX_WORKERS} at most, else 0)",
    )
    parser.add_argument(
        "--channels",
        choices=CHANNELS,
        help="what becomes of a sound with several channels (default: as the model was trained)",
    )
    parser.add_argument(
        "--audio-track",
        type=whole_number,
        metavar="N",
        help="which of a file's sound tracks to hear, counted from 0 (default: FFmpeg's choice)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line, with the gate over time (also with --output)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="write a JSON object a line as each file is done, with `file` and `text`, or `error`; files that it has "
        "already are skipped, so the same call goes on where the last one stopped",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="try the files again that have an error in --output"
    )
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


def find_media(names: Iterable[str]) -> list[str]:
    """
    Each file once, in the order of the names, folders replaced by the media files in and below them in the order of
    their paths; hidden files and folders are left out.

    Raises:
        ValueError: a folder has no media file.
    """
    files = []
    for name in names:
        if not os.path.isdir(name):
            files.append(name)
            continue
        found = [
            _as_path(path)
            for path in sorted(Path(name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(name).parts)
            and path.is_file()
        ]
        if not found:
            raise ValueError(f"{name}: no media files in this folder, such as .mp4 or .wav; name files to read others")
        files += found
    return list(dict.fromkeys(files))


def _as_path(path: Path) -> str:
    """A name that is read as a path: in the folder `.` a file may be called `file:x.mp4`, which is an address."""
    name = str(path)
    return os.path.join(os.curdir, name) if ":" in path.parts[0] and not path.is_absolute() else name


def load_captioner(arguments: argparse.Namespace) -> "AudioVisualCaptioningPipeline":
    from transformers import pipeline

    import evacap

    begin = time.perf_counter()
    model = arguments.model or evacap.TINY
    try:
        captioner = pipeline(
            evacap.TASK,
            model=model,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code or None,
            **({"dtype": arguments.dtype} if arguments.dtype else {}),
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{model} cannot be loaded: {error}") from error
    if arguments.channels:
        captioner.processor.feature_extractor.channels = arguments.channels
    print(f"loaded {captioner.model.name_or_path} in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return captioner


def print_captions(arguments: argparse.Namespace, media: list[str]) -> int:
    captioner = load_captioner(arguments)
    gated = captioner.model.config.fusion_type == "gated_cross_attention"
    failures, begin = 0, time.perf_counter()

    def show(file: str, result: dict[str, Any]) -> None:
        nonlocal failures, begin
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        if arguments.json:
            print(json.dumps({"media": file, **result}), flush=True)
        elif "error" not in result:
            print(f"{file}: {result['text']}")
            for chunk in result.get("chunks", []):
                print(f"  {chunk['timestamp'][0]:.2f}–{chunk['timestamp'][1]:.2f} s: {chunk['text']}")
            if gated:
                gate, entropy = fmean(result["gate"]), fmean(result["entropy"])
                print(f"  gate {gate:.2f} (0 ignores the picture, 1 trusts it), attention entropy {entropy:.2f}")
            print(f"  {seconds:.2f} s", flush=True)
        if "error" in result:
            failures += 1
            print(f"evacap caption: {result['error']}", file=sys.stderr)

    caption(
        captioner,
        media,
        show,
        batch_size=arguments.batch_size or 1,
        num_workers=arguments.workers or 0,
        num_beams=arguments.num_beams,
        audio_track=arguments.audio_track,
        return_gate=gated,
    )
    return 1 if failures else 0


def write_captions(arguments: argparse.Namespace, media: list[str]) -> int:
    output = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(output, drop_failed=arguments.retry_failed)
    left = [file for file in media if file not in done]
    failures = sum("error" in done[file] for file in media if file in done)
    if len(left) < len(media):
        print(f"{len(media) - len(left)} of {len(media)} files are in {output} already", file=sys.stderr)
    if left:
        failures += _append_captions(arguments, left, total=len(media))
    if failures:
        print(
            f"evacap caption: {failures} of {len(media)} files failed: see `error` in {output}; --retry-failed tries "
            "them again",
            file=sys.stderr,
        )
    return 1 if failures else 0


def _append_captions(arguments: argparse.Namespace, media: list[str], total: int) -> int:
    from tqdm.auto import tqdm

    # Read when torch is loaded: its threads would wait actively, on cores that the reading processes need. With as many
    # of either as cores that took five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ..training.data.worker_pool import usable_cores

    captioner = load_captioner(arguments)
    gated = arguments.json and captioner.model.config.fusion_type == "gated_cross_attention"
    failures = 0
    with (
        arguments.output.open("a", encoding="utf-8") as lines,
        tqdm(total=total, initial=total - len(media), unit="clip", smoothing=0.05) as progress,
    ):

        def write(file: str, result: dict[str, Any]) -> None:
            nonlocal failures
            lines.write(json.dumps({"file": file, **result}) + "\n")
            lines.flush()
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
        )
    return failures


def read_results(path: Path, drop_failed: bool = False) -> dict[str, dict[str, Any]]:
    """
    The results that an output file holds, by file.

    Half a line at the end, as a killed run can leave it, is cut off from the file, and with `drop_failed` every line
    that has an error.

    Raises:
        ValueError: the file holds something else.
    """
    from ..training.files import write_text

    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rest = data[len(whole) :]
    results = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            result = json.loads(line)
            results[result.pop("file")] = result
            known = "text" in result or "error" in result
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise ValueError(f"{path}: line {number} is no caption that this command wrote; give another --output")
    if rest[: len(_LINE)] != _LINE[: len(rest)]:
        raise ValueError(f"{path}: its end is no caption that this command wrote; give another --output")
    kept = {file: result for file, result in results.items() if not (drop_failed and "error" in result)}
    if len(kept) < len(results):
        write_text(path, "".join(json.dumps({"file": file, **result}) + "\n" for file, result in kept.items()))
    elif rest:
        os.truncate(path, len(whole))
    return kept


def caption(
    captioner: "AudioVisualCaptioningPipeline",
    media: list[str],
    take: Callable[[str, dict[str, Any]], None],
    num_workers: int,
    batch_size: int,
    **options: Any,
) -> None:
    """
    Hands each file with its caption or error to `take`, in their order, as soon as it is done.

    A file that ends the process which reads it, as damage can that a decoder is not proof against, costs no other one:
    those that were being read then are read once more, each in a process of its own.
    """
    from torch.utils.data import Subset

    position = careful = 0
    while position < len(media):
        count = 1 if careful else len(media) - position
        # The signal of a process that ended may arrive anywhere in here, in `take`, too.
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
            print(f"evacap caption: {' '.join(str(error).split())}", file=sys.stderr)
            # Enough for what the workers hold: what they are reading, what they have ready, what they were asked for.
            careful = 0 if careful else 4 * num_workers * batch_size
