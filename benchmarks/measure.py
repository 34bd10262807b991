"""Time, memory and the rates of the machine: what every benchmark shares."""

import argparse
import ctypes
import functools
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import transformers

from evacap.training.evaluation.tables import markdown_table
from evacap.training.files import check_settings, write_json


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Larger than any cache, so that reading it is reading memory.
BANDWIDTH_BYTES = {"cpu": 2**28, "cuda": 2**31}
# The largest result and the most operations of one measured matrix product: its rate does not change beyond.
MAX_PRODUCT_BYTES = 2**30
MAX_PRODUCT_FLOPS = {"cpu": 5e10, "cuda": 1e13}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Waits for the work that was handed to `device`."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    """The wall-clock seconds of one call of `function`, with the work that it leaves to `device`."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, least, greatest and number of `values`."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


def spread(times: dict[str, float]) -> str:
    """A [`summary`] for a table: the median, and in brackets the least, the greatest and the number of runs."""
    return f"{times['median']:.3g} ({times['min']:.3g}–{times['max']:.3g}, {times['repeats']})"


def interleave(
    runs: dict[str, Callable[[], Any]], repeats: int = 5, budget: float = 60.0, long_run: float = 20.0
) -> dict[str, list[Any]]:
    """Calls the `runs` in turn, A B C A B C …, so that what else happens on the machine falls on all of them alike.

    Args:
        runs (`dict[str, Callable]`): What to call, by name; each returns its own measurement.
        repeats (`int`, defaults to 5): Measured calls of each run, after one warm-up.
        budget (`float`, defaults to 60): Seconds for the measured calls of one run. One that takes longer is called
            less often, but three times where a call takes less than 10 seconds, and once in any case.
        long_run (`float`, defaults to 20): Seconds from which the warm-up counts as a measured call: what a warm-up
            saves is lost in such a call.

    Returns:
        `dict[str, list]`: The measurements of each run, warm-ups left out.
    """
    results: dict[str, list[Any]] = {name: [] for name in runs}
    left = {}
    for name, run in runs.items():
        start = time.perf_counter()
        result = run()
        took = time.perf_counter() - start
        left[name] = min(repeats, max(int(budget / took), 3 if took < 10 else 1))
        if took >= long_run:
            results[name].append(result)
            left[name] -= 1
    while any(left.values()):
        for name, run in runs.items():
            if left[name]:
                results[name].append(run())
                left[name] -= 1
    return results


def timed(runs: dict[str, Callable[[], Any]], device: str = "cpu", **options) -> dict[str, dict[str, float]]:
    """The [`summary`] of the seconds of each of `runs`, called in turn by [`interleave`], which takes `options`."""
    clocked = {name: functools.partial(seconds, run, device) for name, run in runs.items()}
    return {name: summary(values) for name, values in interleave(clocked, **options).items()}


def _resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at its peak) of this process, from Linux's `/proc`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {field}, which this benchmark reads on Linux.")


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int | None:
    """The bytes that a call needs beside what this process holds already; see [`peak_memory`].

    On the CPU what earlier calls have left in the allocator is given back first; `None` there where it is not Linux.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        run()
        return None
    ctypes.CDLL(None).malloc_trim(0)
    # Sets the peak back to what is resident now: loading weights can take more than using them.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - before


def _answer(queue: multiprocessing.Queue, function: Callable, args: tuple) -> None:
    queue.put(function(*args))


def in_own_process(function: Callable, *args) -> Any:
    """What `function`, of a module, returns for `args` in a fresh process.

    Raises:
        RuntimeError: If the process died.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(queue, function, args))
    process.start()
    while True:
        try:
            answer = queue.get(timeout=1)
            break
        except Empty:
            if not process.is_alive():
                raise RuntimeError(
                    f"The process of {function.__name__}{args} ended with status {process.exitcode}."
                ) from None
    process.join()
    return answer


def peak_memory(setup: Callable, *args, device: str = "cpu", warm_ups: int = 0) -> Any:
    """The bytes that a call needs beside its weights and inputs.

    On the CPU, in a process of its own: the peak of the resident set during the call, less the resident set before it,
    so the libraries' working buffers are counted too. On CUDA: the peak of the allocated memory less what was
    allocated before.

    Args:
        setup (`Callable`): A function of a module, called with `args`. It builds weights and inputs
            and returns the call to measure, or several by name, which are measured one after the other.
        device (`str`, defaults to `"cpu"`): Where the call runs.
        warm_ups (`int`, defaults to 0): Calls before the measured one.

    Returns:
        `int`, or a `dict` of them for several calls; `None` in their place on a CPU whose system is not Linux.
    """
    if torch.device(device).type == "cuda":
        return _peaks(setup, args, device, warm_ups)
    return in_own_process(_peaks, setup, args, device, warm_ups)


