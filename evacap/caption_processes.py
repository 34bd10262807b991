"""One `evacap caption` in several processes of a machine, as `accelerate launch` starts them."""

import argparse
import os
from datetime import timedelta
from typing import Any, TypeVar


T = TypeVar("T")
# The first process to end waits for the last, however long that takes.
_PATIENCE = timedelta(days=365)


def is_launched() -> bool:
    """Whether a launcher has started this process beside others."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


class Processes:
    """The processes that share the work of a command; alone, there is one.

    The first does what only one may do, and takes the results of all. Each has the device that Accelerate gives it.

    Args:
        arguments (`argparse.Namespace`): The options of the command. Those of this process are changed: its device, its
            share of the reading processes, and no progress bar but that of the first process.

    Raises:
        ValueError: If the processes run on several machines, whose outputs could not be one.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.state, self.count, self.is_main = None, 1, True
        if not is_launched():
            return
        if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
            raise ValueError("the processes run on several machines. `docs/scale.md` shows how to use these, by Ray.")
        import torch
        from accelerate import PartialState

        from .training.cores import usable_cores

        # They exchange names and captions, and no tensors: GPUs are not needed for that.
        torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
        self.state = PartialState(cpu=not torch.accelerator.is_available())
        self.count, self.is_main = self.state.num_processes, self.state.is_main_process
        arguments.device = arguments.device or str(self.state.device)
        arguments.quiet = arguments.quiet or not self.is_main
        if arguments.workers is None:
            arguments.workers = max(1, usable_cores() // self.count)

    def share(self, value: T) -> T:
        """The value that the first process gives."""
        if self.state is None:
            return value
        import torch

        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def part(self, items: list[T]) -> list[T]:
        """The items of this process."""
        if self.state is None:
            return items
        with self.state.split_between_processes(items) as part:
            return part

    def gather(self, value: T) -> list[T]:
        """In the first process the values that all give; nothing in the others. All wait for all."""
        if self.state is None:
            return [value]
        import torch

        values: list[Any] = [None] * self.count if self.is_main else []
        torch.distributed.gather_object(value, values if self.is_main else None)
        torch.distributed.destroy_process_group()
        return values
