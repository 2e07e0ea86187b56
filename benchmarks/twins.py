"""HMoE, Mixtral and Llama of equal activated parameters, and routing that is equal for the first two.

Every HMoE here has eight experts in arithmetic sizes and Top-2 routing; Mixtral has eight equal experts of the mean
size, so that total and activated parameters are the same; Llama's FFN is as wide as two of them. A Mixtral's
contenders are its stock backends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from hmoe import HMoEConfig, HMoEForCausalLM, expert_sizes


NUM_EXPERTS = 8
TOP_K = 2
STOCK_BACKENDS = ("grouped_mm", "batched_mm", "eager")
STOCK = tuple(f"mixtral {backend}" for backend in STOCK_BACKENDS)
CONTENDERS = ("hmoe", *STOCK, "llama")
MAX_COPIED_BYTES = 2**27  # of weights in a layer and step, by a backend that gathers them for every token


@dataclass(frozen=True)
class Scale:
    """Sizes of the twins; `width` is the mean size of an expert."""

    hidden: int
    layers: int
    width: int
    vocabulary: int
    length: int

    def __post_init__(self) -> None:
        if self.hidden % 64:
            raise ValueError(f"--hidden_size must be a multiple of 64 (the size of a head), got {self.hidden}")
        if self.width % 8:
            raise ValueError(f"--width must be a multiple of 8, got {self.width}")

    def fields(self) -> dict:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "max_position_embeddings": self.length,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }

    def copied_bytes(self, tokens: int, bytes_per_weight: int = 4) -> int:
        """What `batched_mm` copies in one layer: the weights of every (token, expert)."""
        return tokens * TOP_K * 3 * self.hidden * self.width * bytes_per_weight


def make_model(family: str, scale: Scale, **overrides) -> PreTrainedModel:
    """Random weights; both mixtures compute their load-balancing loss in training; `overrides` are HMoE's fields."""
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**scale.fields(), intermediate_size=TOP_K * scale.width))
    if family == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(
                **scale.fields(),
                intermediate_size=scale.width,
                num_local_experts=NUM_EXPERTS,
                num_experts_per_tok=TOP_K,
                output_router_logits=True,
                router_aux_loss_coef=0.01,
                sliding_window=None,
            )
        )
    multiple = math.gcd(scale.width, max(8, scale.width // 16))
    fields = {
        "expert_intermediate_sizes": expert_sizes(
            "arithmetic", NUM_EXPERTS, total=NUM_EXPERTS * scale.width, multiple_of=multiple
        ),
        "num_experts_per_tok": TOP_K,
        "load_balancing_loss_coef": 0.01,
        "parameter_penalty_loss_coef": 0.0,
    }
    return HMoEForCausalLM(HMoEConfig(**{**scale.fields(), **fields, **overrides}))


class BalancedRouting:
    """Replaces the expert ids of every router by those of one table, in which all experts are equally frequent.

    The routers still run, and their weights and logits stay as they are, so that forward and backward of the router
    and of its losses are part of what is timed; only which experts a token goes to is fixed. Each router reads the
    table on from where it stopped.
    """

    def __init__(self, model: nn.Module, num_tokens: int = 2**14):
        generator = torch.Generator().manual_seed(0)
        decks = num_tokens * TOP_K // NUM_EXPERTS
        cards = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator) for _ in range(decks)])
        self.table = cards.view(-1, TOP_K)  # [tokens, K], each token's ids distinct
        self.position: dict[nn.Module, int] = {}
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._replace)

    def restart(self) -> None:
        self.position.clear()

    def _replace(self, gate: nn.Module, _: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple:
        logits, weights, index = output
        num_tokens, start = len(index), self.position.get(gate, 0)
        if start + num_tokens > len(self.table):
            start = 0
        self.position[gate] = start + num_tokens
        return logits, weights, self.table[start : start + num_tokens]


def count_parameters(model: PreTrainedModel) -> dict[str, float]:
    """Millions: all, and those that a token uses with balanced routing."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for parameter in _expert_parameters(model))
    return {"total": total / 1e6, "activated": (total - experts * (1 - TOP_K / NUM_EXPERTS)) / 1e6}


def _expert_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in model.named_parameters() if ".experts." in name)
