"""The files that a run saves: checkpoints to continue from, and models."""

import hashlib
import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..processing.known_answer_evacap import write_known_answer
from ..processing.processing_evacap import EVACapProcessor
from .adapters import has_adapters, merged
from .files import files_in, remove_folder, replace_folder, write_json


VERSION = 2
"""Version of the checkpoint format. The first version had pickled objects."""
CONTENTS = "contents.json"
"""The file of a checkpoint with the sizes and checksums of its other files."""
MODEL, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.safetensors", "progress.json"
RANDOM_STATES = "random_states_{}.safetensors"
"""The file of random states of each process."""


@dataclass
class TrainingState:
    """The progress of a run, part of its checkpoints.

    Args:
        step (`int`): Number of finished steps of the optimizer.
        epoch (`int`), step_in_epoch (`int`): Number of finished epochs, and of steps in the current one.
        sums (`dict`), summed (`int`): Sums of the figures since the last line of the log, and their number of steps.
        best (`dict`): The scores of the best validations by name of the model, best first.
        without_improvement (`int`): Validations since the last improvement.
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
        """The means of the figures added since the last call."""
        means = {name: total / self.summed for name, total in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        vars(self).update(values)


class Checkpoints:
    """The folder `checkpoints` of a run. A checkpoint gets its name only when it is complete.

    It has tensors (safetensors) and JSON, so loading it runs no code. It is the same for a model that is whole in each
    process and for one that is sharded (FSDP). Of a model with adapters it has what is trained, and the buffers.

    Args:
        folder (`Path`): The folder of the run.
        accelerator (`Accelerator`): The accelerator of the run.
        model (`torch.nn.Module`), optimizer (`AcceleratedOptimizer`): Model and optimizer, prepared by Accelerate.
        parts (`dict`): Further objects to save, by name; their `state_dict()` must be JSON.
        keep (`int`): Number of newest checkpoints to keep.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        parts: dict[str, Any],
        keep: int,
    ):
        self.folder = folder / "checkpoints"
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer.optimizer
        self.parts = parts if accelerator.scaler is None else {**parts, "scaler": accelerator.scaler}
        self.keep = keep
        self.only_trained = has_adapters(model)

    def list(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def save(self, step: int) -> None:
        """Saves the state of the run after `step` steps, and removes the oldest checkpoint if there are too many."""
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            return
        write_folder(target, self.accelerator, self._write)
        if self.accelerator.is_main_process:
            for old in self.list()[: -self.keep]:
                remove_folder(old)

    def _write(self, folder: Path) -> None:
        accelerator = self.accelerator
        # All processes take part, and the main one gets the complete state.
        weights, states = get_state_dict(
            self.model,
            self.optimizer,
            options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.only_trained),
        )
        save_states(random_states(accelerator.device), folder / RANDOM_STATES.format(accelerator.process_index))
        if accelerator.is_main_process:
            save_states(weights, folder / MODEL)
            moments = {f"{name}.{key}": value for name, kept in states["state"].items() for key, value in kept.items()}
            save_states({**moments, "param_groups": states["param_groups"]}, folder / OPTIMIZER)
            write_json(folder / PROGRESS, {name: part.state_dict() for name, part in self.parts.items()})
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {str(file.relative_to(folder)): checksum(file) for file in files_in(folder)}
            write_json(
                folder / CONTENTS, {"version": VERSION, "num_processes": accelerator.num_processes, "files": files}
            )

    def resume(self) -> bool:
        """Loads the newest checkpoint; returns whether there was one.

        Raises:
            FileNotFoundError: If one of its files is missing or incomplete.
            ValueError: If a file is damaged, or if it was made with another number of processes or by an earlier
                version.
        """
        checkpoints = self.list()
        if not checkpoints:
            return False
        newest = checkpoints[-1]
        in_main_process(self.accelerator, lambda: self._check(newest))
        for name, part in json.loads((newest / PROGRESS).read_text(encoding="utf-8")).items():
            self.parts[name].load_state_dict(part)
        moments = load_states(newest / OPTIMIZER)
        states = {"param_groups": moments.pop("param_groups"), "state": defaultdict(dict)}
        for name, value in moments.items():
            parameter, key = name.rsplit(".", 1)
            states["state"][parameter][key] = value
        for group in states["param_groups"]:
            for parameter in group["params"]:
                # A parameter that has had no gradient yet, such as the decoder's in the pretraining of towers, has none.
                states["state"].setdefault(parameter, {})
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=load_states(newest / MODEL),
            optim_state_dict=states,
            options=StateDictOptions(full_state_dict=True, strict=not self.only_trained),
        )
        # Loading makes a state of zeros for a parameter that has had no gradient, with one step behind it.
        parameters = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        for name, state in states["state"].items():
            if not state and name in parameters:
                self.optimizer.state.pop(parameters[name], None)
        states = load_states(newest / RANDOM_STATES.format(self.accelerator.process_index))
        set_random_states(states, self.accelerator.device)
        return True

    def _check(self, newest: Path) -> None:
        advice = f"Remove {newest} to go on from the checkpoint before it, or from the beginning."
        try:
            content = json.loads((newest / CONTENTS).read_text(encoding="utf-8"))
            version, num_processes, files = content.get("version"), content["num_processes"], dict(content["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileNotFoundError(f"{newest / CONTENTS} cannot be read ({error}). {advice}") from error
        if version != VERSION:
            raise ValueError(
                f"{newest} was written by another version of this package, as pickled objects that could run any code "
                "when they are loaded. End the run with the version that began it, or begin a new one in a new "
                f"`output`, with `model.start` one of the models in {newest.parents[1]} if there is one."
            )
        if num_processes != self.accelerator.num_processes:
            raise ValueError(
                f"{newest} was made by {num_processes} processes, but there are {self.accelerator.num_processes}: "
                "launch as many, or start a run in a new `output` from the model."
            )
        needed = [MODEL, OPTIMIZER, PROGRESS, *(RANDOM_STATES.format(number) for number in range(num_processes))]
        for name in dict.fromkeys([*needed, *files]):
            path, expected = newest / name, files.get(name)
            if not path.is_file() or expected is None:
                raise FileNotFoundError(f"{path} is missing. {advice}")
            if path.stat().st_size != expected["bytes"]:
                raise FileNotFoundError(
                    f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}. {advice}"
                )
            if checksum(path) != expected:
                raise ValueError(f"{path} is damaged: its SHA-256 is not that of the file that was saved. {advice}")


def in_main_process(accelerator: Accelerator, call: Callable[[], Any]) -> None:
    """Calls a function in the main process; an `OSError` or `ValueError` in it is raised in all processes."""
    error = None
    if accelerator.is_main_process:
        try:
            call()
        except (OSError, ValueError) as found:
            error = found
    error = broadcast_object_list([error])[0]
    if error is not None:
        raise error


def checksum(file: Path) -> dict[str, Any]:
    """The size of a file and its SHA-256."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def save_states(states: dict[str, Any], path: Path) -> None:
    """Saves tensors and JSON values as one safetensors file."""
    tensors, storages = {}, set()
    for name, value in states.items():
        if isinstance(value, torch.Tensor):
            # A tensor with two names, such as tied weights, is written twice: the format has no links.
            is_again = value.untyped_storage().data_ptr() in storages
            storages.add(value.untyped_storage().data_ptr())
            tensors[name] = value.clone() if is_again else value.contiguous()
    others = {name: value for name, value in states.items() if name not in tensors}
    save_file(tensors, path, metadata={"others": json.dumps(others)})


def load_states(path: Path) -> dict[str, Any]:
    """Loads a file of [`save_states`]."""
    with safe_open(path, framework="pt") as file:
        others = json.loads(file.metadata()["others"])
        return {name: file.get_tensor(name) for name in file.keys()} | others


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all random generators of a process."""
    numpy_state = np.random.get_state(legacy=False)
    states = {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Sets the random generators to the states from [`random_states`]."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = states["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])


