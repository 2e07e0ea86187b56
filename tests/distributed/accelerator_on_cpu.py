"""`hmoe train` for `accelerate launch`, with Accelerate told that its CPU processes have accelerators.

On CPUs Accelerate silently trains with DDP where FSDP2 was asked for, and starts no process group for DeepSpeed;
neither engine needs an accelerator.
"""

import os
import sys

from accelerate.state import DistributedType, PartialState

from hmoe.training.command import main


def _claim_accelerators(*_, **__):
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = _claim_accelerators
    sys.exit(main([*sys.argv[1:], "--use_cpu", "false"]))
