"""What the error messages of all commands have in common."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CommandError(RuntimeError):
    """Something keeps a command from doing its work; `hmoe` prints the message without a traceback."""


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """A hint to end a message with: the entry of `known` that is nearest to `name`, or `otherwise` if none is near."""
    nearest = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean `{nearest[0]}`?" if nearest else otherwise
