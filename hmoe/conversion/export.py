"""HMoE to Mixtral or Qwen3-MoE: every expert padded with zeros to the widest, so that stock runtimes serve it.

A zero neuron adds nothing, so the logits are the same. The price is the padding, which the command prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..configuration_hmoe import HMoEConfig
from ..costs import count_parameters
from .base import Conversion, Options, Plan, execute
from .checkpoint import SourceCheckpoint
from .families import MOE_FAMILIES, SHARED_FIELDS, CannotConvert
from .layout import model_tensors, read_banks, unpack_expert


_SERVE_HMOE = "Serve the HMoE checkpoint itself with Transformers"
_TOP_K = ("routing", "top_k", "its tokens all activate the same number of experts", _SERVE_HMOE)
_LINEAR = ("router_type", "linear", "its router is linear", _SERVE_HMOE)
# By model type to export to: a field of the HMoE config, the value that it must have, why, and the remedy.
REQUIRED = {
    "mixtral": (
        _TOP_K,
        _LINEAR,
        ("qk_norm", False, "it does not normalise queries and keys", "Export to qwen3_moe (--to qwen3_moe)"),
        ("attention_bias", False, "its attention has no biases", _SERVE_HMOE),
        ("norm_topk_prob", True, "it always renormalises the gate weights", _SERVE_HMOE),
    ),
    "qwen3_moe": (
        _TOP_K,
        _LINEAR,
        ("qk_norm", True, "it always normalises queries and keys", "Export to mixtral (--to mixtral)"),
    ),
}
EXPORT_TYPES = tuple(REQUIRED)


def convert_export(
    source: str | Path, target: str | Path, *, to: str = "auto", options: Options | None = None
) -> Conversion:
    """An HMoE checkpoint with Top-K routing as Mixtral, or as Qwen3-MoE when it has `qk_norm`.

    Args:
        to: `"mixtral"`, `"qwen3_moe"`, or `"auto"`: what the attention needs.

    Raises:
        CannotConvert: a config field that the target cannot express, with its value, the reason and the remedy.
    """
    options = options or Options()
    opened = SourceCheckpoint(source, ("hmoe",), "export")
    config = opened.config
    target_type = _check_exportable(config, to)
    dense = _dense_layers(opened, target_type)
    stock_config = _stock_config(config, target_type, dense)

    def experts(layer: int) -> Iterator[tuple[str, Tensor]]:
        return _dense_tensors(opened, layer) if layer in dense else _expert_tensors(opened, stock_config, layer)

    plan = Plan(
        source=opened,
        config=stock_config,
        tensors=model_tensors(opened, config, experts),
        settings={"conversion": "export", "to": target_type},
        exact=True,
        factor=config.num_experts_per_tok if dense else 1,
        notes=[
            _padding_note(config, stock_config, options.written_dtype(opened.dtype).itemsize),
            *_training_notes(config),
        ],
    )
    return execute(plan, target, options)


def _check_exportable(config: HMoEConfig, to: str) -> str:
    """The model type to export to; raises CannotConvert, naming the field, if there is none."""
    if to not in ("auto", *EXPORT_TYPES):
        raise ValueError(f"`to` must be one of {['auto', *EXPORT_TYPES]}, got {to!r}")
    target_type = to if to != "auto" else ("qwen3_moe" if config.qk_norm else "mixtral")
    for field, required, reason, remedy in REQUIRED[target_type]:
        value = getattr(config, field)
        if value != required:
            raise CannotConvert(field, value, f"the target is {target_type}, and {reason}", remedy)
    return target_type


def _dense_layers(source: SourceCheckpoint, target_type: str) -> list[int]:
    """Layers that Qwen3-MoE can hold as a dense FFN: all experts active, all with the same weight (a zero router)."""
    config = source.config
    counts = [len(sizes) for sizes in config.layer_expert_sizes]
    layers = [layer for layer, count in enumerate(counts) if count != max(counts)]
    field, uneven = "expert_intermediate_sizes", f"{sorted(set(counts))} experts by layer"
    if layers and target_type == "mixtral":
        raise CannotConvert(field, uneven, "mixtral has the same number of experts in every layer", _SERVE_HMOE)
    for layer in layers:
        if counts[layer] != config.num_experts_per_tok or source.tensor(_router_name(layer)).any():
            reason = (
                f"qwen3_moe holds layers with fewer experts than others only as dense layers, and in layer {layer} "
                "the experts are not all active with equal weights"
            )
            raise CannotConvert(field, uneven, reason, _SERVE_HMOE)
    totals = sorted({sum(config.layer_expert_sizes[layer]) for layer in layers})
    if len(totals) > 1:
        reason = "qwen3_moe has one `intermediate_size` for all dense layers"
        raise CannotConvert(field, f"totals {totals} in the dense layers {layers}", reason, _SERVE_HMOE)
    return layers


def _router_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def _stock_config(config: HMoEConfig, target_type: str, dense: list[int]) -> PreTrainedConfig:
    """The config of the stock class that computes the same."""
    sparse = [sizes for layer, sizes in enumerate(config.layer_expert_sizes) if layer not in dense]
    widest = max(map(max, sparse))
    same = ("head_dim", "sliding_window", "attention_dropout", "num_experts_per_tok", "output_router_logits")
    fields: dict[str, Any] = {name: getattr(config, name) for name in (*SHARED_FIELDS, *same)}
    fields |= {MOE_FAMILIES[target_type].width: widest, "num_local_experts": len(sparse[0])}
    # Stock models know one router loss: Eq. 3's.
    fields["router_aux_loss_coef"] = float(config.router_aux_loss_coef * config.load_balancing_loss_coef)
    if target_type == "qwen3_moe":
        fields |= {
            "attention_bias": config.attention_bias,
            "norm_topk_prob": config.norm_topk_prob,
            "intermediate_size": sum(config.layer_expert_sizes[dense[0]]) if dense else widest,
            "mlp_only_layers": dense,
            "use_sliding_window": config.sliding_window is not None,
        }
    target = CONFIG_MAPPING[target_type](**fields)
    target.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[target_type]]
    return target


def _padding_note(config: HMoEConfig, stock_config: PreTrainedConfig, bytes_per_parameter: int) -> str:
    """What the zeros cost."""
    before, after = count_parameters(config), count_parameters(stock_config)
    added = after.total - before.total
    # A parameter is one multiplication and one addition per token.
    flops_before, flops_after = 2 * before.activated, 2 * after.activated
    return (
        f"padding to the widest expert ({_width(stock_config)} neurons): parameters {before.total:,} -> "
        f"{after.total:,} ({100 * added / before.total:+.1f} %), disk {added * bytes_per_parameter / 1e6:+,.1f} MB, "
        f"FLOPs per token at equal load about {flops_before:.3g} -> {flops_after:.3g} "
        f"({100 * (flops_after / flops_before - 1):+.1f} %)"
    )


def _width(stock_config: PreTrainedConfig) -> int:
    return getattr(stock_config, MOE_FAMILIES[stock_config.model_type].width)


def _training_notes(config: HMoEConfig) -> list[str]:
    lost = [
        f"`{name}`={value}"
        for name, value in config.router_loss_coefs_by_field.items()
        if value and name != "load_balancing_loss_coef"
    ]
    return [f"router losses that stock models do not have are left out: {', '.join(lost)}"] if lost else []


def _expert_tensors(
    source: SourceCheckpoint, stock_config: PreTrainedConfig, layer: int
) -> Iterator[tuple[str, Tensor]]:
    family = MOE_FAMILIES[stock_config.model_type]
    prefix = f"model.layers.{layer}.{family.block}"
    yield f"{prefix}.gate.weight", source.tensor(_router_name(layer))
    banks, sizes = read_banks(source, layer), source.config.layer_expert_sizes[layer]
    for expert, size in enumerate(sizes):
        for part, rows in unpack_expert(banks, sizes, expert).items():
            padded = F.pad(rows, (0, 0, 0, _width(stock_config) - size))  # [widest, H]
            yield f"{prefix}.experts.{expert}.{family.parts[part]}.weight", padded.t() if part == "down" else padded


def _dense_tensors(source: SourceCheckpoint, layer: int) -> Iterator[tuple[str, Tensor]]:
    banks, sizes = read_banks(source, layer), source.config.layer_expert_sizes[layer]
    experts = [unpack_expert(banks, sizes, expert) for expert in range(len(sizes))]
    for part in ("gate", "up", "down"):
        rows = torch.cat([expert[part] for expert in experts])
        weight = rows.t() / len(sizes) if part == "down" else rows
        yield f"model.layers.{layer}.mlp.{part}_proj.weight", weight
