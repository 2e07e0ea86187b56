"""The model card of a training run, an adapter or a conversion: one template, filled from what was measured.

Absolute paths and tokens are kept out of it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import __version__
from .configuration_hmoe import ParameterCounts, count_parameters, is_hmoe
from .sources import local_path


CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
_SECRETS = ("hub_token", "push_to_hub_token", "token")


def write_card(folder: str | os.PathLike, name: str, config: Any, info: Mapping[str, Any]) -> Path:
    """Writes `README.md` into `folder` and returns its path.

    Args:
        name: of the model, OWNER/NAME or NAME.
        config: of the model, HMoE or any other.
        info: all optional.

            | key | value |
            |---|---|
            | `title` | default: the name |
            | `base_model` | what it was made from, a folder or a name on the Hub |
            | `is_adapter` | whether it is an adapter on that |
            | `num_parameters` | in total; HMoE knows it |
            | `load` | per layer, per expert, the share of tokens that activated it |
            | `command`, `settings`, `notes`, `check` | of a conversion |
            | `training` | rows of name and value |
            | `data` | sentences or names: what it was trained on |
            | `evaluation` | name to number, or task to such mappings |
            | `recipe` | YAML |
            | `datasets`, `license`, `language`, `tags` | metadata; data sets by their Hub names |
    """
    shown = public(info)
    results = _flat(info.get("evaluation") or {})
    context: dict[str, Any] = {"title": name.rpartition("/")[2], **shown, "source": shown.get("base_model")}
    context["results"] = [[task or "validation", metric, f"{value:.4f}"] for (task, metric), value in results.items()]
    if info.get("command"):
        context["command"] = shlex.join(shown["command"])
    if info.get("settings"):
        context["settings"] = json.dumps(shown["settings"], indent=2, default=str)
    context["is_hmoe"] = is_hmoe(config)
    if context["is_hmoe"]:
        context["counts"] = counts = count_parameters(config, load=info.get("load"))
        context["experts"] = _expert_table(config.layer_expert_sizes, counts, info.get("load"))
        context["uneven"] = any(len(set(row)) > 1 for row in config.layer_expert_sizes)
    card = ModelCard.from_template(
        _metadata(name, config, info, results),
        template_path=str(TEMPLATE),
        **{**context, "name": name, "config": config},
        version=__version__,
        transformers_version=transformers.__version__,
    )
    path = Path(folder) / CARD
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
    return path


def public(value: Any) -> Any:
    """`value` without the folders and the secrets of the machine it comes from."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        option, equals, argument = text.partition("=")
        if option.startswith("--") and equals:
            return f"{option}={public(argument)}"
        return Path(os.path.abspath(text)).name if text.startswith(("/", "~", ".")) or os.path.isabs(text) else text
    if isinstance(value, Mapping):
        return {str(name): public(entry) for name, entry in value.items() if name not in _SECRETS}
    return [public(entry) for entry in value] if isinstance(value, list | tuple) else value


def _metadata(
    name: str, config: Any, info: Mapping[str, Any], results: Mapping[tuple[str, str], float]
) -> ModelCardData:
    is_mixture = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    tags = [config.model_type, *(["mixture-of-experts"] if is_mixture else []), *(info.get("tags") or [])]
    return ModelCardData(
        model_name=name.rpartition("/")[2],
        base_model=_hub_name(info.get("base_model")),
        language=info.get("language"),
        license=info.get("license"),
        library_name="peft" if info.get("is_adapter") else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        datasets=info.get("datasets") or None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=task or "validation",
                dataset_name=task or "validation",
                metric_type=metric,
                metric_value=value,
            )
            for (task, metric), value in results.items()
            if metric != "loss"
        ]
        or None,
        ignore_metadata_errors=True,
    )


def _hub_name(source: Any) -> list[str] | None:
    try:
        return [str(source)] if source and local_path(source) is None else None
    except ValueError:  # a folder that is gone
        return None


def _flat(evaluation: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """(task, metric) to value, the task empty where there is none; numbers only."""
    flat: dict[tuple[str, str], float] = {}
    for name, value in evaluation.items():
        nested = isinstance(value, Mapping)
        for metric, number in value.items() if nested else [(name, value)]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                flat[name if nested else "", metric.removeprefix("eval_")] = number
    return flat


def _expert_table(
    sizes: Sequence[Sequence[int]], counts: ParameterCounts, load: Sequence[Sequence[float]] | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one per expert where all layers have the same sizes, else one per run of equal layers."""
    if all(row == sizes[0] for row in sizes):
        header = ["expert", "neurons", "parameters per layer"]
        rows = [[str(expert), f"{size:,}", f"{counts.experts[0][expert]:,}"] for expert, size in enumerate(sizes[0])]
        if load:
            header.append("tokens that activate it")
            for row, shares in zip(rows, zip(*load)):
                row.append(f"{sum(shares) / len(shares):.1%}")
        return header, rows
    header, rows = ["layers", "expert sizes (neurons)"], []
    shares_of = load or [[]] * len(sizes)
    for (row_sizes, shares), run in groupby(range(len(sizes)), key=lambda layer: (sizes[layer], shares_of[layer])):
        layers = list(run)
        number = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        shown = [", ".join(f"{100 * share:.1f}" for share in shares)] if load else []
        rows.append([number, ", ".join(map(str, row_sizes)), *shown])
    return header + (["tokens that activate each, %"] if load else []), rows
