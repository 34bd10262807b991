"""The cost of `evacap prepare`: clips per second, bytes of a clip, and memory, which must not grow with the clips.

    python -m benchmarks.preparation --clips 64

A few procedural clips with the usual size of AudioCaps clips (or those of `--manifest`) are prepared repeatedly under
new ids, once as many as asked for and once four times as many. The rate is computed from the difference of the two
runs, so the start of the workers does not count.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from benchmarks.measure import machine, markdown
from evacap.modeling_evacap.presets import PRESETS, get_preset
from evacap.processing.model_processor import make_processor
from evacap.training.data.manifest import Entry, read_manifest
from evacap.training.data.prepare import prepare
from evacap.training.procedural.captions import build_tokenizer
from evacap.training.procedural.scenes import write_dataset


DISTINCT_CLIPS = 8
SAMPLING_SECONDS = 0.5


def prepare_clips(entries: list[Entry], output: Path, preset: str, num_workers: int) -> None:
    chosen = get_preset(preset)
    processor = make_processor(chosen.config(), chosen.processing, build_tokenizer())
    prepare(entries, output, processor, num_workers=num_workers)


def resident_bytes(process: int) -> int:
    """The memory of a process and its descendants; shared memory is counted once. Linux only."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        children = [task.read_text().split() for task in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # It ended in between.
        return total
    return total + sum(resident_bytes(int(child)) for group in children for child in group)


def measure(entries: list[Entry], output: Path, preset: str, num_workers: int) -> dict[str, float]:
    """Seconds, peak bytes of memory and bytes on disk of one preparation in its own processes."""
    process = multiprocessing.get_context("spawn").Process(
        target=prepare_clips, args=(entries, output, preset, num_workers)
    )
    start, peak = time.perf_counter(), 0
    process.start()
    while process.is_alive():
        peak = max(peak, resident_bytes(process.pid))
        process.join(SAMPLING_SECONDS)
    if process.exitcode:
        raise RuntimeError(f"the preparation of {len(entries)} clips ended with status {process.exitcode}")
    size = sum(path.stat().st_size for path in output.glob("data/*.parquet"))
    return {"seconds": time.perf_counter() - start, "memory": peak, "disk": size}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparation", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=64, help="of the smaller run (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="(default: 1, all)"
    )
    parser.add_argument("--preset", choices=PRESETS, default="evacap", help="(default: %(default)s)")
    parser.add_argument("--manifest", help="clips of your own instead of procedural ones")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = arguments.manifest or write_dataset(
            Path(folder, "clips"), "train", DISTINCT_CLIPS, seed=0, duration=10.0, fps=25, size=360
        )
        distinct = read_manifest(manifest)
        for workers in arguments.workers:
            runs = []
            for clips in (arguments.clips, 4 * arguments.clips):
                entries = [replace(entry, id=str(i)) for i, entry in enumerate(islice(cycle(distinct), clips))]
                runs.append((clips, measure(entries, Path(folder, f"{workers}-{clips}"), arguments.preset, workers)))
            (fewer, first), (more, second) = runs
            rate = (more - fewer) / (second["seconds"] - first["seconds"])
            memory = " → ".join(f"{run['memory'] / 2**20:.0f}" for _, run in runs)
            size = f"{second['disk'] / more / 1000:.0f}"
            rows.append([workers, f"{rate:.2f}", f"{rate / workers:.2f}", size, memory])
    print(machine("cpu"))
    memory = f"memory at {arguments.clips} → {4 * arguments.clips} clips (MiB)"
    print(markdown(["workers", "clips/s", "clips/s per worker", "kB per clip", memory], rows))


if __name__ == "__main__":
    main()
