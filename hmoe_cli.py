"""The `hmoe` command: which module has which subcommand, and how a mistake is reported.

hmoe train --config recipes/cpu/hmoe.yaml
hmoe convert moe mixtral-folder hmoe-folder

It is a module beside the package because `import hmoe` imports torch, and `hmoe --help` need not wait for that.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches


COMMANDS = {
    "train": ("hmoe.training.command", "train a model from a YAML recipe"),
    "convert": ("hmoe.conversion.command", "convert checkpoints into hmoe, out of it, or to other expert sizes"),
    "evaluate": ("hmoe.eval.harness", "benchmark checkpoints with lm-evaluation-harness"),
    "analyze": ("hmoe.eval.analyze", "report what the router of a checkpoint does on text"),
    "describe": ("hmoe.describe", "sizes, parameters, FLOPs and memory of a model, preset or config"),
}
# Packages that only some commands need, and the extra of this package that brings them.
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "evaluate": "train",
    "yaml": "train",
    "matplotlib": "train",
    "lm_eval": "eval",
    "jinja2": "eval",
    "pandas": "eval",
    "scipy": "eval",
    "tqdm": "eval",
    "peft": "peft",
    "sklearn": "convert",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hmoe COMMAND ...`; returns the exit status: 2 for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from hmoe import __version__

        print(f"hmoe {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        nearest = get_close_matches(command, COMMANDS, n=1)
        hint = f", did you mean '{nearest[0]}'?" if nearest else ""
        print(f"hmoe: no command '{command}'{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        return _run(command, rest)
    except BrokenPipeError:  # the reader of the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(command: str, argv: list[str]) -> int:
    """Runs a subcommand and reports what goes wrong for a reason that its user can mend."""
    try:
        status = importlib.import_module(COMMANDS[command][0]).main(argv)
        sys.stdout.flush()
        return status
    except Exception as error:
        message = _message_of(error)
        if message is None:
            raise
        if os.environ.get("TRANSFORMERS_VERBOSITY") == "debug":
            traceback.print_exc()
        print(f"hmoe {command}: {message}", file=sys.stderr)
        return 2


def _message_of(error: Exception) -> str | None:
    """What to tell the user; None for an error that is a defect of the program."""
    from hmoe.errors import CommandError

    if isinstance(error, BrokenPipeError) or not isinstance(error, (ValueError, OSError, ImportError, CommandError)):
        return None
    extra = EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ImportError) else None
    return f"{error}: pip install 'hmoe[{extra}]'" if extra else str(error)


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: hmoe COMMAND [options]\n\n{rows}\n\nhmoe COMMAND --help shows the options of a command. With "
        "TRANSFORMERS_VERBOSITY=debug in the environment\nerrors come with their traceback."
    )


if __name__ == "__main__":
    sys.exit(main())
