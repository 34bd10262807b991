"""Trains a captioner by a YAML file, on any number of processes, and continues after interruptions.

accelerate launch -m evacap.training.train evacap data.prepared=audiocaps model.start=start output=runs/evacap
"""

import argparse
import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, send_to_device, set_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from ..modeling_evacap.configuration_evacap import EVACapConfig
from ..processing.processing_evacap import EVACapProcessor
from .checkpoints import Checkpoints, Models, TrainingState, in_main_process
from .components import (
    describe_training,
    make_clips,
    make_collators,
    make_model,
    make_processor_and_config,
    make_validation_clips,
)
from .data.collator import EVACapDataCollator
from .files import locked, remove_leftovers
from .optimization import freeze, make_optimizer, make_scheduler
from .run_config import RunConfig, flatten, load_run_config, shipped_configs
from .run_log import RunLog, check_run, command_line, record_start
from .terminal import explain, printable
from .validation import LOWER_IS_BETTER, Validation


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train(config: RunConfig, run_class: type["TrainingRun"] | None = None) -> int:
    """Trains a captioner, from the newest checkpoint in `config.output` if there is one.

    Args:
        config ([`RunConfig`]): The configuration.
        run_class (`type`, *optional*): A subclass of [`TrainingRun`] with other steps. By default the configuration
            decides: [`~align.AlignmentRun`] with an `alignment`, else [`TrainingRun`].

    Returns:
        0 at the end of the run; 128 + its number if a signal stopped it, after saving a checkpoint.

    Raises:
        ValueError: If the configuration is inconsistent, or does not fit its data or the run in its folder.
        OSError: If a file cannot be read or written; a `BlockingIOError` if another process trains in this folder.
        RuntimeError: If the loss or the gradient is not finite. The last checkpoint is from before.
    """
    if run_class is None and config.alignment is not None:
        from .align import AlignmentRun as run_class
    run = (run_class or TrainingRun)(config)
    with run.locked():
        return run_steps(run)


def run_steps(run: "TrainingRun") -> int:
    """The loop of [`train`]."""
    config, log = run.config, run.begin()
    state, every = run.state, config.logging.every_steps
    progress = tqdm(
        desc=run.folder.name,
        total=run.total_steps,
        initial=state.step,
        unit="step",
        disable=not run.accelerator.is_local_main_process,
    )
    with progress, StopSignals() as stop:
        for batches in run.batches():
            figures, stopping = run.step(batches, stop)
            state.add(figures)
            progress.update()
            if run.is_due(every):
                means = state.take_means() | {"learning_rate": figures["learning_rate"]}
                log.write(
                    state.step, means, clips_per_second=run.clips_per_step * (progress.format_dict["rate"] or 0.0)
                )
                progress.set_postfix(loss=means["loss"], refresh=False)
            if run.is_due(config.validation.every_steps):
                log.write(state.step, run.validate())
            if stopping or run.is_due(run.save_every):
                run.checkpoints.save(state.step)
            if stopping:
                run.say(f"stopped after step {state.step}; the same command goes on from there")
                return 128 + (stop.number or signal.SIGTERM)
    run.end()
    return 0


