"""The `hmoe` command: each subcommand is the `main` of a module, imported only when it is called.

hmoe train --config recipes/cpu/hmoe.yaml
hmoe convert moe mixtral-folder hmoe-folder
"""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches


COMMANDS = {
    "train": ("hmoe.training.command", "train a model from a YAML recipe"),
    "convert": ("hmoe.conversion.command", "convert checkpoints into hmoe, out of it, or to other expert sizes"),
    "evaluate": ("hmoe.eval.harness", "benchmark checkpoints with lm-evaluation-harness"),
    "analyze": ("hmoe.eval.analyze", "report what the router of a checkpoint does on text"),
    "describe": ("hmoe.describe", "sizes, parameters, FLOPs and memory of a model, preset or config"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs `hmoe COMMAND ...`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from hmoe import __version__

        print(f"hmoe {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        nearest = get_close_matches(argv[0], COMMANDS, n=1)
        hint = f", did you mean '{nearest[0]}'?" if nearest else ""
        print(f"hmoe: no command '{argv[0]}'{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[argv[0]][0])
    return module.main(argv[1:]) or 0


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: hmoe COMMAND [options]\n\n{rows}\n\nhmoe COMMAND --help shows the options of a command."


if __name__ == "__main__":
    sys.exit(main())
