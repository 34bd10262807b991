"""`evacap caption`: captions media files, as text, tables or subtitles."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..caption_files import FORMATS, SUBTITLES, TIMED, format_captions, format_of, write_captions
from ..caption_outputs import Outputs, plan_outputs
from ..caption_processes import Processes, is_launched
from ..cli import positive, positive_int, whole_number
from ..media_list import STANDARD_INPUT, Media, find_media, require_some
from ..stream_captions import Captions, add_caption_arguments, captions_of, read_captions, require_captions
from ..training.files import JsonLines, locked
from ..training.terminal import one_line, printable


if TYPE_CHECKING:
    from ..processing.pipeline_evacap import AudioVisualCaptioningPipeline

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Those of the feature extractor, which takes a second to import.
CHANNELS = ("average", "first")
# For a run with an output file. On a CPU too, a batch reads the weights of the decoder once for all its clips.
BATCH_SIZE = 8
MAX_WORKERS = 16
BEAMS = 4
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
    add_caption_arguments(parser)
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
        "--format",
        action="append",
        default=[],
        choices=FORMATS,
        help="print this, or, several times, write these files for each clip into the folder of --output",
    )
    parser.add_argument(
        "--output",
        action="append",
        default=[],
        type=Path,
        metavar="FILE|FOLDER",
        help="write a file of all captions, in the format of its suffix (.txt, .json, .jsonl, .csv, .tsv; .srt and .vtt "
        "for a single clip), or a file for each clip and --format into a folder. Can be given several times. A .jsonl "
        "file and a folder get each clip as soon as it is done, and what they have already is skipped, so the same "
        "call continues where the last one stopped",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="try files with an error in the .jsonl file of --output again"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="JSON with gate and agreement over time, and the confidence of words, as far as the model has them; without --output and --format, print "
        "a JSON object a line",
    )
    parser.add_argument(
        "--window", type=positive, metavar="SECONDS", help="length of the windows (default: what one caption covers)"
    )
    parser.add_argument(
        "--hop",
        type=positive,
        metavar="SECONDS",
        help="a window begins every so many seconds (default: no overlap). Windows that overlap have the middle between "
        "them as their border, and neighbours with the same caption become one event",
    )
    parser.add_argument("--start", type=seconds, metavar="SECONDS", help="caption each file from there on")
    parser.add_argument("--end", type=positive, metavar="SECONDS", help="caption each file up to there")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="one event for neighbouring windows with the same caption, also without --hop",
    )
    parser.add_argument("--sdh", action="store_true", help="subtitles for the deaf and hard of hearing: [dog barks]")
    parser.add_argument(
        "--cue-settings",
        default="",
        metavar="SETTINGS",
        help="settings of WebVTT's cues, such as 'line:0 align:start'",
    )


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


def seconds(text: str) -> float:
    """An argument that must be seconds, 0 or more."""
    return 0.0 if text.strip("0.") == "" and text.strip(".") else positive(text)


def run(arguments: argparse.Namespace) -> int:
    if arguments.end is not None and arguments.end <= (arguments.start or 0):
        raise ValueError(f"--end {arguments.end:g} is not after --start {arguments.start:g}")
    outputs = plan_outputs(arguments)
    if is_launched() and (not arguments.output or STANDARD_INPUT in arguments.media):
        raise ValueError("several processes cannot share the terminal or standard input: give files, and --output")
    media = find_media(arguments.media)
    outputs.name_clips(media, arguments.media)
    require_some(media, "evacap caption")
    # Before a model is loaded for them.
    arguments.captions = read_captions(arguments)
    return write_outputs(arguments, media, outputs) if arguments.output else print_captions(arguments, media, outputs)


def load_captioner(arguments: argparse.Namespace) -> "AudioVisualCaptioningPipeline":
    """Loads the model that the options of [`add_model_arguments`] name."""
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    import evacap

    from ..processing.captioning_evacap import reads_captions
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
    require_captions(arguments, model, reads_captions(captioner.model.config))
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


def print_captions(arguments: argparse.Namespace, media: list[Media], outputs: Outputs) -> int:
    form = outputs.formats[0] if outputs.formats else "jsonl" if arguments.json else None
    captioner = load_captioner(arguments)
    gated = captioner.model.config.fusion_type == "gated_cross_attention"
    results, failures, begin = [], 0, time.perf_counter()

    def show(file: Media, result: dict[str, Any]) -> None:
        nonlocal failures, begin
        seconds, begin = time.perf_counter() - begin, time.perf_counter()
        named = {"file": str(file), **result}
        if form == "jsonl":
            print(json.dumps(named), flush=True)
        elif form is not None:
            results.append(named)
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
        captions=arguments.captions,
        **caption_options(arguments, captioner, outputs, with_gate=form is None or arguments.json),
    )
    if results and not (form in SUBTITLES and failures):
        print(format_captions(results, form, **outputs.options(form)), end="", flush=True)
    return 1 if failures else 0


def write_outputs(arguments: argparse.Namespace, media: list[Media], outputs: Outputs) -> int:
    """Captions the files that the outputs do not have yet, and writes the outputs.

    Several processes divide these files among themselves. Each adds to the file of JSON lines, in one write a line, and
    to the folder; the first reads and writes all else.
    """
    processes = Processes(arguments)
    with ExitStack() as locks:
        results: dict[str, dict[str, Any]] = {}
        left: list[Media] = []
        if processes.is_main:
            results, left = _begin(arguments, media, outputs, locks)
        left = processes.share(left)
        failures = sum("error" in result for result in results.values())
        own = _caption_share(arguments, outputs, processes.part(left), len(media) - len(left)) if left else (0, {})
        for failed, new in processes.gather(own):
            failures += failed
            results |= new
        if not processes.is_main:
            return 0
        for path in outputs.files:
            named = [{"file": str(file), **results[str(file)]} for file in media]
            form = format_of(path)
            if form not in SUBTITLES or not failures:
                write_captions(named, path, **outputs.options(form))
    if failures:
        advice = f": see `error` in {printable(outputs.journal)}; --retry-failed tries them again"
        print(
            f"evacap caption: {failures} of {len(media)} files failed{advice if outputs.journal else ''}",
            file=sys.stderr,
        )
    return 1 if failures else 0


def _begin(
    arguments: argparse.Namespace, media: list[Media], outputs: Outputs, locks: ExitStack
) -> tuple[dict[str, dict[str, Any]], list[Media]]:
    """Locks the outputs; the results that they have of the files, by name, and the files that are left."""
    if outputs.folder:
        outputs.folder.mkdir(parents=True, exist_ok=True)
    for path in filter(None, (outputs.journal, *outputs.files, outputs.folder)):
        locks.enter_context(locked(path))
    results = {}
    if outputs.journal:
        _, results = open_results(outputs.journal, drop_failed=arguments.retry_failed)
        # What standard input holds now need not be what it held then.
        results.pop(STANDARD_INPUT, None)
    left = [file for file in media if str(file) not in results]
    if outputs.folder and not outputs.journal and not outputs.files:
        left = [file for file in left if not all(path.is_file() for path in outputs.clip_files[str(file)])]
    for file in media:
        if str(file) in results and not all(path.is_file() for path in outputs.clip_files.get(str(file), [])):
            outputs.write_clip(str(file), results[str(file)])
    if len(left) < len(media) and not arguments.quiet:
        where = printable(outputs.journal or outputs.folder)
        print(f"{len(media) - len(left)} of {len(media)} files are in {where} already", file=sys.stderr)
    return {str(file): results[str(file)] for file in media if str(file) in results}, left


def _caption_share(
    arguments: argparse.Namespace, outputs: Outputs, media: list[Media], done: int
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Captions the files of this process; the number of errors, and the results that files of all clips need."""
    failures, results = 0, {}

    def take(file: Media, result: dict[str, Any]) -> None:
        nonlocal failures
        if outputs.journal:
            results_file(outputs.journal).append([{"file": str(file), **result}])
        outputs.write_clip(str(file), result)
        failures += "error" in result
        if outputs.files:
            results[str(file)] = result
        if "error" in result and not outputs.journal:
            tqdm_write(f"evacap caption: {one_line(result['error'])}")

    if media:
        _caption_with_progress(arguments, media, take, done + len(media), outputs)
    return failures, results