class Models:
    """The model folders of a run: the best models, and the final one.

    Args:
        folder (`Path`): The folder of the run.
        accelerator (`Accelerator`), model (`torch.nn.Module`): The model, prepared by Accelerate.
        processor ([`EVACapProcessor`]): Its processor, which is saved with it.
        training (`dict`): The content of `training.json`, for the model card.
        code (`bool`): Whether the folders include the code, to load without this package.
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
        # Of two equal models the earlier one is better: it took less training.
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
        """Saves the model at the end of the run, with its known answer."""
        write_folder(self.final_folder, self.accelerator, self._write_with_answer)

    def _write_with_answer(self, folder: Path) -> None:
        self._write(folder)
        if self.accelerator.is_main_process:
            # Loaded from the folder, because this process may have only a shard of the weights.
            model_class = type(self.accelerator.unwrap_model(self.model))
            saved = model_class.from_pretrained(folder, dtype=torch.float32)
            write_known_answer(folder, saved, self.processor)

    def _write(self, folder: Path) -> None:
        accelerator = self.accelerator
        weights = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(self.model)
            weights = merged(model, weights) if has_adapters(model) else weights
            model.save_pretrained(folder, state_dict=weights)
            self.processor.save_pretrained(folder)
            write_json(folder / "training.json", self.training)
            if not self.code:
                strip_code(folder)


def write_folder(target: Path, accelerator: Accelerator, write: Callable[[Path], None]) -> None:
    """Makes or replaces the folder `target`, in all processes at once, by writing beside it and renaming.

    Raises:
        OSError: If it cannot be written. The previous folder is then unchanged.
    """
    # The name must be the same in all processes; the lock of the run excludes other runs.
    partial = target.with_name(f".{target.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        write(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            replace_folder(partial, target)
    except Exception as error:
        # PyTorch and safetensors have their own errors for a full disk.
        free = shutil.disk_usage(target.parent).free
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{target} could not be written ({type(error).__name__}: {error}); {free / 1e9:.1f} GB are free there. What "
            "was saved before is kept: make room, then give the same command again."
        ) from error
    accelerator.wait_for_everyone()


def strip_code(folder: str | os.PathLike) -> None:
    """Removes the code, and references to it, from a saved model; the bundled checkpoints do not need it."""

    def without_mention(content):
        if not isinstance(content, dict):
            return content
        return {k: without_mention(v) for k, v in content.items() if k not in ("auto_map", "custom_pipelines")}

    for file in Path(folder).glob("*config.json"):
        content = without_mention(json.loads(file.read_text(encoding="utf-8")))
        write_json(file, content)
    for file in Path(folder).glob("*_evacap.py"):
        file.unlink()
