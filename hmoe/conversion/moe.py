"""Mixtral, Qwen3-MoE and OLMoE to HMoE: the same function, so the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..configuration_hmoe import HMoEConfig
from ..costs import count_parameters
from .base import Conversion, Options, Plan, execute
from .checkpoint import CheckpointReader, resolve_source
from .families import (
    MOE_TYPES,
    CannotConvert,
    attention_names,
    is_lossless,
    load_source_config,
    model_names,
    named_dtype,
    shared_fields,
)
from .layout import bank_tensors, cast


# Spellings of an expert's gate, up and down projections on disk.
_PART_NAMES = ({"gate": "w1", "up": "w3", "down": "w2"}, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
_BLOCK_NAMES = ("block_sparse_moe", "mlp")


def convert_moe(source: str | Path, target: str | Path, options: Options | None = None) -> Conversion:
    """A Mixtral, Qwen3-MoE or OLMoE checkpoint as HMoE with equal experts.

    Layers of Qwen3-MoE without a router (`mlp_only_layers`, `decoder_sparse_step`) become `num_experts_per_tok` equal
    experts with a zero router: every token goes to all of them with equal weights, for which `down_proj` is scaled.

    Raises:
        CannotConvert: a config field that HMoE cannot express, with its value and the reason.
    """
    options = options or Options()
    folder = resolve_source(source)
    config = load_source_config(folder, MOE_TYPES, "moe")
    reader = CheckpointReader(folder)
    target_config, notes = hmoe_config_of(config)
    dtype = named_dtype(options.dtype)
    source_dtype = reader.dtype("model.embed_tokens.weight")
    target_config.dtype = dtype or source_dtype
    factor = config.num_experts_per_tok if dense_layers(config) else 1
    plan = Plan(
        source=folder,
        reader=reader,
        config=target_config,
        tensors=lambda: _tensors(reader, config, target_config, dtype),
        num_parameters=count_parameters(target_config).total,
        exact=is_lossless(source_dtype, dtype, factor),
        settings={"conversion": "moe", "source": str(source), "dtype": options.dtype},
        notes=notes,
    )
    return execute(plan, str(source), target, options)


def hmoe_config_of(config: PreTrainedConfig) -> tuple[HMoEConfig, list[str]]:
    """The HMoE config that computes the same, and what it cannot carry over that matters in training only."""
    fields, _ = shared_fields(config)
    top_k = config.num_experts_per_tok
    width = config.moe_intermediate_size if config.model_type == "qwen3_moe" else config.intermediate_size
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
    """Layers of a Qwen3-MoE without experts."""
    if config.model_type != "qwen3_moe":
        return []
    layers = range(config.num_hidden_layers)
    return [i for i in layers if i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step]


def _tensors(
    reader: CheckpointReader, config: PreTrainedConfig, target: HMoEConfig, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    _, attention = shared_fields(config)
    dense = dense_layers(config)
    for layer, sizes in enumerate(target.layer_expert_sizes):
        for name in attention_names(target, layer, attention.projections_with_bias):
            yield name, cast(reader.tensor(name), dtype)
        if layer in dense:
            read = _dense_reader(reader, layer, len(sizes))
            router = torch.zeros(len(sizes), target.hidden_size, dtype=target.dtype)
        else:
            read = expert_reader(reader, layer)
            router = reader.tensor(_router_name(reader, layer))
        yield f"model.layers.{layer}.mlp.gate.weight", cast(router, dtype)
        yield from bank_tensors(target, layer, read, dtype)
    for name in model_names(target):
        yield name, cast(reader.tensor(name), dtype)


def _router_name(reader: CheckpointReader, layer: int) -> str:
    names = [f"model.layers.{layer}.{block}.gate.weight" for block in _BLOCK_NAMES]
    return next((name for name in names if name in reader), names[-1])


def expert_reader(reader: CheckpointReader, layer: int) -> Callable[[int, str], Tensor]:
    """Reads an expert's `gate`, `up` or `down` [I, H], whichever way the checkpoint spells them."""
    for block in _BLOCK_NAMES:
        prefix = f"model.layers.{layer}.{block}.experts"
        if f"{prefix}.gate_up_proj" in reader:
            return lambda expert, part: _read_fused(reader, prefix, expert, part)
        for names in _PART_NAMES:
            if f"{prefix}.0.{names['gate']}.weight" in reader:
                return lambda expert, part: _neuron_rows(
                    reader.tensor(f"{prefix}.{expert}.{names[part]}.weight"), part
                )
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
