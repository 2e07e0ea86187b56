"""Gives trainers that compute Mixtral's router loss themselves this model's own router losses.

TRL's trainers fuse head and cross-entropy: they call the body of any MoE model and hand its router logits to Mixtral's
`load_balancing_loss_func`. Here that would train all experts towards equal load, with coefficient 1, whatever the
config says. So the router logits of this model are a tuple that knows its own losses, and that function asks it.
Nothing changes for other models. This file travels with every saved checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral

from .losses_hmoe import router_losses


class RouterLogits(tuple):
    """Router logits [T, E] of all layers, with the experts they activated [T, K] and the config of their losses."""

    router_index: tuple[Tensor, ...]
    config: Any

    @classmethod
    def of(cls, logits: Iterable[Tensor], router_index: tuple[Tensor, ...], config: Any) -> RouterLogits:
        made = cls(logits)
        made.router_index, made.config = router_index, config
        return made


def weighted_router_losses(
    router_logits: tuple[Tensor, ...],
    router_index: tuple[Tensor, ...],
    config: Any,
    attention_mask: Tensor | None = None,
    *,
    global_batch: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the router losses weighted by the coefficients of the config, and each raw one."""
    terms = router_losses(
        router_logits=router_logits,
        router_index=router_index,
        expert_sizes=config.layer_expert_sizes,
        attention_mask=attention_mask,
        load_balancing_counts=config.load_balancing_counts,
        parameter_penalty_normalizer=config.parameter_penalty_normalizer,
        global_batch=global_batch,
    )
    coefs = config.router_loss_coefs_by_field
    return torch.stack([coefs[f"{name}_coef"] * value for name, value in terms.items()]).sum(), terms


def _with_own_loss(load_balancing_loss_func: Callable[..., Tensor | int]) -> Callable[..., Tensor | int]:
    @functools.wraps(load_balancing_loss_func)
    def dispatch(gate_logits, num_experts=None, top_k=2, attention_mask=None):
        if isinstance(gate_logits, RouterLogits):
            return weighted_router_losses(gate_logits, gate_logits.router_index, gate_logits.config, attention_mask)[0]
        return load_balancing_loss_func(gate_logits, num_experts, top_k, attention_mask)

    return dispatch


modeling_mixtral.load_balancing_loss_func = _with_own_loss(modeling_mixtral.load_balancing_loss_func)
