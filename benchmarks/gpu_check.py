"""What a GPU does to this project, in minutes: is it right, how fast is it, and how far from what the device can do.

Each part runs in a process of its own within its seconds, and what it has found is in the report even where it breaks
or runs out of time. A second call goes on where the first one stopped.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import compiling, device_checks, fusion, latency, training, video_tower
from benchmarks.measure import Results, default_device, machine, markdown
from benchmarks.models import SIZES
from evacap.training.files import write_text


FRAMES = 18
TESTS = ("tests/modeling_evacap/test_fusion_kernel.py", "tests/training/data/test_collator.py")
# The most seconds of each part at full size, in the order in which they run: the most telling first.
PARTS = {
    "fusion": 50,
    "checks": 80,
    "training": 50,
    "latency": 120,
    "compiled training": 60,
    "compiled captioning": 90,
    "compiled checks": 90,
    "tests": 45,
}
# The measurements of each part, one benchmark's file or several's.
FILES = {
    "device_checks": (device_checks, ("group", "check")),
    "fusion": (fusion, fusion.SETTINGS),
    "latency": (latency, latency.SETTINGS),
    "video_tower": (video_tower, video_tower.SETTINGS),
    "training": (training, training.SETTINGS),
    "compiling": (compiling, compiling.SETTINGS),
}


def commands(part: str, size: str, device: str) -> list[tuple[ModuleType, str]]:
    """The benchmarks of a part, with their options."""
    full = size == "full"
    frames, others = (FRAMES, "64 0 8 4 1") if full else (4, "0")
    captions = f"--beams 4 {'--repeats 3' if full else '--repeats 1 --new-tokens 4 --no-memory'}"
    bfloat16 = f"{captions} --dtypes bfloat16 --variants audio-only avcap evacap"
    batches = "64 8" if full else "2"
    step = f"--variants evacap --attentions sdpa --one-batch --frames {frames}"
    step += " --batch 64 --repeats 5 --warm-ups 2" if full else " --batch 2"
    step += "" if torch.device(device).type == "cpu" else " --precisions bfloat16"
    compiled = f"--frames {frames} --beams 4 --clips {3 if full else 1} --dtypes {'bfloat16' if full else 'float32'}"
    compiled += "" if full else " --new-tokens 4 --repeats 1"
    return {
        "fusion": [(fusion, "--batch 16 --frames 18 64 --repeats 10" if full else "--frames 4 --repeats 1")],
        "checks": [(device_checks, "")],
        "training": [(training, f"{step} --compile no")],
        "latency": [
            (video_tower, f"--frames {frames} --dtypes bfloat16 --repeats 3"),
            (latency, f"{captions} --frames {frames} --batch 1"),
            (latency, f"{bfloat16} --frames {frames} --batch {batches}"),
            (latency, f"{bfloat16} --frames {others} --batch {batches} 1"),
        ],
        "compiled training": [(training, f"{step} --compile yes --checkpointing no")],
        "compiled captioning": [(compiling, f"{compiled} --batch {number}") for number in ((64, 1) if full else (2,))],
        "compiled checks": [(device_checks, "--compiled")],
        "tests": [],
    }[part]


def run_part(part: str, folder: Path, size: str, device: str) -> None:
    """Runs one part in this process."""
    for benchmark, options in commands(part, size, device):
        file = folder / f"{benchmark.__name__.rpartition('.')[2]}.json"
        benchmark.main(["--size", size, "--device", device, "--output", str(file), *options.split()])
    if part == "tests":
        tests = TESTS if size == "full" else TESTS[1:]
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], check=True)


def run_in_time(arguments: argparse.Namespace, name: str, limit: float) -> dict[str, Any]:
    """Runs one part in a process of its own, its output in a file; what became of it."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", name, "--size", arguments.size]
    command += ["--device", arguments.device, "--output", str(arguments.output)]
    log = arguments.output / f"{name.replace(' ', '_')}.log"
    start = time.monotonic()
    with open(log, "wb") as file:
        # In a session of its own, so that its own processes end with it.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    outcome = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "done":
        outcome["output"] = log.read_text(errors="replace")[-3000:]
    return outcome


