"""Throughput over a folder of 10 s clips: reading alone, the model alone, and the pipeline that does both at once.

Reading overlaps with the model. If each has its own cores (a GPU beside the reading processes, or threads + workers ≤
cores), both together can be as fast as the slower one alone; the table has the *ratio*. If they share the cores, these
have to do the work of both, and the *bound* is the larger of that and the slower one alone:

    bound = max(seconds reading, seconds model, (core-seconds reading + core-seconds model) / cores)

Core-seconds are the processor time of all threads and processes. Run it with `OMP_WAIT_POLICY=passive`, as `evacap
caption --output` does: spinning threads would count as work and block the reading processes.
"""

import itertools
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertTokenizer, pipeline

import evacap
from benchmarks.measure import DTYPES, Results, argument_parser, interleave, markdown, seconds, summary
from benchmarks.models import make_config, make_model
from evacap.media_list import find_media
from evacap.modeling_evacap.presets import get_preset
from evacap.processing.model_processor import make_processor
from evacap.processing.pipeline_evacap import AudioVisualCaptioningPipeline
from evacap.training.cores import usable_cores
from evacap.training.files import write_text
from evacap.training.procedural.scenes import make_scene, write_clip


MODELS = ("tiny", "full")
GENERATION = {"num_beams": 4, "min_new_tokens": 20, "max_new_tokens": 20}
DISTINCT_CLIPS = 4
SETTINGS = ("model", "dtype", "threads", "workers", "batch_size", "clips", "media", "waiting")


def write_clips(folder: Path) -> list[str]:
    """Some clips of 10 s with 25 frames a second of 320 × 320 pixels, H.264 and AAC."""
    paths = [folder / f"{index}.mp4" for index in range(DISTINCT_CLIPS)]
    for index, path in enumerate(paths):
        write_clip(make_scene(0, "test", index, duration=10.0), path, fps=25, size=320)
    return [str(path) for path in paths]


def make_captioner(model: str, dtype: str, device: str, attention: str = "full") -> AudioVisualCaptioningPipeline:
    """The bundled checkpoint, or EVACap at the paper's size with random weights and a made-up vocabulary."""
    if model == "tiny":
        return pipeline(evacap.TASK, model=evacap.TINY, dtype=dtype, device=device)
    captioner = make_model(make_config("evacap", attention=attention), dtype, device)
    pieces = ["[PAD]", *(f"word{index}" for index in range(1, captioner.config.text_config.vocab_size))]
    for index, piece in ((100, "[UNK]"), (101, "[CLS]"), (102, "[SEP]"), (103, "[MASK]")):
        pieces[index] = piece
    tokenizer = BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)})
    processor = make_processor(captioner.config, get_preset("evacap").processing, tokenizer)
    return AudioVisualCaptioningPipeline(captioner, processor, device=device)


def core_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def clocked(run: Callable[[], Any], device: str) -> dict[str, float]:
    before = core_seconds()
    return {"seconds": seconds(run, device), "core_seconds": core_seconds() - before}


def measure(
    captioner: AudioVisualCaptioningPipeline, files: list[str], workers: int, batch_size: int, device: str, **options
) -> dict[str, Any]:
    """Median seconds and core-seconds of reading, model and both, and their ratios."""
    rows = torch.utils.data.Subset(files, range(len(files)))
    batches = list(captioner.window_loader(rows, workers, batch_size))

    def read() -> None:
        for _ in captioner.window_loader(rows, workers, batch_size):
            pass

    def model() -> None:
        for batch in batches:
            captioner.forward(batch.inputs, **GENERATION)

    def both() -> None:
        for _ in captioner(rows, num_workers=workers, batch_size=batch_size, **GENERATION):
            pass

    runs = {
        name: lambda run=run: clocked(run, device)
        for name, run in (("reading", read), ("model_alone", model), ("together", both))
    }
    figures = {
        name: {key: summary(value[key] for value in values) for key in ("seconds", "core_seconds")}
        for name, values in interleave(runs, **options).items()
    }
    read_s, model_s, both_s = (figures[name]["seconds"]["median"] for name in runs)
    shared = sum(figures[name]["core_seconds"]["median"] for name in ("reading", "model_alone")) / usable_cores()
    slower = max(read_s, model_s)
    return {**figures, "ratio": slower / both_s, "ratio_to_bound": max(slower, shared) / both_s}


def table(rows: list[dict[str, Any]]) -> str:
    header = [
        "model",
        "dtype",
        "threads",
        "workers",
        "batch",
        "waiting",
        "reading",
        "model alone",
        "together",
        "ratio",
        "ratio to bound",
    ]
    return (
        markdown(
            header,
            (
                [
                    *(row[name] for name in ("model", "dtype", "threads", "workers", "batch_size", "waiting")),
                    *(
                        f"{row['clips'] / row[name]['seconds']['median']:.2f} clips/s"
                        for name in ("reading", "model_alone", "together")
                    ),
                    f"{row['ratio']:.2f}",
                    f"{row['ratio_to_bound']:.2f}",
                ]
                for row in rows
            ),
        )
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("throughput", __doc__)
    cores = usable_cores()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--media", help="folder of clips (default: clips made for the purpose)")
    parser.add_argument(
        "--clips", nargs=2, type=int, default=(192, 24), metavar=("TINY", "FULL"), help="how many are read"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[8], dest="batches")
    parser.add_argument(
        "--shares",
        nargs="+",
        default=[f"{cores - cores // 2}:{max(1, cores // 2)}", f"{cores}:{cores}"],
        metavar="THREADS:WORKERS",
        help="threads of the model and processes that read (default: half of the cores each, and all cores for both)",
    )
    arguments = parser.parse_args(argv)
    results = Results(arguments.output, SETTINGS, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        media = find_media([arguments.media]) if arguments.media else write_clips(Path(folder))
        for model, dtype in itertools.product(arguments.models, arguments.dtypes):
            captioner = make_captioner(model, dtype, arguments.device)
            count = arguments.clips[MODELS.index(model)]
            files = list(itertools.islice(itertools.cycle(media), count))
            for share, batch_size in itertools.product(arguments.shares, arguments.batches):
                threads, workers = map(int, share.split(":"))
                settings = {
                    **{"model": model, "dtype": dtype, "threads": threads, "workers": workers},
                    **{"batch_size": batch_size, "clips": count, "media": arguments.media or "made"},
                    "waiting": os.environ.get("OMP_WAIT_POLICY", "active"),
                }
                if results.find(**settings):
                    continue
                all_threads = torch.get_num_threads()
                torch.set_num_threads(threads)
                figures = measure(
                    captioner,
                    files,
                    workers,
                    batch_size,
                    arguments.device,
                    repeats=arguments.repeats,
                    budget=arguments.budget,
                )
                torch.set_num_threads(all_threads)
                results.add({**settings, **figures})
    report = table(results.rows)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
