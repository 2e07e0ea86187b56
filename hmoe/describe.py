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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hmoe.configuration_hmoe import HMoEConfig, is_hmoe
from hmoe.placement import describe_placement
from hmoe.presets import PRESETS
from hmoe.sources import load_checkpoint


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Weight, gradient and the two moments of AdamW; autocast keeps all of them in float32.
TRAINING_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class Description:
    """Sizes and costs of one model; [`describe`] makes it, [`hmoe.describe_stock.describe_stock`] for other types.

    Attributes:
        layer_sizes: neurons of the experts, per layer that has some.
        tile_size, num_tiles: neurons of a tile; tiles of a layer, per layer; None and empty for other types.
        routing: `top_k`, `top_p` or `dense`.
        parameters, expert_parameters: all of them; those of experts.
        activated, activated_min, activated_max: parameters one token uses: at equal load, the least, the most.
        activated_inverse_size: at a load proportional to 1 / size, where the parameter penalty (HMoE Eq. 4) pulls.
        activated_ratio, activated_ratio_inverse_size: the same as shares of the expert parameters (HMoE Table 2).
        experts_per_token: assumed for the above; with Top-P it depends on the data.
        flops_per_token: forward, at equal load, mean over the positions of the context taken as full; a multiply and
            an add are two; embedding look-ups and norms are none, masked attention scores count.
        weight_bytes, kv_cache_bytes: at inference.
        train_state_bytes: float32 weights, gradients and AdamW moments.
        activation_bytes: kept for backward in float32 by one micro-batch, without and with gradient checkpointing; an
            estimate, without allocator overhead and temporary buffers.
    """

    layer_sizes: list[list[int]]
    tile_size: int | None
    num_tiles: list[int]
    routing: str
    experts_per_token: float
    parameters: int
    expert_parameters: int
    activated: float
    activated_min: int
    activated_max: int
    activated_inverse_size: float
    activated_ratio: float
    activated_ratio_inverse_size: float
    flops_per_token: float
    weight_bytes: int
    kv_cache_bytes: int
    train_state_bytes: int
    activation_bytes: int
    activation_bytes_checkpointing: int


