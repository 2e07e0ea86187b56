"""The `hmoe train` command: one run from a YAML recipe and command-line overrides.

hmoe train --config recipes/cpu/hmoe.yaml
hmoe train --config recipes/cpu/hmoe.yaml --learning_rate 1e-3 --model_config.num_hidden_layers 2
accelerate launch --config_file examples/accelerate/fsdp2.yaml -m hmoe.training --config recipes/hmoe-3b.yaml
"""

from __future__ import annotations

import sys

from .arguments import DataOptions, LoraOptions, ModelOptions, RunOptions, TokenizerOptions
from .checkpointing import CheckpointError
from .recipe import make_parser, parse_arguments
from .runner import Run


def main(argv: list[str] | None = None) -> int:
    """Runs `hmoe train ...`; returns the exit status: 2 for arguments or data that cannot be used, 1 for checkpoints
    that cannot be read or written."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        make_parser((ModelOptions, TokenizerOptions, DataOptions, LoraOptions, RunOptions)).print_help()
        return 0
    if "--help_all" in argv:
        make_parser().print_help()
        return 0
    try:
        try:
            run = Run(parse_arguments(argv))
        except (ValueError, OSError) as error:
            print(f"hmoe train: {error}", file=sys.stderr)
            return 2
        run.train()
    except CheckpointError as error:
        print(f"hmoe train: {error}", file=sys.stderr)
        return 1
    return 0
