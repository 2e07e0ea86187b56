"""Mixtral, Qwen3-MoE and OLMoE to HMoE: the same function, so the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..configuration_hmoe import HMoEConfig
from ..costs import count_parameters
from .base import Conversion, Options, Plan, SourceCheckpoint, execute
from .checkpoint import CheckpointReader
from .families import MOE_FAMILIES, CannotConvert, shared_fields
from .layout import bank_tensors, model_tensors


# Checkpoints spell a family's modules as its authors did, or as Transformers does.
_BLOCKS = dict.fromkeys(family.block for family in MOE_FAMILIES.values())


def convert_moe(source: str | Path, target: str | Path, options: Options | None = None) -> Conversion:
    """A Mixtral, Qwen3-MoE or OLMoE checkpoint as HMoE with equal experts.

    Layers of Qwen3-MoE without a router (`mlp_only_layers`, `decoder_sparse_step`) become `num_experts_per_tok` equal
    experts with a zero router: every token goes to all of them with equal weights, for which `down_proj` is scaled.

    Raises:
        CannotConvert: a config field that HMoE cannot express, with its value and the reason.
    """
    opened = SourceCheckpoint.open(source, MOE_FAMILIES, "moe")
    config = opened.config
    target_config, notes = hmoe_config_of(config)
    biases = shared_fields(config)[1].projections_with_bias
    experts = partial(_experts, opened.reader, config, target_config)
    plan = Plan(
        source=opened,
        config=target_config,
        tensors=lambda: model_tensors(opened.reader, target_config, experts, biases),
        num_parameters=count_parameters(target_config).total,
        settings={"conversion": "moe"},
        exact=True,
        factor=config.num_experts_per_tok if dense_layers(config) else 1,
        notes=notes,
    )
    return execute(plan, target, options or Options())


def hmoe_config_of(config: PreTrainedConfig) -> tuple[HMoEConfig, list[str]]:
    """The HMoE config that computes the same, and what it cannot carry over that matters in training only."""
    fields, _ = shared_fields(config)
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
        **fields,
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


def _experts(
    reader: CheckpointReader, config: PreTrainedConfig, target: HMoEConfig, layer: int
) -> Iterator[tuple[str, Tensor]]:
    num_experts = len(target.layer_expert_sizes[layer])
    if layer in dense_layers(config):
        read = _dense_reader(reader, layer, num_experts)
        router = torch.zeros(num_experts, target.hidden_size, dtype=target.dtype)
    else:
        read = expert_reader(reader, layer)
        router = reader.tensor(_router_name(reader, layer))
    yield f"model.layers.{layer}.mlp.gate.weight", router
    yield from bank_tensors(target, layer, read)


def _router_name(reader: CheckpointReader, layer: int) -> str:
    names = [f"model.layers.{layer}.{block}.gate.weight" for block in _BLOCKS]
    return next((name for name in names if name in reader), names[-1])


def expert_reader(reader: CheckpointReader, layer: int) -> Callable[[int, str], Tensor]:
    """Reads an expert's `gate`, `up` or `down` [I, H], whichever way the checkpoint spells them."""
    for block in _BLOCKS:
        prefix = f"model.layers.{layer}.{block}.experts"
        if f"{prefix}.gate_up_proj" in reader:
            return partial(_read_fused, reader, prefix)
        for family in MOE_FAMILIES.values():
            if f"{prefix}.0.{family.parts['gate']}.weight" in reader:
                return partial(_read_single, reader, prefix, family.parts)
    raise ValueError(
        f"{reader.folder} holds no experts for layer {layer}: expected "
        f"`model.layers.{layer}.mlp.experts.gate_up_proj`, or tensors of each expert under `mlp.experts` or "
        "`block_sparse_moe.experts`"
    )


def _read_fused(reader: CheckpointReader, prefix: str, expert: int, part: str) -> Tensor:
    if part == "down":
        return _neuron_rows(reader.tensor(f"{prefix}.down_proj", expert), part)
    gate, up = reader.tensor(f"{prefix}.gate_up_proj", expert).chunk(2)
    return gate if part == "gate" else up


def _read_single(reader: CheckpointReader, prefix: str, parts: Mapping[str, str], expert: int, part: str) -> Tensor:
    return _neuron_rows(reader.tensor(f"{prefix}.{expert}.{parts[part]}.weight"), part)


def _neuron_rows(weight: Tensor, part: str) -> Tensor:
    """[I, H] from a linear layer's weight: `down` is stored as [H, I]."""
    return weight.t() if part == "down" else weight


def _dense_reader(reader: CheckpointReader, layer: int, num_experts: int) -> Callable[[int, str], Tensor]:
    """Equal parts of a dense FFN; `down` is scaled because each part gets the weight 1 / num_experts."""

    def read(expert: int, part: str) -> Tensor:
        weight = _neuron_rows(reader.tensor(f"model.layers.{layer}.mlp.{part}_proj.weight"), part)
        rows = weight.chunk(num_experts)[expert]
        return rows * num_experts if part == "down" else rows

    return read