def describe(
    config: HMoEConfig,
    *,
    context: int | None = None,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    experts_per_token: float | None = None,
) -> Description:
    """Sizes, parameters, FLOPs and memory of `HMoEForCausalLM(config)`, by arithmetic on the config.

    Args:
        context: tokens per sequence; default `max_position_embeddings`.
        batch_size: sequences, for cache and activations.
        dtype: of the weights and the cache at inference, a key of `BYTES`.
        experts_per_token: mean number that Top-P activates; default 1, its least. Not for Top-K, which has its own.

    Raises:
        ValueError: for an argument that cannot be; the message names it and the remedy.
    """
    from hmoe.configuration_hmoe import count_parameters

    context = config.max_position_embeddings if context is None else context
    _check_arguments(config, context, batch_size, dtype, experts_per_token)
    per_token = _experts_per_token(config, experts_per_token)
    layer_sizes = config.layer_expert_sizes
    counts = count_parameters(config, load=[[per_token / len(sizes)] * len(sizes) for sizes in layer_sizes])
    inverse = count_parameters(config, load=[inverse_size_load(sizes, per_token) for sizes in layer_sizes])
    ffn_elements = [2 * per_token * sum(sizes) / len(sizes) for sizes in layer_sizes]  # gate and up projections
    activations = activation_elements(
        config.hidden_size, config.vocab_size, _attention_widths(config), ffn_elements, batch_size * context
    )
    return Description(
        layer_sizes=layer_sizes,
        tile_size=config.expert_tile_size,
        num_tiles=[sum(sizes) // config.expert_tile_size for sizes in layer_sizes],  # type: ignore[operator]
        routing=config.routing,
        experts_per_token=per_token,
        parameters=counts.total,
        expert_parameters=sum(map(sum, counts.experts)),
        activated=counts.activated,
        activated_min=counts.activated_min,
        activated_max=counts.activated_max,
        activated_inverse_size=inverse.activated,
        activated_ratio=counts.activated_ratio,
        activated_ratio_inverse_size=inverse.activated_ratio,
        flops_per_token=_flops_per_token(config, context, per_token),
        weight_bytes=counts.total * BYTES[dtype],
        kv_cache_bytes=_cache_bytes(config, context, batch_size, dtype),
        train_state_bytes=counts.total * TRAINING_BYTES_PER_PARAMETER,
        activation_bytes=4 * activations[0],
        activation_bytes_checkpointing=4 * activations[1],
    )


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


def inverse_size_load(sizes: list[int], experts_per_token: float) -> list[float]:
    """Shares of tokens proportional to 1 / size that sum to `experts_per_token`; no share above 1."""
    load = [0.0] * len(sizes)
    free, remaining = list(range(len(sizes))), experts_per_token
    while free:
        total = sum(1 / sizes[expert] for expert in free)
        full = [expert for expert in free if remaining / sizes[expert] / total > 1]
        for expert in full or free:
            load[expert] = 1.0 if full else remaining / sizes[expert] / total
        remaining -= len(full)
        free = [expert for expert in free if expert not in full] if full else []
    return load


def check_sizes(context: int, batch_size: int, dtype: str) -> None:
    """Refuses sizes below 1 and unknown dtypes with a `ValueError`."""
    if dtype not in BYTES:
        raise ValueError(f"`dtype` must be one of {list(BYTES)}, got {dtype!r}")
    for name, value in (("context", context), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")


def _check_arguments(
    config: HMoEConfig, context: int, batch_size: int, dtype: str, experts_per_token: float | None
) -> None:
    check_sizes(context, batch_size, dtype)
    if experts_per_token is None:
        return
    if config.routing != "top_p":
        raise ValueError(
            f"`experts_per_token`={experts_per_token} is for Top-P routing; this model activates "
            f"`num_experts_per_tok`={config.num_experts_per_tok} experts: leave it out"
        )
    most = config.max_experts_per_tok or min(map(len, config.layer_expert_sizes))
    if not 1 <= experts_per_token <= most:
        raise ValueError(f"`experts_per_token` must be from 1 to {most} for this model, got {experts_per_token}")


def _experts_per_token(config: HMoEConfig, experts_per_token: float | None) -> float:
    if config.routing == "top_k":
        return float(config.num_experts_per_tok)
    return 1.0 if experts_per_token is None else float(experts_per_token)


def _attention_widths(config: HMoEConfig) -> tuple[int, int]:
    head_dim: int = config.head_dim  # type: ignore[assignment]
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim  # type: ignore[operator]


def _flops_per_token(config: HMoEConfig, context: int, per_token: float) -> float:
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query_width, key_width = _attention_widths(config)
    keys = context if config.sliding_window is None else min(context, config.sliding_window)
    attention = layers * (4 * hidden * (query_width + key_width) + 4 * query_width * keys)
    routers = (2 if config.router_type == "modse" else 1) * 2 * hidden * sum(map(len, config.layer_expert_sizes))
    experts = sum(6 * hidden * per_token * sum(sizes) / len(sizes) for sizes in config.layer_expert_sizes)
    return attention + routers + experts + 2 * hidden * config.vocab_size


def _cache_bytes(config: HMoEConfig, context: int, batch_size: int, dtype: str) -> int:
    keys = context if config.sliding_window is None else min(context, config.sliding_window)
    return 2 * BYTES[dtype] * batch_size * keys * config.num_hidden_layers * _attention_widths(config)[1]


def activation_elements(
    hidden_size: int, vocab_size: int, attention_widths: tuple[int, int], ffn_elements: Sequence[float], tokens: int
) -> tuple[int, int]:
    """Elements kept for backward: without checkpointing, and with (each layer's input, and one layer at a time).

    Args:
        attention_widths: of queries and of keys.
        ffn_elements: per layer, what FFN or experts keep of a token.
    """
    query_width, key_width = attention_widths
    # Two norms keep input, normalised input and output; attention keeps q, k, v and its output.
    layers = [6 * hidden_size + 2 * query_width + 2 * key_width + kept for kept in ffn_elements]
    head = 3 * hidden_size + 2 * vocab_size
    whole = tokens * (sum(layers) + head)
    return round(whole), round(tokens * (len(layers) * hidden_size + max(layers) + head))


def load_config(source: str) -> Any:
    """The config of a preset, a model folder or Hub id, a `config.json`, or a training recipe (YAML): an `HMoEConfig`,
    or that of one of the types that [`hmoe.describe_stock`] knows.

    Raises:
        ValueError: for a source that is none of these, or a model of a type that cannot be described.
    """
    if source.endswith((".yaml", ".yml")):
        return _config_of_recipe(Path(source).expanduser())
    if source in PRESETS or not ("/" in source or Path(source).exists()):
        return HMoEConfig.from_preset(source)  # raises, with the nearest preset, if there is none
    return _known_type(load_checkpoint(AutoConfig.from_pretrained, source, "config"), source)


def _known_type(config: Any, source: str) -> Any:
    from .describe_stock import described_types

    known = ("hmoe", *described_types())
    if config.model_type not in known:
        raise ValueError(
            f"{source} is a model of type {config.model_type!r}; `hmoe describe` knows {', '.join(known)}: describe "
            "the nearest of them with its sizes"
        )
    return config


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
    return _known_type(build_config(options, None), str(path))


def report(config: Any, **options: Any) -> dict[str, Any]:
    """The description of a model and of its homogeneous twin, as plain numbers; `twin` is None where they are one, and
    for other types than HMoE, whose experts have one size."""
    if not is_hmoe(config):
        from .describe_stock import describe_stock

        return {"model": asdict(describe_stock(config, **options)), "twin": None}
    twin = homogeneous_twin(config)
    same = twin.layer_expert_sizes == config.layer_expert_sizes
    return {
        "model": asdict(describe(config, **options)),
        "twin": None if same else asdict(describe(twin, **options)),
    }


def _count(value: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.4g} {unit}"
    return f"{value:.4g}"


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
        "forward FLOPs per token": _count(item["flops_per_token"]),
        "training FLOPs per token": _count(3 * item["flops_per_token"]),
        "inference: weights": _bytes(item["weight_bytes"]),
        "inference: KV cache": _bytes(item["kv_cache_bytes"]),
        "training: weights, gradients, AdamW": _bytes(item["train_state_bytes"]),
        "training: activations (estimate)": _bytes(item["activation_bytes"]),
        "  with gradient checkpointing": _bytes(item["activation_bytes_checkpointing"]),
    }
    if item["routing"] == "dense":
        return {"parameters, all activated": _count(item["parameters"]), **costs}
    tiles = {}
    if item["tile_size"]:
        tiles["tile size [neurons]"] = str(item["tile_size"])
        tiles["tiles per layer"] = _layers_text(item["num_tiles"])
    return {
        "expert sizes [neurons]": _layers_text(item["layer_sizes"]),
        "total width [neurons]": _layers_text([sum(sizes) for sizes in item["layer_sizes"]]),
        **tiles,
        "routing": f"{item['routing']}, {item['experts_per_token']:g} experts per token{assumed}",
        "parameters": _count(item["parameters"]),
        "  of experts": _count(item["expert_parameters"]),
        "activated per token, equal load": f"{_count(item['activated'])} ({item['activated_ratio']:.1%} of experts)",
        "  load ~ 1 / size": f"{_count(item['activated_inverse_size'])} ({item['activated_ratio_inverse_size']:.1%})",
        "  least .. most": f"{_count(item['activated_min'])} .. {_count(item['activated_max'])}",
        **costs,
    }


def format_report(result: dict[str, Any], name: str, conditions: str) -> str:
    """The table that `hmoe describe` prints."""
    columns = [_rows(result["model"])] + ([_rows(result["twin"])] if result["twin"] else [])
    names = [name] + (["homogeneous twin"] if result["twin"] else [])
    widths = [max(len(text) for text in [title, *column.values()]) for title, column in zip(names, columns)]
    label_width = max(map(len, columns[0]))
    lines = [" " * label_width + "".join(f"  {title:<{width}}" for title, width in zip(names, widths))]
    for label in columns[0]:
        cells = "".join(f"  {column[label]:<{width}}" for column, width in zip(columns, widths))
        lines.append(f"{label:<{label_width}}{cells}")
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
    context = config.max_position_embeddings if args.context is None else args.context
    result = report(
        config,
        context=context,
        batch_size=args.batch_size,
        dtype=args.dtype,
        experts_per_token=args.experts_per_token,
    )
    if args.num_ranks is not None and not is_hmoe(config):
        raise ValueError(f"--num_ranks is for HMoE, and this is {config.model_type!r}: see `hmoe convert`")
    placement = None if args.num_ranks is None else describe_placement(config, args.num_ranks)
    conditions = {"context": context, "batch_size": args.batch_size, "dtype": args.dtype}
    if args.json:
        answer = {"name": args.model, **conditions, **result}
        print(json.dumps(answer if placement is None else {**answer, "placement": placement.splitlines()}, indent=2))
        return 0
    text = (
        f"At {args.batch_size} x {context} tokens; inference in {args.dtype}, training states in float32. A multiply "
        "and an add are two FLOPs."
    )
    print(format_report(result, args.model, text))
    if placement is not None:
        print(f"\n{placement}")
    return 0
