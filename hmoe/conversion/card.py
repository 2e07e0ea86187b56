"""The model card of a converted checkpoint: how it was made, exactly."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any


def model_card(
    *,
    source: str,
    target_type: str,
    command: Sequence[str] | None,
    settings: Mapping[str, Any],
    sizes: Sequence[Sequence[int]] | None,
    notes: Sequence[str],
    check: str | None,
    version: str,
) -> str:
    """README.md of the output folder. `sizes`: experts per layer of an HMoE; `command`: arguments of `hmoe`."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", f"- {target_type}"]
    if target_type != "hmoe":
        lines.append("- hmoe")
    if not source.startswith((".", "/", "~")) and source.count("/") == 1:
        lines += ["base_model:", f"- {source}"]
    lines += ["---", "", f"# {target_type} converted from {_name(source)}", ""]
    lines += [f"Made by hmoe {version} from `{source}`; its licence and terms apply to this model too.", ""]
    if command is not None:
        lines += ["```", f"hmoe {shlex.join(command)}", "```", ""]
    lines += ["Settings:", "", "```json", json.dumps(dict(settings), indent=2, default=str), "```", ""]
    if sizes is not None:
        lines += ["## Experts", "", *_size_table(sizes), ""]
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    lines += ["## Check", "", check or "No check was made (`--no_check`).", ""]
    lines += ["## Use", "", "```python", *_usage(target_type), "```", ""]
    return "\n".join(lines)


def _name(source: str) -> str:
    return source.rstrip("/").rsplit("/", 1)[-1]


def _size_table(sizes: Sequence[Sequence[int]]) -> list[str]:
    rows: list[tuple[str, Sequence[int]]] = []
    start = 0
    for layer in range(1, len(sizes) + 1):
        if layer == len(sizes) or sizes[layer] != sizes[start]:
            rows.append((f"{start}" if layer - start == 1 else f"{start}-{layer - 1}", sizes[start]))
            start = layer
    return ["| layers | neurons of each expert |", "|---|---|"] + [
        f"| {layers} | {', '.join(map(str, row))} |" for layers, row in rows
    ]


def _usage(target_type: str) -> list[str]:
    trust = ", trust_remote_code=True" if target_type == "hmoe" else ""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]