def _peaks(setup: Callable, args: tuple, device: str, warm_ups: int) -> int | None | dict[Any, int | None]:
    def measure(run: Callable[[], Any]) -> int | None:
        for _ in range(warm_ups):
            run()
        return peak_bytes(run, device)

    runs = setup(*args)
    return {name: measure(run) for name, run in runs.items()} if isinstance(runs, dict) else measure(runs)


@functools.cache
def product_seconds(batch: int, m: int, k: int, n: int, dtype: str, device: str) -> float:
    """The seconds of `batch` plain products (m × k) · (k × n), by `torch.mm` or `torch.bmm`, whichever is faster.

    The memory of the result is allocated before, and the second factor is transposed like the weight of a linear
    layer. Of a very large product only a part is measured, and the rest is extrapolated.
    """
    options = {"dtype": DTYPES[dtype], "device": device}
    rows = max(1, min(m, int(MAX_PRODUCT_FLOPS[torch.device(device).type] / (2 * k * n))))
    if rows < m:
        return product_seconds(batch, rows, k, n, dtype, device) * m / rows
    fitting = max(1, min(batch, MAX_PRODUCT_BYTES // (m * n * options["dtype"].itemsize)))
    best = float("inf")
    for size in {1, fitting}:
        left, right = torch.randn(size, m, k, **options), torch.randn(size, n, k, **options).transpose(1, 2)
        out = torch.empty(size, m, n, **options)
        if size == 1:
            run = functools.partial(torch.mm, left[0], right[0], out=out[0])
        else:
            run = functools.partial(torch.bmm, left, right, out=out)
        best = min(best, _repeated_seconds(run, device) / size)
    return batch * best


def _repeated_seconds(run: Callable[[], Any], device: str) -> float:
    """The median seconds of a call, over series of calls that take some milliseconds each."""
    run()
    calls = max(1, round(0.01 / max(seconds(run, device), 1e-7)))

    def series() -> None:
        for _ in range(calls):
            run()

    return statistics.median(seconds(series, device) for _ in range(5)) / calls


@functools.cache
def bandwidth(device: str) -> float:
    """The bytes a second at which a sum reads a buffer that no cache holds."""
    size = BANDWIDTH_BYTES[torch.device(device).type]
    buffer = torch.ones(size // 4, device=device)
    return size / _repeated_seconds(buffer.sum, device)


def machine(device: str) -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "cpu": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Results:
    """The measurements of one benchmark, a list of dictionaries in a JSON file.

    A new measurement replaces an older one with the same settings, so a run can be split, interrupted and continued.

    Args:
        path (`Path`): The file; it is made with its folder if it does not exist.
        settings (`tuple[str, …]`): The names of the entries that identify a measurement.
        device (`str`): The device of the measurements; another machine than that of the file is refused.
    """

    def __init__(self, path: str | Path, settings: tuple[str, ...], device: str):
        self.path, self.settings = Path(path), settings
        self.machine, self.rows = machine(device), []
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            check_settings(self.path, stored["machine"], self.machine, "Give another file by --output.")
            self.rows = stored["rows"]

    def find(self, **settings) -> dict[str, Any] | None:
        """The measurement with these settings."""
        return next(
            (row for row in self.rows if all(row.get(name) == value for name, value in settings.items())), None
        )

    def add(self, row: dict[str, Any]) -> None:
        """Stores a measurement at once."""
        old = self.find(**{name: row[name] for name in self.settings})
        if old is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(old)] = row
        write_json(self.path, {"machine": self.machine, "rows": self.rows}, indent=1)


def markdown(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    return "\n".join(markdown_table(header, rows))


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes: device, output and time per measurement."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--device", default=default_device(), help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs", "benchmarks", f"{name}.json"),
        help="JSON file; what it already holds is not measured again (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured calls (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds for the measured calls of one run (default: %(default)s)"
    )
    return parser
