"""HMoE to Mixtral or Qwen3-MoE: every expert padded with zeros to the widest, so that stock runtimes serve it.

A zero neuron adds nothing, so the logits are the same. The price is the padding: see [`padding_cost`].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from ..configuration_hmoe import HMoEConfig
from ..costs import count_parameters
from .base import Conversion, Options, Plan, SourceCheckpoint, execute
from .checkpoint import CheckpointReader
from .families import MOE_FAMILIES, CannotConvert, MoEFamily
from .layout import model_tensors, read_banks, unpack_expert


EXPORT_TYPES = ("mixtral", "qwen3_moe")
_SERVE_HMOE = "Serve the HMoE checkpoint itself with Transformers"


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
    opened = SourceCheckpoint.open(source, ("hmoe",), "export")
    config, reader = opened.config, opened.reader
    target_type = check_exportable(config, to)
    dense = _dense_layers(config, reader) if target_type == "qwen3_moe" else []
    cost = padding_cost(config, dense)

    def experts(layer: int) -> Iterator[tuple[str, Tensor]]:
        if layer in dense:
            return _dense_tensors(reader, config, layer)
        return _expert_tensors(reader, config, layer, MOE_FAMILIES[target_type], cost.widest)

    plan = Plan(
        source=opened,
        config=stock_config_of(config, target_type, dense),
        tensors=lambda: model_tensors(reader, config, experts),
        num_parameters=cost.parameters_after,
        settings={"conversion": "export", "to": target_type},
        exact=True,
        factor=config.num_experts_per_tok if dense else 1,
        notes=[cost.describe(options.written_dtype(opened.dtype).itemsize), *_training_notes(config)],
    )
    return execute(plan, target, options)


def check_exportable(config: HMoEConfig, to: str = "auto") -> str:
    """The model type to export to; raises CannotConvert, naming the field, if there is none."""
    if to not in ("auto", *EXPORT_TYPES):
        raise ValueError(f"`to` must be one of {['auto', *EXPORT_TYPES]}, got {to!r}")
    target_type = to if to != "auto" else ("qwen3_moe" if config.qk_norm else "mixtral")
    if config.routing != "top_k":
        raise CannotConvert(
            "routing",
            config.routing,
            f"{target_type} activates the same number of experts for every token",
            _SERVE_HMOE,
        )
    if config.router_type != "linear":
        raise CannotConvert("router_type", config.router_type, f"{target_type}'s router is linear", _SERVE_HMOE)
    if target_type == "qwen3_moe" and not config.qk_norm:
        raise CannotConvert(
            "qk_norm", False, "qwen3_moe always normalises queries and keys", "Export to mixtral (--to mixtral)"
        )
    if target_type == "mixtral":
        _check_mixtral(config)
    return target_type


def _check_mixtral(config: HMoEConfig) -> None:
    if config.qk_norm:
        raise CannotConvert(
            "qk_norm", True, "mixtral does not normalise queries and keys", "Export to qwen3_moe (--to qwen3_moe)"
        )
    if config.attention_bias:
        raise CannotConvert("attention_bias", True, "mixtral's attention has no biases", _SERVE_HMOE)
    if not config.norm_topk_prob:
        raise CannotConvert("norm_topk_prob", False, "mixtral always renormalises the gate weights", _SERVE_HMOE)
    counts = sorted({len(sizes) for sizes in config.layer_expert_sizes})
    if len(counts) > 1:
        raise _uneven_counts(config, counts, "mixtral has the same number of experts in every layer")


def _uneven_counts(config: HMoEConfig, counts: list[int], reason: str) -> CannotConvert:
    return CannotConvert("expert_intermediate_sizes", f"{counts} experts by layer", reason, _SERVE_HMOE)


def _dense_layers(config: HMoEConfig, reader: CheckpointReader) -> list[int]:
    """Layers that Qwen3-MoE can hold as a dense FFN: all experts active, all with the same weight (a zero router)."""
    counts = [len(sizes) for sizes in config.layer_expert_sizes]
    most = max(counts)
    if len(set(counts)) == 1:
        return []
    layers = [layer for layer, count in enumerate(counts) if count != most]
    for layer in layers:
        if counts[layer] != config.num_experts_per_tok or reader.tensor(_router_name(layer)).any():
            raise _uneven_counts(
                config,
                sorted(set(counts)),
                f"qwen3_moe holds layers with fewer experts than others only as dense layers, and in layer {layer} "
                "the experts are not all active with equal weights",
            )
    totals = {sum(config.layer_expert_sizes[layer]) for layer in layers}
    if len(totals) > 1:
        raise CannotConvert(
            "expert_intermediate_sizes",
            f"totals {sorted(totals)} in the dense layers {layers}",
            "qwen3_moe has one `intermediate_size` for all dense layers",
            _SERVE_HMOE,
        )
    return layers


def _router_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def stock_config_of(config: HMoEConfig, target_type: str, dense: list[int]) -> PreTrainedConfig:
    """The config of the stock class that computes the same."""
    sparse = [sizes for layer, sizes in enumerate(config.layer_expert_sizes) if layer not in dense]
    widest = max(map(max, sparse))
    fields: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
            *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "sliding_window"),
            *("attention_dropout", "rope_parameters", "num_experts_per_tok", "output_router_logits"),
        )
    }
    # Stock models know one router loss: Eq. 3's.
    fields["router_aux_loss_coef"] = float(config.router_aux_loss_coef * config.load_balancing_loss_coef)
    if target_type == "mixtral":
        config_class, widths = MixtralConfig, {"intermediate_size": widest, "num_local_experts": len(sparse[0])}
    else:
        config_class = Qwen3MoeConfig
        widths = {
            "moe_intermediate_size": widest,
            "intermediate_size": sum(config.layer_expert_sizes[dense[0]]) if dense else widest,
            "num_experts": len(sparse[0]),
        }
        fields |= {"attention_bias": config.attention_bias, "norm_topk_prob": config.norm_topk_prob}
        fields |= {"mlp_only_layers": dense, "use_sliding_window": config.sliding_window is not None}
    target = config_class(**fields, **widths)
    target.architectures = ["MixtralForCausalLM" if target_type == "mixtral" else "Qwen3MoeForCausalLM"]
    return target


@dataclass(frozen=True)
class PaddingCost:
    """What the zeros cost. Activated counts are per token, at equal load of the experts."""

    widest: int
    parameters_before: int
    parameters_after: int
    activated_before: float
    activated_after: float

    def describe(self, bytes_per_parameter: int) -> str:
        added = self.parameters_after - self.parameters_before
        # A parameter is one multiplication and one addition per token.
        flops_before, flops_after = 2 * self.activated_before, 2 * self.activated_after
        return (
            f"padding to the widest expert ({self.widest} neurons): parameters {self.parameters_before:,} -> "
            f"{self.parameters_after:,} (+{100 * added / self.parameters_before:.1f} %), "
            f"disk +{added * bytes_per_parameter / 1e6:,.1f} MB, FLOPs per token at equal load about "
            f"{flops_before:.3g} -> {flops_after:.3g} (+{100 * (flops_after / flops_before - 1):.1f} %)"
        )


def padding_cost(config: HMoEConfig, dense: list[int]) -> PaddingCost:
    """Parameters and activated parameters before and after padding; dense layers are not padded."""
    before = count_parameters(config)
    sparse = [sizes for layer, sizes in enumerate(config.layer_expert_sizes) if layer not in dense]
    widest = max(map(max, sparse))
    neuron = 3 * config.hidden_size
    padding = [neuron * sum(widest - size for size in sizes) for sizes in sparse]
    used = [config.num_experts_per_tok / len(sizes) for sizes in sparse]
    return PaddingCost(
        widest=widest,
        parameters_before=before.total,
        parameters_after=before.total + sum(padding),
        activated_before=before.activated,
        activated_after=before.activated + sum(share * added for share, added in zip(used, padding)),
    )


def _training_notes(config: HMoEConfig) -> list[str]:
    lost = [
        f"`{name}`={value}"
        for name, value in config.router_loss_coefs_by_field.items()
        if value and name != "load_balancing_loss_coef"
    ]
    return [f"router losses that stock models do not have are left out: {', '.join(lost)}"] if lost else []


def _expert_tensors(
    reader: CheckpointReader, config: HMoEConfig, layer: int, family: MoEFamily, widest: int
) -> Iterator[tuple[str, Tensor]]:
    prefix = f"model.layers.{layer}.{family.block}"
    yield f"{prefix}.gate.weight", reader.tensor(_router_name(layer))
    banks = read_banks(reader, layer)
    sizes = config.layer_expert_sizes[layer]
    for expert, size in enumerate(sizes):
        for part, rows in unpack_expert(banks, sizes, expert).items():
            padded = F.pad(rows, (0, 0, 0, widest - size))  # [widest, H]
            yield f"{prefix}.experts.{expert}.{family.parts[part]}.weight", padded.t() if part == "down" else padded


def _dense_tensors(reader: CheckpointReader, config: HMoEConfig, layer: int) -> Iterator[tuple[str, Tensor]]:
    reader.tensor(_router_name(layer))  # all zeros: left out, not lost
    banks = read_banks(reader, layer)
    sizes = config.layer_expert_sizes[layer]
    experts = [unpack_expert(banks, sizes, expert) for expert in range(len(sizes))]
    for part in ("gate", "up", "down"):
        rows = torch.cat([expert[part] for expert in experts])
        weight = rows.t() / len(sizes) if part == "down" else rows
        yield f"model.layers.{layer}.mlp.{part}_proj.weight", weight