class TrainingRun:
    """A training run with all its components, made from its configuration.

    Args:
        config ([`RunConfig`]): The configuration.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = Path(config.output)
        self.accelerator = accelerator = make_accelerator(config)
        set_seed(config.seed)
        processor, self.model_config = self.make_processor_and_config()
        reader = self.reading_processor(processor)
        collator, validation_collator = make_collators(config, reader, self.model_config)
        with accelerator.local_main_process_first():
            self.clips = self.make_clips(reader)
        self.loader = make_loader(config, self.clips, collator, accelerator)
        model = self.make_model()
        optimizer = self.make_optimizer(model)
        self._count_steps()
        self.scheduler = make_scheduler(optimizer, config.optimization, self.steps_per_epoch, self.total_steps)
        if accelerator.is_fsdp2:
            adapt_fsdp(accelerator, model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if accelerator.is_fsdp2:
            torch.distributed.fsdp.register_fsdp_forward_method(self.model, "generate")
        self.validation = None
        if config.validation.every_steps is not None:
            clips = make_validation_clips(config, processor)
            self.validation = Validation(clips, processor, config, accelerator, validation_collator)
        self.state = TrainingState()
        parts = {"state": self.state, "scheduler": self.scheduler}
        self.checkpoints = Checkpoints(self.folder, accelerator, self.model, self.optimizer, parts, config.saving.keep)
        training = describe_training(config, len(self.clips))
        self.models = Models(self.folder, accelerator, self.captioner, processor, training, config.saving.code)

    def make_processor_and_config(self) -> tuple[EVACapProcessor, EVACapConfig]:
        """The processor and the configuration of the model that is saved."""
        return make_processor_and_config(self.config.model)

    def reading_processor(self, processor: EVACapProcessor) -> EVACapProcessor:
        """The processor that reads the clips."""
        return processor

    def make_clips(self, reader: EVACapProcessor) -> Dataset:
        """The clips to learn from."""
        config = self.config
        return make_clips(config.data, reader, config.seed, kept_clips=config.resources.kept_clips)

    def make_model(self) -> torch.nn.Module:
        """The model to train, with frozen parameters."""
        section = self.config.model
        model = make_model(section, self.model_config)
        freeze(model, section.freeze, section.freeze_except)
        return model

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimizer of what is trained."""
        return make_optimizer(model, self.config.optimization)

    @property
    def captioner(self) -> torch.nn.Module:
        """The model that is saved."""
        return self.model

    def _count_steps(self) -> None:
        section = self.config.optimization
        self.clips_per_step = section.batch_size * section.accumulation_steps * self.accelerator.num_processes
        batches = len(self.loader)
        if isinstance(self.clips, IterableDataset):
            # Each worker drops its own incomplete batch.
            parts = range(len(self.clips)), max(self.config.resources.num_workers, 1)
            batches = sum(len(part) // section.batch_size for part in np.array_split(*parts))
        self.steps_per_epoch = math.ceil(batches / section.accumulation_steps)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"There are {len(self.clips)} clips to learn from, but the processes take "
                f"{section.batch_size * self.accelerator.num_processes} at a time: lower `optimization.batch_size`."
            )
        limit = sys.maxsize if section.max_steps is None else section.max_steps
        self.total_steps = min(section.epochs * self.steps_per_epoch, limit)
        self.save_every = self.config.saving.every_steps or self.steps_per_epoch

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder of the run and locks it against other runs."""
        with ExitStack() as stack:

            def lock():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder))

            in_main_process(self.accelerator, lock)
            yield

    def begin(self) -> RunLog:
        """Loads the newest checkpoint, records the start, and opens the logs."""
        accelerator, config = self.accelerator, self.config
        if accelerator.is_main_process:
            remove_leftovers(self.folder, self.folder / "checkpoints", self.folder / "best")
        accelerator.wait_for_everyone()
        # Dropout has to differ between processes. A checkpoint restores the generators.
        set_seed(config.seed, device_specific=True)
        if self.checkpoints.list():
            check_run(self.folder, config)
        if self.checkpoints.resume():
            self.say(f"going on after step {self.state.step} of {self.total_steps}")
        if accelerator.is_main_process:
            record_start(self.folder, config, command_line(), accelerator.num_processes, self.state.step)
        accelerator.init_trackers(
            config.logging.project,
            {
                key: value if isinstance(value, (int, float, str)) else str(value)
                for key, value in flatten(config).items()
            },
            {"tensorboard": {"purge_step": self.state.step + 1}},
        )
        self.model.train()
        return RunLog(self.folder, accelerator, self.state.step)

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or validations have not improved for `patience`."""
        patience = self.config.validation.patience
        stale = patience is not None and self.state.without_improvement >= patience
        return stale or self.state.step >= self.total_steps

    def is_due(self, every: int | None) -> bool:
        """Whether an action is due that is done every so many steps and after the last one."""
        step = self.state.step
        return every is not None and (step % every == 0 or step == self.total_steps)

    def batches(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The batches of each step, from the current state to the end; skipped clips are not read."""
        state, accumulated = self.state, self.config.optimization.accumulation_steps
        while not self.is_over:
            done = state.step_in_epoch * accumulated
            if hasattr(self.clips, "set_epoch"):
                self.clips.set_epoch(state.epoch)
            if isinstance(self.clips, IterableDataset):
                # Each process reads its own part of a stream, so Accelerate has not wrapped this loader.
                self.clips.skip(done, self.config.optimization.batch_size)
                rest = (send_to_device(batch, self.accelerator.device, non_blocking=True) for batch in self.loader)
            else:
                self.loader.set_epoch(state.epoch)
                rest = iter(skip_first_batches(self.loader, done))
            while not self.is_over and (batches := list(islice(rest, accumulated))):
                yield batches
            if state.step_in_epoch == self.steps_per_epoch:
                state.epoch, state.step_in_epoch = state.epoch + 1, 0

    def step(self, batches: list[dict[str, torch.Tensor]], stop: "StopSignals") -> tuple[dict[str, float], bool]:
        """One step of the optimizer.

        Args:
            batches (`list[dict]`): The batches of this process; their gradients are summed.
            stop ([`StopSignals`]): The signals that this process has received.

        Returns:
            The figures over all processes (`loss`, its terms by name if there are several, `grad_norm` and
            `learning_rate`), and whether a signal has stopped any process.
        """
        accelerator, model, terms = self.accelerator, self.model, self._loss_terms()
        if "labels" not in batches[0]:
            raise ValueError(
                f"The clips of {self.config.data.prepared} have no captions to learn from: prepare them without --no-captions. "
                "Only `evacap train align` learns without captions."
            )
        counts = [(batch["labels"] != -100).sum() for batch in batches]
        # The caption loss is the mean over all caption tokens of the step, in all processes and batches.
        count = accelerator.reduce(sum(counts))
        totals = torch.zeros(1 + len(terms) + 1, device=accelerator.device)
        totals[-1] = bool(stop.number)
        for number, (batch, own_count) in enumerate(zip(batches, counts, strict=True), start=1):
            with nullcontext() if number == len(batches) else accelerator.no_sync(model):
                with accelerator.autocast():
                    outputs = model(**batch, use_cache=False, num_items_in_batch=count)
                # The loss is already the share of this batch, but gradients are averaged over the processes.
                accelerator.backward(outputs.loss * accelerator.num_processes)
            totals[0] += outputs.loss.detach()
            for place, name in enumerate(terms, start=1):
                if outputs.get(name) is not None:
                    totals[place] += outputs[name] * own_count / count
        norm = accelerator.clip_grad_norm_(model.parameters(), self.config.optimization.max_grad_norm or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # One exchange per step gives all processes the same figures and the same decision to stop.
        loss, *values, stopping = accelerator.reduce(totals).tolist()
        figures = {"loss": loss, **dict(zip(terms, values, strict=True)), "grad_norm": norm.item()}
        self.advance(figures)
        return figures, stopping > 0

    def advance(self, figures: dict[str, float]) -> None:
        """Takes the step of the optimizer if the figures are finite, and adds `learning_rate` to them."""
        self._check_finite(figures)
        figures["learning_rate"] = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.state.step += 1
        self.state.step_in_epoch += 1

    def _loss_terms(self) -> list[str]:
        """The names of the terms of the loss, if it has more than the caption loss."""
        terms = self.model_config.loss_terms
        return ["caption_loss", *terms] if terms else []

    def _check_finite(self, figures: dict[str, float]) -> None:
        # With fp16 a gradient may overflow: then the step is skipped and the loss scale is lowered.
        checked = ("loss",) if self.accelerator.scaler is not None else ("loss", "grad_norm")
        for name in checked:
            if not math.isfinite(figures[name]):
                kept = self.checkpoints.list()
                raise RuntimeError(
                    f"{name} is {figures[name]} in step {self.state.step + 1}: the run is stopped before it changes the "
                    f"model. {f'{kept[-1]} is the last checkpoint' if kept else 'There is no checkpoint yet'}. A lower "
                    "`optimization.learning_rate` or `optimization.max_grad_norm` may help, in a new `output`."
                )

    def validate(self) -> dict[str, float]:
        """Runs a validation, saves the model if it is among the best, and returns the figures for the log."""
        section, state = self.config.validation, self.state
        figures = self.validation(self.model)
        score, lower = figures[section.best], section.best in LOWER_IS_BETTER
        is_best = self.models.save_best(state, score, lower, section.keep_best)
        state.without_improvement = 0 if is_best else state.without_improvement + 1
        self.say(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        return {f"validation/{name}": value for name, value in figures.items()}

    def end(self) -> None:
        """Saves the last checkpoint and the final model."""
        self.checkpoints.save(self.state.step)
        self.models.save_final()
        self.say(f"{self.models.final_folder} is the model after step {self.state.step}")
        for name, score in self.state.best.items():
            self.say(f"{self.models.best_folder / name}: {self.config.validation.best} {score:.4f}")
        self.accelerator.end_training()

    def say(self, line: str) -> None:
        """Prints a line above the progress bar, in the main process only."""
        if self.accelerator.is_main_process:
            tqdm.write(printable(f"{self.folder.name}: {line}"), file=sys.stderr)


def make_accelerator(config: RunConfig) -> Accelerator:
    """Makes the accelerator for the configuration and `accelerate launch`.

    Raises:
        ImportError: If a tracker is not installed.
        ValueError: If there is no such tracker, or if the device does not support the precision.
    """
    resources, trackers = config.resources, config.logging.trackers
    if resources.num_threads is not None:
        torch.set_num_threads(resources.num_threads)
    # Progress bars of files and notes on tied weights would break the bar of the run at each checkpoint.
    disable_progress_bar()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator = Accelerator(
        mixed_precision=resources.mixed_precision,
        cpu=resources.cpu or not torch.accelerator.is_available(),
        log_with=trackers or None,
        project_config=ProjectConfiguration(config.output, logging_dir=str(Path(config.output) / "trackers")),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=config.seed, dispatch_batches=False, non_blocking=True
        ),
    )
    missing = set(trackers) - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        raise ImportError(f"`logging.trackers` asks for {', '.join(sorted(missing))}: install it, or leave it out.")
    return accelerator


def make_loader(
    config: RunConfig, clips: Dataset, collator: EVACapDataCollator, accelerator: Accelerator
) -> DataLoader:
    """Makes the data loader: the order depends on seed and epoch, and an incomplete batch is dropped."""
    resources, is_stream = config.resources, isinstance(clips, IterableDataset)
    loader = DataLoader(
        clips,
        config.optimization.batch_size,
        shuffle=not is_stream,
        drop_last=True,
        collate_fn=collator,
        num_workers=resources.num_workers,
        prefetch_factor=resources.prefetch if resources.num_workers else None,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        # A generator of its own: starting an epoch must not advance the one of dropout.
        generator=torch.Generator(),
    )
    return loader if is_stream else accelerator.prepare_data_loader(loader)


def adapt_fsdp(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Adapts the FSDP plugin to this model."""
    plugin = accelerator.state.fsdp_plugin
    # Autocast computes in half precision. Half-precision weights would round the gate's scalars.
    plugin.mixed_precision_policy = None
    # Only modules that this variant has.
    present = {type(module).__name__ for module in model.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in model._no_split_modules if name in present]


class StopSignals:
    """Records the first Ctrl-C or SIGTERM in `number`, so that the run stops after its step; a second one ends it at once."""

    def __init__(self):
        self.number = 0

    def __enter__(self) -> "StopSignals":
        # Only the main thread may set signal handlers.
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._note) for s in STOP_SIGNALS} if in_main_thread else {}
        return self

    def _note(self, number: int, frame) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception) -> None:
        self._restore()


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal, and a job scheduler's SIGTERM every process of a job.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", help=f"a YAML file, or one of {', '.join(shipped_configs())}, which are shipped"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes of it, such as optimization.learning_rate=3e-4"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evacap.training.train", description=__doc__.splitlines()[0])
    add_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        return train(load_run_config(options.config, options.overrides))
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        print(f"train: {explain(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