def tqdm_write(text: str) -> None:
    """Prints a line to the standard error stream above a progress bar."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)


def _caption_with_progress(
    arguments: argparse.Namespace,
    media: list[Media],
    take: Callable[[Media, dict[str, Any]], None],
    total: int,
    outputs: Outputs,
) -> None:
    from tqdm.auto import tqdm

    # Read when torch is loaded. Otherwise its idle threads spin on cores that the reading processes need, which took
    # five times as long with as many threads and processes as cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ..training.cores import usable_cores

    captioner = load_captioner(arguments)
    done = total - len(media)
    with tqdm(total=total, initial=done, unit="clip", smoothing=0.05, disable=arguments.quiet) as progress:

        def take_and_count(file: Media, result: dict[str, Any]) -> None:
            take(file, result)
            progress.update()

        caption(
            captioner,
            media,
            take_and_count,
            batch_size=arguments.batch_size or BATCH_SIZE,
            num_workers=min(usable_cores(), MAX_WORKERS) if arguments.workers is None else arguments.workers,
            captions=arguments.captions,
            **caption_options(arguments, captioner, outputs, with_gate=arguments.json),
        )


def window_options(arguments: argparse.Namespace, longest: float) -> dict[str, Any]:
    """What the pipeline calls `--window`, `--hop`, `--start` and `--end`, for a model whose captions cover `longest` s.

    Raises:
        ValueError: If they are out of range.
    """
    from ..processing.processing_evacap import NEGLIGIBLE_SECONDS

    window = longest if arguments.window is None else arguments.window
    hop = window if arguments.hop is None else arguments.hop
    for option, value, most in (("--window", window, longest), ("--hop", hop, window)):
        if not NEGLIGIBLE_SECONDS <= value <= most:
            raise ValueError(f"{option} must be between {NEGLIGIBLE_SECONDS} and {most:g} s here, got {value:g}")
    return {
        "chunk_length_s": window,
        "stride_length_s": (window - hop) / 2,
        "start": arguments.start,
        "end": arguments.end,
    }


def caption_options(
    arguments: argparse.Namespace, captioner: "AudioVisualCaptioningPipeline", outputs: Outputs, with_gate: bool
) -> dict[str, Any]:
    """The arguments of a call of the pipeline."""
    options = generation_options(arguments)
    if outputs.all_formats & set(TIMED):
        options["return_timestamps"] = True
    if arguments.merge:
        options["merge_chunks"] = True
    return options | {
        **window_options(arguments, captioner.processor.window_seconds),
        "audio_track": arguments.audio_track,
        "return_gate": with_gate and captioner.model.config.fusion_type == "gated_cross_attention",
        "return_agreement": arguments.json and has_agreement(captioner),
        "return_confidence": arguments.json and captioner.model.config.text_fusion == "adaptive",
    }


def has_agreement(captioner: "AudioVisualCaptioningPipeline") -> bool:
    """Whether the model says how far the picture belongs to the sound."""
    config = captioner.model.config
    return config.fusion_type == "gated_cross_attention" and config.gate_type == "agreement"


def results_file(path: Path) -> JsonLines:
    """A file with a result a line."""
    return JsonLines(path, "file", _parse_result, "Give another --output.")


def open_results(path: Path, drop_failed: bool = False) -> tuple[JsonLines, dict[str, dict[str, Any]]]:
    """Opens an output file to add results, and reads the results that it has, by file.

    An incomplete last line of a killed run is removed, and with `drop_failed` every line with an error.

    Raises:
        ValueError: If the file has other content.
    """
    lines = results_file(path)
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
    media: list[Media],
    take: Callable[[Media, dict[str, Any]], None],
    num_workers: int,
    batch_size: int,
    captions: Captions | None = None,
    **options: Any,
) -> None:
    """Passes each file with its caption or error to `take`, in order, as soon as it is done.

    `captions` are those of single streams, for a model that reads them.

    If a file crashes the process that reads it, for example in a decoder, no other file is lost: the files that were
    being read are read once more, each in its own process.
    """
    from torch.utils.data import Subset

    inputs: list[Any] = list(media)
    if captions:
        inputs = [{"media": file, **captions_of(captions, audio=file, video=file)} for file in media]
    position = careful = 0
    while position < len(media):
        count = 1 if careful else len(media) - position
        # The signal of an ended process may arrive anywhere in this block, even in `take`.
        try:
            for result in captioner(
                Subset(inputs, range(position, position + count)),
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
