"""The `hmoe train` command: one run from a YAML recipe and command-line overrides.

hmoe train --config recipes/cpu/hmoe.yaml
hmoe train --config recipes/cpu/hmoe.yaml --learning_rate 1e-3 --model_config.num_hidden_layers 2
accelerate launch --config_file examples/accelerate/fsdp2.yaml -m hmoe.training --config recipes/hmoe-3b.yaml
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import MISSING, fields

from .options import SECTIONS


def main(argv: list[str] | None = None) -> int:
    """Runs `hmoe train ...`; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    from .arguments import make_parser, parse_arguments

    if "--help_all" in argv:
        make_parser().print_help()
        return 0
    from .runner import Run

    Run(parse_arguments(argv)).train()
    return 0


def help_text() -> str:
    """What `--help` prints, made without Transformers."""
    lines = [
        "usage: hmoe train --config RECIPE.yaml [--field value ...]",
        "",
        "A field stands in the recipe, at the top or in a section, or on the command line, which wins.",
        "Every field of transformers.TrainingArguments is one too; --help_all lists them.",
    ]
    for section in SECTIONS:
        lines += ["", f"{section._argument_group_name}: {section.__doc__}"]
        for option in fields(section):
            default = option.default if option.default is not MISSING else []
            note = "" if default in (None, []) else f" (default: {default})"
            text = textwrap.wrap(
                option.metadata["help"] + note, 116, initial_indent="      ", subsequent_indent="      "
            )
            lines += [f"  --{option.name}", *text]
    return "\n".join(lines)
