"""Every number of an analysis as flat tables, for CSV files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


Table = list[dict[str, Any]]


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Tables by name, the empty ones left out."""
    every = {
        "models": list(_models(result)),
        "experts": list(_experts(result)),
        "layers": list(_layers(result)),
        "sizes": list(_sizes(result)),
        "expert_pairs": list(_pairs(result)),
        "loss_and_size": list(_losses(result)),
        "difficult_tokens": result["tokens"]["difficulty"]["reductions"],
        "difficult_token_sizes": list(_difficult_sizes(result)),
        "top_tokens": list(_top_tokens(result)),
        "example_tokens": list(_example_tokens(result)),
        "stability": list(_stability(result)),
    }
    return {name: rows for name, rows in every.items() if rows}


def _runs(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Model, baseline and earlier checkpoints; the last checkpoint is the model."""
    yield result["model"]["name"], result["model"]
    if result["baseline"]:
        yield f"baseline {result['baseline']['name']}", result["baseline"]
    for run in result["checkpoints"][:-1]:
        yield run["name"], run


def _models(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    whole = ("activated_parameters", "activated_ratio", "experts_per_token")
    for name, run in _runs(result):
        row = {
            "model": name,
            "step": run.get("step"),
            **{key: run[key] for key in ("model_type", "parameters", "loss", "perplexity", "accuracy")},
        }
        yield row | {key: (run["routing"] or {}).get(key) for key in whole}


def _routed(result: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for name, run in _runs(result):
        for number, layer in enumerate(run["routing"]["layers"] if run["routing"] else []):
            yield name, number, layer


def _experts(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, number, layer in _routed(result):
        for expert, size in enumerate(layer["sizes"]):
            choices = {f"choice_{slot + 1}": counts[expert] for slot, counts in enumerate(layer["choices"])}
            yield {
                "model": name,
                "layer": number,
                "expert": expert,
                "size": size,
                "load": layer["load"][expert],
                "activation_share": layer["activation_share"][expert],
                "mean_probability": layer["mean_probability"][expert],
                **choices,
            }


def _layers(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, number, layer in _routed(result):
        plain = {key: value for key, value in layer.items() if not isinstance(value, list)}
        slots = {f"max_over_min_choice_{i + 1}": value for i, value in enumerate(layer["max_over_min_by_choice"])}
        tokens = {f"tokens_with_{i}_experts": share for i, share in enumerate(layer["num_experts_histogram"])}
        yield {"model": name, "layer": number, **plain, **slots, **tokens}


def _sizes(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, run in _runs(result):
        for row in run["routing"]["by_size"] if run["routing"] else []:
            yield {"model": name, **row}


def _pairs(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    similar = {layer["layer"]: layer for layer in result["tokens"]["similarity"]["layers"]}
    for number, layer in enumerate(result["model"]["routing"]["layers"]):
        for i, size in enumerate(layer["sizes"]):
            for j, other in enumerate(layer["sizes"]):
                row = {"layer": number, "expert": i, "other": j, "size": size, "other_size": other}
                row["coactivation"] = layer["coactivation"][i][j]
                row["coactivation_lift"] = layer["coactivation_lift"][i][j]
                for kind in ("wasserstein", "kl"):
                    row[kind] = similar[number][kind][i][j] if number in similar else None
                yield row


def _losses(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, data in result["tokens"]["loss_and_size"].items():
        for row in data["bins"]:
            yield {"position": name, **row}


def _difficult_sizes(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    data = result["tokens"]["difficulty"]
    for row in [{"selection": "all", "threshold": None, **data["all_types"]}, *data["shares"]]:
        for kind in ("all_choices", "first_choice"):
            counts = dict(zip(row[kind]["sizes"], row[kind]["counts"]))
            yield {
                "selection": row["selection"],
                "threshold": row["threshold"],
                "types": row["types"],
                "occurrences": row["occurrences"],
                "choices": kind,
                **{f"size_{size}": count for size, count in counts.items()},
                **{key: row[kind][key] for key in ("large", "small", "large_share")},
            }


def _top_tokens(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in result["tokens"]["top_tokens"]:
        for rank, (number, token, share) in enumerate(zip(row["ids"], row["tokens"], row["shares"]), start=1):
            yield {"size": row["size"], "rank": rank, "id": number, "token": token, "share": share}


def _example_tokens(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    data = result["tokens"]["examples"]
    for number, token, count, shares in zip(data["ids"], data["tokens"], data["occurrences"], data["shares"]):
        by_size = {f"size_{size}": share for size, share in zip(data["sizes"], shares)}
        yield {"id": number, "token": token, "occurrences": count, **by_size}


def _stability(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind in ("neighbours", "with_last"):
        for pair in (result["stability"] or {}).get(kind, []):
            for number, layer in enumerate(pair["layers"]):
                yield {"kind": kind, "from": pair["from"], "to": pair["to"], "layer": number, **layer}
