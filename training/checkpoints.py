"""The files of a run that must survive it: checkpoints to go on from, and models to use."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..modeling_evacap.modeling_evacap import EVACapForConditionalGeneration
from ..processing.known_answer_evacap import write_known_answer
from ..processing.processing_evacap import EVACapProcessor
from .files import write_text


CONTENTS = "contents.json"
"""The file of a checkpoint that lists the others with their sizes."""


@dataclass
class TrainingState:
    """
    Where a run is; a part of its checkpoints.

    Args:
        step (`int`): Steps of the optimizer that are done.
        epoch (`int`), step_in_epoch (`int`): Whole passes through the clips, and steps since the last of them.
        sums (`dict`), summed (`int`): The figures since the last line of the log, and of how many steps they are.
        best (`dict`): The best validations, best first: the name of each model and its score.
        without_improvement (`int`): Validations since the last better one.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    best: dict[str, float] = field(default_factory=dict)
    without_improvement: int = 0

    def add(self, figures: dict[str, float]) -> None:
        """Adds the figures of a step to the sums."""
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in figures.items()}
        self.summed += 1

    def take_means(self) -> dict[str, float]:
        """The means of the figures that were added since the last call."""
        means = {name: total / self.summed for name, total in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        vars(self).update(values)


class Checkpoints:
    """
    The folder `checkpoints` of a run. A checkpoint has its name when it is complete, and not before.

    Args:
        folder (`Path`): The folder of the run.
        accelerator (`Accelerator`): What it holds is saved: model, optimizer and whatever is registered, and the
            states of the generators of random numbers.
        keep (`int`): Newest checkpoints to keep.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int):
        self.folder = folder / "checkpoints"
        self.accelerator = accelerator
        self.keep = keep

    def list(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def save(self, step: int) -> None:
        """Saves the run as it is after `step` steps, and removes the oldest checkpoint if there are too many."""
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            return
        write_folder(target, self.accelerator, self._write)
        if self.accelerator.is_main_process:
            for old in self.list()[: -self.keep]:
                remove_folder(old)

    def _write(self, folder: Path) -> None:
        accelerator = self.accelerator
        accelerator.save_state(folder)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sizes = {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}
            content = {"num_processes": accelerator.num_processes, "files": sizes}
            write_text(folder / CONTENTS, json.dumps(content, indent=2) + "\n")

    def resume(self) -> bool:
        """
        Loads the newest checkpoint; returns whether there was one.

        Raises:
            FileNotFoundError: a file of it is missing or incomplete.
            ValueError: it was made by another number of processes.
        """
        checkpoints = self.list()
        if not checkpoints:
            return False
        newest = checkpoints[-1]
        advice = f"Remove {newest} to go on from the checkpoint before it, or from the beginning."
        try:
            content = json.loads((newest / CONTENTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{newest / CONTENTS} cannot be read ({error}). {advice}") from error
        for name, size in content["files"].items():
            found = (newest / name).stat().st_size if (newest / name).exists() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise FileNotFoundError(f"{newest / name} {state}. {advice}")
        if content["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{newest} was made by {content['num_processes']} processes, but there are "
                f"{self.accelerator.num_processes}: launch as many, or start a run in a new `output` from the model."
            )
        self.accelerator.load_state(newest)
        return True


class Models:
    """
    The folders of a run that Transformers loads: the best models, and the one at the end.

    Args:
        folder (`Path`): The folder of the run.
        accelerator (`Accelerator`), model (`torch.nn.Module`): The model as Accelerate has prepared it.
        processor ([`EVACapProcessor`]): Saved beside it.
        training (`dict`): The content of `training.json`, for the model card.
        code (`bool`): Whether they carry the code that makes them load without this package.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: torch.nn.Module,
        processor: EVACapProcessor,
        training: dict[str, Any],
        code: bool = True,
    ):
        self.best_folder = folder / "best"
        self.final_folder = folder / "model"
        self.accelerator = accelerator
        self.model = model
        self.processor = processor
        self.training = training
        self.code = code

    def save_best(self, state: TrainingState, score: float, lower_is_better: bool, keep: int) -> bool:
        """Saves the model if its score is among the `keep` best so far; returns whether it is the best."""
        name = f"step-{state.step:08d}"
        scores = {**state.best, name: score}
        # The earlier of two equal ones is the better: it took less training.
        ranking = sorted(scores, key=lambda name: (scores[name] if lower_is_better else -scores[name], name))[:keep]
        state.best = {name: scores[name] for name in ranking}
        if name in ranking:
            write_folder(self.best_folder / name, self.accelerator, self._write)
        if self.accelerator.is_main_process:
            for folder in self.best_folder.glob("step-*"):
                if folder.name not in ranking:
                    remove_folder(folder)
        return ranking[0] == name

    def save_final(self) -> None:
        """Saves the model as it is at the end of the run, with its known answer."""
        write_folder(self.final_folder, self.accelerator, self._write_with_answer)

    def _write_with_answer(self, folder: Path) -> None:
        self._write(folder)
        if self.accelerator.is_main_process:
            # As it was saved, as the weights of this process may be a part of the model.
            saved = EVACapForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
            write_known_answer(folder, saved, self.processor)

    def _write(self, folder: Path) -> None:
        accelerator = self.accelerator
        weights = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=weights)
            self.processor.save_pretrained(folder)
            write_text(folder / "training.json", json.dumps(self.training, indent=2) + "\n")
            if not self.code:
                strip_code(folder)


def write_folder(target: Path, accelerator: Accelerator, write: Callable[[Path], None]) -> None:
    """
    Makes the folder `target`, or makes it anew, with what `write` puts there, in all processes at once: beside it, then
    renamed.

    Raises:
        OSError: it could not be written. What was there before is as it was.
    """
    partial = target.with_name(f".{target.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        write(partial)
        for file in _files(partial) if accelerator.is_main_process else ():
            # After a power cut a folder must not have its name before the disk has its content.
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
    except Exception as error:
        # PyTorch and safetensors report a full disk as errors of their own.
        free = shutil.disk_usage(target.parent).free
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{target} could not be written ({type(error).__name__}: {error}); {free / 1e9:.1f} GB are free there. What "
            "was saved before is kept: make room, then give the same command again."
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():
            remove_folder(target)
        partial.rename(target)
    accelerator.wait_for_everyone()


def remove_folder(folder: Path) -> None:
    """Removes a folder so that, if it is stopped on the way, no part of it is left under its name."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_partial_folders(folder: Path) -> None:
    """Removes what a stopped run has left half-written or half-removed in its folder."""
    for kept in (folder, folder / "checkpoints", folder / "best"):
        for leftover in [*kept.glob(".*.partial"), *kept.glob(".*.old")]:
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()


def strip_code(folder: str | os.PathLike) -> None:
    """Takes the code, and the mention of it, out of a saved model: the package's own checkpoints need none."""

    def without_mention(content):
        if not isinstance(content, dict):
            return content
        return {k: without_mention(v) for k, v in content.items() if k not in ("auto_map", "custom_pipelines")}

    for file in Path(folder).glob("*config.json"):
        content = without_mention(json.loads(file.read_text(encoding="utf-8")))
        write_text(file, json.dumps(content, indent=2) + "\n")
    for file in Path(folder).glob("*_evacap.py"):
        file.unlink()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
