"""Trains with FSDP on processors: PyTorch can (gloo), but Accelerate takes FSDP for GPUs alone unless it is told here."""

import sys

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from evacap.training import train


def make_accelerator(config) -> Accelerator:
    accelerator = on_processors(config)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


on_processors, train.make_accelerator = train.make_accelerator, make_accelerator

if __name__ == "__main__":
    sys.exit(train.main())
