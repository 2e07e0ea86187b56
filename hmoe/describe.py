"""The `hmoe describe` command: what a model costs, beside its homogeneous twin, without making a tensor.

hmoe describe hmoe-0.4b
hmoe describe runs/cpu/hmoe --context 4096 --batch_size 8
hmoe describe hmoe-3b --num_ranks 4
hmoe describe recipes/hmoe-3b.yaml --json
hmoe describe mistralai/Mixtral-8x7B-v0.1
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hmoe.configuration_hmoe import HMoEConfig, is_hmoe
from hmoe.costs import TRAIN_FACTOR, ModelCosts, abbreviated, equal_load, inverse_size_load, model_costs
from hmoe.placement import describe_placement
from hmoe.presets import PRESETS
from hmoe.sources import load_checkpoint


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Weight, gradient and the two moments of AdamW; autocast keeps all of them in float32.
TRAIN_STATE_BYTES_PER_PARAMETER = 16


def describe(
    config: Any,
    *,
    context: int | None = None,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    experts_per_token: float | None = None,
) -> dict[str, Any]:
    """Sizes, parameters, FLOPs and memory of the causal language model of a config, by counting.

    | entry | meaning |
    |---|---|
    | `layer_sizes` | neurons of the experts, per layer that has some |
    | `tile_size`, `num_tiles` | neurons of a tile; tiles per layer; None and empty for other types than HMoE |
    | `routing` | `top_k`, `top_p` or `dense` |
    | `experts_per_token` | assumed for what follows; with Top-P it depends on the data |
    | `parameters`, `expert_parameters` | all of them; those of experts |
    | `activated`, `activated_min`, `activated_max` | parameters one token uses: at equal load, the least, the most |
    | `activated_inverse_size` | at a load ~ 1 / size, where the parameter penalty (HMoE Eq. 4) pulls |
    | `activated_ratio`, `activated_ratio_inverse_size` | as shares of the expert parameters (HMoE Table 2) |
    | `flops_per_token` | forward, at equal load and full context, by the `"matmul"` convention of `hmoe.costs` |
    | `weight_bytes`, `kv_cache_bytes` | at inference |
    | `train_state_bytes` | float32 weights, gradients and AdamW moments |
    | `activation_bytes`, `activation_bytes_checkpointing` | kept for backward in float32 by one micro-batch, without |
    | | and with gradient checkpointing; an estimate, without allocator overhead and temporary buffers |

    Args:
        context: tokens per sequence; default `max_position_embeddings`.
        batch_size: sequences, for cache and activations.
        dtype: of the weights and the cache at inference, a key of `BYTES`.
        experts_per_token: mean number that Top-P activates; default 1, its least. Not for Top-K, which has its own.

    Raises:
        ValueError: for an argument that cannot be, with the remedy, or a model whose costs are not known, with the
            reason.
    """
    costs = model_costs(config)
    if costs.not_counted:
        raise ValueError(f"this model of type {config.model_type!r} cannot be described: {costs.not_counted}")
    context = config.max_position_embeddings if context is None else context
    _check_arguments(costs, context, batch_size, dtype, experts_per_token)
    per_token = float(experts_per_token or costs.experts_per_token or bool(costs.sizes))
    load = equal_load(costs.sizes, per_token)
    inverse = [inverse_size_load(sizes, per_token) for sizes in costs.sizes]
    least, most = costs.activated_bounds()
    activations = costs.activation_elements(batch_size * context, per_token)
    tile = getattr(config, "expert_tile_size", None)
    return {
        "layer_sizes": costs.sizes,
        "tile_size": tile,
        "num_tiles": [sum(sizes) // tile for sizes in costs.sizes] if tile else [],
        "routing": costs.routing,
        "experts_per_token": per_token,
        "parameters": costs.parameters,
        "expert_parameters": sum(map(sum, costs.expert_parameters)),
        "activated": costs.activated_parameters(load),
        "activated_min": least,
        "activated_max": most,
        "activated_inverse_size": costs.activated_parameters(inverse),
        "activated_ratio": costs.activated_ratio(load),
        "activated_ratio_inverse_size": costs.activated_ratio(inverse),
        "flops_per_token": costs.forward_flops().count(1, context, load),
        "weight_bytes": costs.parameters * BYTES[dtype],
        "kv_cache_bytes": costs.cache_elements(context) * batch_size * BYTES[dtype],
        "train_state_bytes": costs.parameters * TRAIN_STATE_BYTES_PER_PARAMETER,
        "activation_bytes": 4 * activations[0],
        "activation_bytes_checkpointing": 4 * activations[1],
    }


def _check_arguments(
    costs: ModelCosts, context: int, batch_size: int, dtype: str, experts_per_token: float | None
) -> None:
    if dtype not in BYTES:
        raise ValueError(f"`dtype` must be one of {list(BYTES)}, got {dtype!r}")
    for name, value in (("context", context), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if experts_per_token is None:
        return
    if costs.routing != "top_p":
        raise ValueError(
            f"`experts_per_token`={experts_per_token} is for Top-P routing; the routing of this model is "
            f"{costs.routing!r} with `num_experts_per_tok`={costs.experts_per_token}: leave it out"
        )
    most = min(costs.max_experts_per_token, *map(len, costs.sizes))
    if not 1 <= experts_per_token <= most:
        raise ValueError(f"`experts_per_token` must be from 1 to {most} for this model, got {experts_per_token}")


def homogeneous_twin(config: HMoEConfig) -> HMoEConfig:
    """The same model with experts of one size per layer and the same total width, and a load-balancing loss (1e-2,
    HMoE section 4) in place of the parameter penalty. A width that does not divide is rounded down."""
    overrides = {
        "expert_intermediate_sizes": [[sum(row) // len(row)] * len(row) for row in config.layer_expert_sizes],
        "expert_tile_size": None,
        "parameter_penalty_loss_coef": 0.0,
        "load_balancing_loss_coef": config.load_balancing_loss_coef or 0.01,
    }
    return type(config).from_dict({**config.to_dict(), **overrides})


def load_config(source: str) -> Any:
    """The config of a preset, a model folder or Hub id, a `config.json`, or a training recipe (YAML): an `HMoEConfig`,
    or that of another model type.

    Raises:
        ValueError: for a source that is none of these.
    """
    if source.endswith((".yaml", ".yml")):
        return _config_of_recipe(Path(source).expanduser())
    if source in PRESETS or not ("/" in source or Path(source).exists()):
        return HMoEConfig.from_preset(source)  # raises, with the nearest preset, if there is none
    return load_checkpoint(AutoConfig.from_pretrained, source, "config")


def _config_of_recipe(path: Path) -> Any:
    from hmoe.training.arguments import ModelOptions, known_fields
    from hmoe.training.model import build_config
    from hmoe.training.recipe import read_recipe

    recipe = read_recipe(path, known_fields())
    names = {field.name for field in fields(ModelOptions)}
    options = ModelOptions(**{name: value for name, value in recipe.items() if name in names})
    if options.model_type is not None and "vocab_size" not in (options.model_config or {}):
        size = recipe.get("train_tokenizer")
        if size is None:
            raise ValueError(f"{path}: only the tokenizer tells the vocabulary: set `model_config.vocab_size`")
        options.model_config = {**(options.model_config or {}), "vocab_size": size}  # type: ignore[dict-item]
    return build_config(options, None)


def report(config: Any, **options: Any) -> dict[str, Any]:
    """The description of a model and of its homogeneous twin, as plain numbers; `twin` is None where they are one, and
    for other types than HMoE, whose experts have one size."""
    twin = homogeneous_twin(config) if is_hmoe(config) else None
    if twin is not None and twin.layer_expert_sizes == config.layer_expert_sizes:
        twin = None
    return {
        "model": describe(config, **options),
        "twin": None if twin is None else describe(twin, **options),
    }


def _bytes(value: float) -> str:
    unit, limit = ("GiB", 2**30) if value >= 2**30 else ("MiB", 2**20)
    return f"{value / limit:.4g} {unit}"


def _layers_text(layers: list[Any]) -> str:
    if all(layer == layers[0] for layer in layers):
        return str(layers[0])
    return "; ".join(str(layer) for layer in layers)


def _rows(item: dict[str, Any]) -> dict[str, str]:
    assumed = " assumed" if item["routing"] == "top_p" else ""
    costs = {
        "forward FLOPs per token": abbreviated(item["flops_per_token"]),
        "training FLOPs per token": abbreviated(TRAIN_FACTOR * item["flops_per_token"]),
        "inference: weights": _bytes(item["weight_bytes"]),
        "inference: KV cache": _bytes(item["kv_cache_bytes"]),
        "training: weights, gradients, AdamW": _bytes(item["train_state_bytes"]),
        "training: activations (estimate)": _bytes(item["activation_bytes"]),
        "  with gradient checkpointing": _bytes(item["activation_bytes_checkpointing"]),
    }
    if item["routing"] == "dense":
        return {"parameters, all activated": abbreviated(item["parameters"]), **costs}
    tiles = {}
    if item["tile_size"]:
        tiles["tile size [neurons]"] = str(item["tile_size"])
        tiles["tiles per layer"] = _layers_text(item["num_tiles"])
    used, used_inverse = abbreviated(item["activated"]), abbreviated(item["activated_inverse_size"])
    return {
        "expert sizes [neurons]": _layers_text(item["layer_sizes"]),
        "total width [neurons]": _layers_text([sum(sizes) for sizes in item["layer_sizes"]]),
        **tiles,
        "routing": f"{item['routing']}, {item['experts_per_token']:g} experts per token{assumed}",
        "parameters": abbreviated(item["parameters"]),
        "  of experts": abbreviated(item["expert_parameters"]),
        "activated per token, equal load": f"{used} ({item['activated_ratio']:.1%} of experts)",
        "  load ~ 1 / size": f"{used_inverse} ({item['activated_ratio_inverse_size']:.1%})",
        "  least .. most": f"{abbreviated(item['activated_min'])} .. {abbreviated(item['activated_max'])}",
        **costs,
    }


def format_report(result: dict[str, Any], name: str, conditions: str) -> str:
    """The table that `hmoe describe` prints."""
    tables = [_rows(item) for item in (result["model"], result["twin"]) if item]
    columns = [["", *tables[0]]]
    columns += [[title, *table.values()] for title, table in zip((name, "homogeneous twin"), tables)]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(map(str.ljust, row, widths)) for row in zip(*columns)]
    lines += ["", conditions]
    if result["twin"] is None and result["model"]["routing"] != "dense":
        lines.append("All experts of a layer have one size: the model is its own homogeneous twin.")
    return "\n".join(line.rstrip() for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hmoe describe",
        description="Sizes, parameters, FLOPs and memory of a model, beside its homogeneous twin.",
    )
    parser.add_argument("model", help="a preset, a model folder or Hub id, a config.json, or a training recipe")
    parser.add_argument("--context", type=int, help="tokens per sequence (default: the model's longest)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=BYTES, help="at inference (default: %(default)s)")
    parser.add_argument(
        "--experts_per_token", type=float, help="mean number of experts that Top-P activates (default: 1, the least)"
    )
    parser.add_argument(
        "--num_ranks", type=int, help="also: how placements balance the experts on so many ranks (`ep_size`)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs `hmoe describe ...`; returns the exit status."""
    args = _parser().parse_args(argv)
    config = load_config(args.model)
    conditions = {"context": args.context, "batch_size": args.batch_size, "dtype": args.dtype}
    result = report(config, **conditions, experts_per_token=args.experts_per_token)
    if args.context is None:
        conditions["context"] = config.max_position_embeddings
    if args.num_ranks is not None and not is_hmoe(config):
        raise ValueError(f"--num_ranks is for HMoE, and this is {config.model_type!r}: see `hmoe convert`")
    placement = None if args.num_ranks is None else describe_placement(config, args.num_ranks)
    if args.json:
        answer = {"name": args.model, **conditions, **result}
        print(json.dumps(answer if placement is None else {**answer, "placement": placement.splitlines()}, indent=2))
        return 0
    text = (
        f"At {args.batch_size} x {conditions['context']} tokens; inference in {args.dtype}, training states in "
        "float32. A multiply and an add are two FLOPs."
    )
    print(format_report(result, args.model, text))
    if placement is not None:
        print(f"\n{placement}")
    return 0
