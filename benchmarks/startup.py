"""Start-up: the cost of imports and of the command line in a fresh process, and of loading a full-size checkpoint.

Every figure comes from its own process. The checkpoint is in the page cache, so the disk does not count. *Initialised*
is the number of elements of real tensors that were filled by an initialiser; it should be 0, because the model is
built on the meta device. *Anonymous* memory is what loading needs besides the file, whose pages are mapped and become
resident on first use. Memory is read from `/proc` of Linux.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import DTYPES, Results, argument_parser, interleave, markdown, seconds, summary
from benchmarks.models import SIZES, make_config, make_model
from evacap.training.files import write_text


PROCESSES = {
    "python": ["-c", "pass"],
    "import transformers": ["-c", "import transformers"],
    "import evacap": ["-c", "import evacap"],
    "import both": ["-c", "import evacap, transformers"],
    "Auto classes": ["-c", "from transformers import AutoModel, AutoProcessor, pipeline"],
    "Auto classes and evacap": ["-c", "import evacap; from transformers import AutoModel, AutoProcessor, pipeline"],
    "evacap --version": ["-m", "evacap", "--version"],
    "evacap --help": ["-m", "evacap", "--help"],
    "evacap caption --help": ["-m", "evacap", "caption", "--help"],
}
LOAD = "load {} as {}"
INITIALISERS = ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "bernoulli_")


class CountedInitialisers(TorchDispatchMode):
    """Counts the elements of real tensors that are filled in place."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in INITIALISERS and args[0].device.type != "meta":
            self.elements[name] += args[0].numel()
        return function(*args, **(kwargs or {}))


def memory(field: str) -> int:
    """Bytes of a field of `/proc/self/status`: `VmHWM` is the peak, `RssAnon` the memory that belongs to no file."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def load(folder: str, dtype: str) -> dict[str, Any]:
    """Loads a checkpoint in this process, after its imports."""
    from transformers import AutoModel

    import evacap  # noqa: F401

    before = {field: memory(field) for field in ("VmRSS", "RssAnon")}
    with CountedInitialisers() as initialised:
        start = time.perf_counter()
        model = AutoModel.from_pretrained(folder, dtype=DTYPES[dtype])
        took = time.perf_counter() - start
    return {
        "seconds": took,
        "initialised": sum(initialised.elements.values()),
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "anonymous": memory("RssAnon") - before["RssAnon"],
        "peak": memory("VmHWM") - before["VmRSS"],
        "mapped": "model.safetensors" in Path("/proc/self/maps").read_text(),
    }


def run_process(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def run_load(folder: str, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.startup", "--load", folder, "--dtype", dtype]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def table(results: Results) -> str:
    python = results.find(what="python")
    lines = []
    for row in results.rows:
        time_ = row["seconds"]
        over = "" if "peak" in row else f"{time_['median'] - python['seconds']['median']:.3f}"
        memory_ = (
            [f"{row[name] / 1e6:,.0f} MB" for name in ("weights", "anonymous", "peak")] if "peak" in row else [""] * 3
        )
        spread = f"{time_['min']:.3f}–{time_['max']:.3f}"
        lines.append(
            [
                row["what"],
                f"{time_['median']:.3f} s",
                spread,
                over,
                *memory_,
                row.get("mapped", ""),
                row.get("initialised", ""),
            ]
        )
    header = ["what", "median", "spread", "less Python", "weights", "anonymous", "peak", "mapped", "initialised"]
    return markdown(header, lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser("startup", __doc__)
    parser.add_argument("--size", choices=SIZES, default="full", help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--load", metavar="FOLDER", help="load a checkpoint in this process and print the figures")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for --load (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.dtype)))
        return
    options = {"repeats": arguments.repeats, "budget": arguments.budget}
    results = Results(arguments.output, ("what",), "cpu")
    runs = {
        name: functools.partial(seconds, functools.partial(run_process, command))
        for name, command in PROCESSES.items()
        if results.find(what=name) is None
    }
    for name, values in interleave(runs, **options).items():
        results.add({"what": name, "seconds": summary(values)})
    with tempfile.TemporaryDirectory() as folder:
        make_model(make_config("evacap", size=arguments.size)).save_pretrained(folder)
        runs = {
            LOAD.format(arguments.size, dtype): functools.partial(run_load, folder, dtype)
            for dtype in DTYPES
            if results.find(what=LOAD.format(arguments.size, dtype)) is None
        }
        for name, values in interleave(runs, **options).items():
            results.add({**values[-1], "what": name, "seconds": summary(value["seconds"] for value in values)})
    report = table(results)
    write_text(arguments.output.with_suffix(".md"), report)
    print(report)


if __name__ == "__main__":
    main()