class Report:
    """What all parts have found, as `gpu_check.json` and `gpu_check.md` in a folder."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.path = folder / "gpu_check.json"
        self.parts: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self.parts = json.loads(self.path.read_text())["parts"]

    def results(self, name: str) -> Results:
        return Results(self.folder / f"{name}.json", FILES[name][1], self.device)

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(self.device), "parts": self.parts, "targets": list(self.targets())}
        write_text(self.path, json.dumps(found, indent=1) + "\n")
        write_text(self.path.with_suffix(".md"), self.markdown())

    def rate(self) -> float | None:
        """The operations a second of a large bfloat16 product, measured in this run."""
        row = self.results("device_checks").find(check="a large product's TFLOP/s in bfloat16")
        if row is not None:
            return row["value"] * 1e12
        return next(
            (row["peak_rate"] for row in self.results("training").rows if row["precision"] == "bfloat16"), None
        )

    def captioning(self) -> str:
        """Seconds, memory and share of the device's rate of a batch's captions."""
        rate, rows = self.rate(), []
        found = [row for row in self.results("latency").rows if "flops" in row]
        for row in sorted(found, key=lambda row: (row["dtype"], row["batch"], row["frames"], row["variant"])):
            total, operations = row["seconds"]["total"]["median"], row["flops"]["total"]
            share = rate and row["dtype"] == "bfloat16" and f"{operations / total / rate:.0%}"
            peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
            parts = [f"{row['seconds'][part]['median']:.3g}" for part in latency.PARTS]
            rows.append([row["dtype"], row["batch"], row["frames"], row["variant"], *parts, f"**{total:.3g}**"])
            rows[-1] += [f"{row['batch'] / total:.3g}", peak, f"{operations / total / 1e12:.3g}", share or "–"]
        header = ["dtype", "batch", "frames", "variant", *latency.PARTS, "seconds", "clips/s", "peak GB", "TFLOP/s"]
        return markdown([*header, "of the product's rate"], rows) + "\n"

    def targets(self) -> Iterator[dict[str, Any]]:
        """What was wanted, and what was found."""

        def target(what: str, found: float, wanted: float, at_most: bool = False) -> dict[str, Any]:
            reached = found <= wanted if at_most else found >= wanted
            return {"target": what, "found": found, "wanted": wanted, "at_most": at_most, "reached": reached}

        rate, captions = self.rate(), self.results("latency")
        for row in self.results("training").rows:
            kind = ", ".join(name for name in ("checkpointing", "compiled") if row[name]) or "plain"
            share = row["flops"] / row["step_seconds"]["median"] / row["peak_rate"]
            yield target(f"training, {row['precision']}, {kind}: share of the product's rate", share, 0.5)
        for row in captions.rows:
            if rate and row["variant"] == "evacap" and row["batch"] == 64 and row["dtype"] == "bfloat16":
                share = row["flops"]["total"] / row["seconds"]["total"]["median"] / rate
                yield target(f"captioning 64 clips of {row['frames']} frames: share of the rate", share, 0.4)
        tower = self.results("video_tower").find(dtype="bfloat16", attention="full", frames=FRAMES)
        one = {"dtype": "bfloat16", "batch": 1, "frames": FRAMES}
        ours, audio = (captions.find(**one, variant=variant) for variant in ("evacap", "audio-only"))
        if tower and ours and audio:
            floor = audio["seconds"]["total"]["median"] + tower["seconds"]["median"]
            what = f"one clip of {FRAMES} frames: EVACap over audio-only and the video tower"
            yield target(what, ours["seconds"]["total"]["median"] / floor, 1.3, at_most=True)
        recomputed = captions.find(batch=1, frames=FRAMES, variant=latency.RECOMPUTED)
        ours = captions.find(batch=1, frames=FRAMES, variant="evacap", dtype="float32")
        if recomputed and ours:
            ratio = recomputed["seconds"]["total"]["median"] / ours["seconds"]["total"]["median"]
            yield target("one clip, float32: times faster than AVCap recomputed", ratio, 8)
        fusions = self.results("fusion")
        for row in fusions.rows:
            if row["way"] != "module":
                same = {**{name: row[name] for name in fusion.SETTINGS}, "way": "module"}
                module = fusions.find(**same)
                what = (
                    f"fusion, {row['dtype']}, {row['frames']} frames, {'both ways' if row['backward'] else 'forward'}"
                )
                speed = row["seconds"]["median"] / module["seconds"]["median"]
                yield target(f"{what}: times as fast as {row['way']}", speed, 1)
                if row["frames"] == 64 and row["way"] == "plain" and row["peak_bytes"]:
                    share = module["peak_bytes"] / row["peak_bytes"]
                    yield target(f"{what}: share of {row['way']}'s memory", share, 0.2, at_most=True)

    def markdown(self) -> str:
        parts = [[name, part["status"], part["seconds"]] for name, part in self.parts.items()]
        targets = [
            [
                row["target"],
                f"{row['found']:.3g}",
                f"{'at most' if row['at_most'] else 'at least'} {row['wanted']:g}",
                "yes" if row["reached"] else "**no**",
            ]
            for row in self.targets()
        ]
        sections = {
            "Targets": markdown(["target", "found", "wanted", "reached"], targets) + "\n",
            "Fusion": fusion.table(self.results("fusion")),
            "Captioning": self.captioning() + "\n" + latency.comparisons(self.results("latency")),
            "Video tower": video_tower.table(self.results("video_tower")),
            "Training": training.table(self.results("training"), self.device),
            "Compiled": compiling.table(self.results("compiling")),
            "Checks": device_checks.table(self.results("device_checks")),
            "Parts": markdown(["part", "status", "seconds"], parts) + "\n",
        }
        machine_line = ", ".join(f"{name}: {value}" for name, value in machine(self.device).items())
        text = [f"# GPU check\n\n{machine_line}\n"] + [f"## {title}\n\n{table}" for title, table in sections.items()]
        broken = [(name, part) for name, part in self.parts.items() if part["status"] != "done"]
        text += [f"## {name}: {part['status']}\n\n```\n{part['output']}\n```\n" for name, part in broken]
        return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", default=default_device(), help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs", "gpu_check"), help="folder (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seconds", type=float, default=450, help="for all parts together (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part:
        run_part(arguments.part, arguments.output, arguments.size, arguments.device)
        return 0
    report, end = Report(arguments.output, arguments.device), time.monotonic() + arguments.seconds
    report.write()
    for name in arguments.parts:
        left = end - time.monotonic()
        if report.parts.get(name, {}).get("status") == "done" or left < 5:
            continue
        limit = min(left, PARTS[name] if arguments.size == "full" else left)
        report.parts[name] = {"status": "interrupted", "seconds": None, "output": ""}
        try:
            report.parts[name] = run_in_time(arguments, name, limit)
        finally:
            report.write()
        print(f"{name}: {report.parts[name]['status']} in {report.parts[name]['seconds']} s", flush=True)
    print(report.path.with_suffix(".md").read_text())
    return int(any(report.parts.get(name, {}).get("status") != "done" for name in arguments.parts))


if __name__ == "__main__":
    # What ends this process ends the part that runs, and leaves a report.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
