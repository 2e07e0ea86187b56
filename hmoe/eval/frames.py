"""The numbers of an analysis as tidy data frames: a row per model, layer, expert, pair of experts, token, ...

Figures are drawn from these frames, and each of them is a CSV file of the report. Frames with a column `model` are
indexed by its role, since names need not differ: `model`, `baseline`, `checkpoint 1`, `checkpoint 2`, ...; the last
checkpoint is the model. Values keep their Python types, so counts stay integers beside missing ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import pandas as pd


Rows = Iterator[dict[str, Any]]


def frames(result: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """By name; those for which the analysis has no numbers, such as stability without checkpoints, are empty."""
    tokens, runs = result["tokens"], list(_runs(result))
    return {
        "models": _frame(map(_model, runs), index="role"),
        "experts": _frame((row for layer in _layers_of(runs) for row in _experts(layer)), index="role"),
        "layers": _frame(map(_layer, _layers_of(runs)), index="role"),
        "sizes": _frame(_sizes(runs), index="role"),
        "expert_pairs": _frame(_pairs(result["model"]["routing"]["layers"], tokens["similarity"]["layers"])),
        "loss_and_size": _frame(
            {"position": position, **row} for position, data in tokens["loss_and_size"].items() for row in data["bins"]
        ),
        "difficult_tokens": _frame(tokens["difficulty"]["reductions"]),
        "difficult_token_sizes": _frame(_difficult_sizes(tokens["difficulty"])),
        "top_tokens": _frame(_top_tokens(tokens["top_tokens"])),
        "example_tokens": _frame(_example_tokens(tokens["examples"])),
        "stability": _frame(_stability(result["stability"] or {}), index="pair"),
    }


def _frame(rows: Iterable[dict[str, Any]], index: str | None = None) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), dtype=object)
    return frame.set_index(index) if index in frame else frame


def _runs(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Role and name of each model that read the text, and what came out."""
    yield {"role": "model", "model": result["model"]["name"]}, result["model"]
    if result["baseline"]:
        yield {"role": "baseline", "model": f"baseline {result['baseline']['name']}"}, result["baseline"]
    for position, run in enumerate(result["checkpoints"][:-1], start=1):
        yield {"role": f"checkpoint {position}", "model": run["name"]}, run


def _model(named_run: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    name, run = named_run
    scores = {key: run[key] for key in ("model_type", "parameters", "loss", "perplexity", "accuracy")}
    routing = run["routing"] or {}
    whole = {key: routing.get(key) for key in ("activated_parameters", "activated_ratio", "experts_per_token")}
    return {**name, "step": run.get("step"), **scores, **whole}


def _layers_of(runs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> Rows:
    """Every MoE layer of every model, with the model's name."""
    for name, run in runs:
        for index, layer in enumerate(run["routing"]["layers"] if run["routing"] else []):
            yield {"name": {**name, "layer": index}, **layer}


def _experts(layer: dict[str, Any]) -> Rows:
    for expert, size in enumerate(layer["sizes"]):
        numbers = {key: layer[key][expert] for key in ("load", "activation_share", "mean_probability")}
        choices = {f"choice_{rank}": counts[expert] for rank, counts in enumerate(layer["choices"], start=1)}
        yield {**layer["name"], "expert": expert, "size": size, **numbers, **choices}


def _layer(layer: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: value for key, value in layer.items() if not isinstance(value, list | dict)}
    ratios = enumerate(layer["max_over_min_by_choice"], start=1)
    tokens = enumerate(layer["num_experts_histogram"])
    return {
        **layer["name"],
        **numbers,
        **{f"max_over_min_choice_{rank}": ratio for rank, ratio in ratios},
        **{f"tokens_with_{count}_experts": share for count, share in tokens},
    }


def _sizes(runs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> Rows:
    for name, run in runs:
        for row in run["routing"]["by_size"] if run["routing"] else []:
            yield {**name, **row}


def _pairs(layers: list[dict[str, Any]], similarity: list[dict[str, Any]]) -> Rows:
    """Pairs of experts of a layer; of a large model only some layers have distances."""
    similar = {layer["layer"]: layer for layer in similarity}
    for index, layer in enumerate(layers):
        matrices = {key: layer[key] for key in ("coactivation", "coactivation_lift")}
        matrices |= {key: similar[index][key] if index in similar else None for key in ("wasserstein", "kl")}
        for (i, size), (j, other) in product(enumerate(layer["sizes"]), repeat=2):
            values = {key: matrix and matrix[i][j] for key, matrix in matrices.items()}
            yield {"layer": index, "expert": i, "other": j, "size": size, "other_size": other, **values}


def _difficult_sizes(difficulty: dict[str, Any]) -> Rows:
    for row in [{"selection": "all", "threshold": None, **difficulty["all_types"]}, *difficulty["shares"]]:
        selected = {key: row[key] for key in ("selection", "threshold", "types", "occurrences")}
        for kind in ("all_choices", "first_choice"):
            counts = {f"size_{size}": count for size, count in zip(row[kind]["sizes"], row[kind]["counts"])}
            sums = {key: row[kind][key] for key in ("large", "small", "large_share")}
            yield {**selected, "choices": kind, **counts, **sums}


def _top_tokens(rows: list[dict[str, Any]]) -> Rows:
    for row in rows:
        for rank, (token_id, token, share) in enumerate(zip(row["ids"], row["tokens"], row["shares"]), start=1):
            yield {"size": row["size"], "rank": rank, "id": token_id, "token": token, "share": share}


def _example_tokens(examples: dict[str, Any]) -> Rows:
    columns = zip(examples["ids"], examples["tokens"], examples["occurrences"], examples["shares"])
    for token_id, token, count, shares in columns:
        by_size = {f"size_{size}": share for size, share in zip(examples["sizes"], shares)}
        yield {"id": token_id, "token": token, "occurrences": count, **by_size}


def _stability(stability: dict[str, Any]) -> Rows:
    for kind in ("neighbours", "with_last"):
        for index, pair in enumerate(stability.get(kind, [])):
            for layer, numbers in enumerate(pair["layers"]):
                yield {"pair": index, "kind": kind, "from": pair["from"], "to": pair["to"], "layer": layer, **numbers}
