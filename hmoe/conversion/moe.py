"""Mixtral, Qwen3-MoE and OLMoE to HMoE: the same function, so the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..configuration_hmoe import HMoEConfig
from .base import Conversion, Options, Plan, execute
from .checkpoint import SourceCheckpoint
from .families import MOE_FAMILIES, CannotConvert, shared_fields
from .layout import bank_tensors, model_tensors


def convert_moe(source: str | Path, target: str | Path, options: Options | None = None) -> Conversion:
    """A Mixtral, Qwen3-MoE or OLMoE checkpoint as HMoE with equal experts.

    Layers of Qwen3-MoE without a router (`mlp_only_layers`, `decoder_sparse_step`) become `num_experts_per_tok` equal
    experts with a zero router: every token goes to all of them with equal weights, for which `down_proj` is scaled.

    Raises:
        CannotConvert: a config field that HMoE cannot express, with its value and the reason.
    """
    opened = SourceCheckpoint(source, MOE_FAMILIES, "moe")
    config = opened.config
    target_config, notes = hmoe_config_of(config)
    plan = Plan(
        source=opened,
        config=target_config,
        tensors=model_tensors(opened, target_config, partial(_experts, opened, target_config)),
        settings={"conversion": "moe"},
        exact=True,
        factor=config.num_experts_per_tok if dense_layers(config) else 1,
        notes=notes,
    )
    return execute(plan, target, options or Options())


def hmoe_config_of(config: PreTrainedConfig) -> tuple[HMoEConfig, list[str]]:
    """The HMoE config that computes the same, and what it cannot carry over that matters in training only."""
    top_k = config.num_experts_per_tok
    width = getattr(config, MOE_FAMILIES[config.model_type].width)
    dense = dense_layers(config)
    if dense and config.intermediate_size % top_k:
        raise CannotConvert(
            "intermediate_size",
            config.intermediate_size,
            f"the layers without router ({dense}) become {top_k} equal experts (`num_experts_per_tok`), which does "
            "not divide it",
            "There is no exact conversion",
        )
    sizes = [
        [config.intermediate_size // top_k] * top_k if layer in dense else [width] * config.num_local_experts
        for layer in range(config.num_hidden_layers)
    ]
    notes = []
    if jitter := getattr(config, "router_jitter_noise", 0.0):
        notes.append(f"`router_jitter_noise`={jitter} acts in training only and has no counterpart here: left out")
    if dense:
        notes.append(f"layers {dense} are dense: {top_k} experts, all of them always active, with a zero router")
    target = HMoEConfig(
        **shared_fields(config),
        expert_intermediate_sizes=sizes if dense else sizes[0],
        num_experts_per_tok=top_k,
        norm_topk_prob=getattr(config, "norm_topk_prob", True),
        load_balancing_loss_coef=config.router_aux_loss_coef,
        parameter_penalty_loss_coef=0.0,
        output_router_logits=config.output_router_logits,
    )
    return target, notes


def dense_layers(config: PreTrainedConfig) -> list[int]:
    """Layers that have an FFN in the place of experts."""
    return MOE_FAMILIES[config.model_type].dense_layers(config)


def _experts(source: SourceCheckpoint, target: HMoEConfig, layer: int) -> Iterator[tuple[str, Tensor]]:
    prefix = f"model.layers.{layer}"
    num_experts = len(target.layer_expert_sizes[layer])
    if layer in dense_layers(source.config):
        router = torch.zeros(num_experts, target.hidden_size, dtype=target.dtype)
        read = partial(_read_dense, source, f"{prefix}.mlp", num_experts)
    else:
        # Checkpoints spell the names as the family's authors do, or as Transformers does in memory.
        blocks = (f"{prefix}.{MOE_FAMILIES[source.config.model_type].block}", f"{prefix}.mlp")
        block = next((name for name in blocks if f"{name}.gate.weight" in source), blocks[0])
        router = source.tensor(f"{block}.gate.weight")
        is_fused = f"{block}.experts.gate_up_proj" in source
        read = partial(_read_fused if is_fused else _read_single, source, f"{block}.experts")
    yield f"{prefix}.mlp.gate.weight", router
    yield from bank_tensors(target, layer, read)


def _read_fused(source: SourceCheckpoint, prefix: str, expert: int, part: str) -> Tensor:
    if part == "down":
        return source.tensor(f"{prefix}.down_proj", expert).t()
    gate, up = source.tensor(f"{prefix}.gate_up_proj", expert).chunk(2)
    return gate if part == "gate" else up


def _read_single(source: SourceCheckpoint, prefix: str, expert: int, part: str) -> Tensor:
    name = MOE_FAMILIES[source.config.model_type].parts[part]
    weight = source.tensor(f"{prefix}.{expert}.{name}.weight")
    return weight.t() if part == "down" else weight


def _read_dense(source: SourceCheckpoint, prefix: str, num_experts: int, expert: int, part: str) -> Tensor:
    """Of a dense FFN in equal parts; `down` is scaled because each part gets the weight 1 / num_experts."""
    weight = source.tensor(f"{prefix}.{part}_proj.weight")
    if part == "down":
        return weight.t().chunk(num_experts)[expert] * num_experts
    return weight.chunk(num_experts)[expert]
