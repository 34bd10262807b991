"""The records of a run: `run.json`, `log.jsonl` and the trackers."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from accelerate import Accelerator

from .files import JsonLines, check_settings, write_json
from .run_config import AlignmentSection, RunConfig, flatten


PACKAGES = ("evacap", "torch", "transformers", "accelerate", "datasets", "numpy")
SETTLED = ("seed", "model.", "data.", "optimization.", "alignment.")
"""Prefixes of the keys of the configuration that must not change during a run."""


def check_run(folder: Path, config: RunConfig) -> None:
    """Raises a `ValueError` if the run in this folder was started with other settings."""
    path = folder / "run.json"
    if path.exists():
        before = flatten(json.loads(path.read_text(encoding="utf-8"))["config"])
        # A setting that did not exist yet had the value of its present default. Only the scorers learned at another rate.
        has_scorers = before.get("alignment.loss", "attentive_ot") == "attentive_ot"
        defaults = RunConfig(output="", alignment=None if has_scorers else AlignmentSection(""))
        before = flatten(defaults) | before
        now = dict.fromkeys(before) | flatten(config)
        settled = {key: now[key] for key in sorted(now) if key.startswith(SETTLED)}
        check_settings(folder, before, settled, "Give a new `output`, or the settings of before to go on.")


def record_start(folder: Path, config: RunConfig, command: list[str], num_processes: int, step: int) -> None:
    """Writes `run.json`: the configuration and all starts of the run.

    A start has its time, command, step, versions, and the git commit of the working directory.
    """
    path = folder / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "step": step,
        "processes": num_processes,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    content = {"seed": config.seed, "config": dataclasses.asdict(config), "starts": [*starts, start]}
    write_json(path, content)


def _git_commit() -> str | None:
    """The git commit of the working directory, with `+changes` if files differ from it."""
    # A repository can configure commands that git runs to compare files. They are meant for its developers and are not
    # run here.
    options = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    for line in (_git("config", "--name-only", "--get-regexp", r"^filter\..*\.(clean|process)$") or "").splitlines():
        options += ["-c", f"{line}="]
    for line in (_git("config", "--name-only", "--get-regexp", r"^filter\..*\.required$") or "").splitlines():
        options += ["-c", f"{line}=false"]
    commit = _git(*options, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return None
    # A submodule may have its own commands.
    changes = _git(*options, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    return commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str | None:
    """The stripped output of git, or `None` if it fails."""
    command = ["git", "--no-optional-locks", "--no-pager", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class RunLog:
    """Writes figures to `log.jsonl` and to the trackers, in the main process only.

    Args:
        folder (`Path`): The folder of the run.
        accelerator (`Accelerator`): The accelerator, which has the trackers.
        step (`int`): The step from which the run continues; lines of later steps are dropped, as they will come again.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int):
        self.lines = JsonLines(folder / "log.jsonl", "step")
        self.accelerator = accelerator
        if accelerator.is_main_process and self.lines.path.exists():
            self.lines.rewrite(line for line in self.lines.read() if line["step"] <= step)

    def write(self, step: int, figures: dict[str, float], **passing: float) -> None:
        """Adds a line; `passing` figures, such as the speed, go to the trackers only, so that lines are reproducible."""
        if self.accelerator.is_main_process:
            self.lines.append([{"step": step, **figures}])
            self.accelerator.log({**figures, **passing}, step=step)


def command_line() -> list[str]:
    """The command line of this process."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
