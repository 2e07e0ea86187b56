"""How far apart two computations of the same values may lie on any processor, from dtype and lengths of sums."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rounding(dtype: torch.dtype, *num_terms: int) -> float:
    """A relative difference that rounding alone explains.

    Processors, BLAS libraries and shapes of products differ in the order of a sum and in fused multiply-adds. Each of
    n additions rounds by at most eps / 2 of the sum so far, independently: after n terms the error is sqrt(n) / 2 eps,
    added to that of the sums that come before (Higham, Accuracy and Stability of Numerical Algorithms, section 2.8).
    Two computations, and the largest element instead of the typical one, make it four times as much. A term that is
    missing or wrongly scaled shows at 1 / sqrt(n) and more: thousands of times the bound in fp32.

    Args:
        num_terms: lengths of the sums that are computed another way, one after the other. Where values are summed in a
            higher precision and stored in `dtype`, each store is one term.
    """
    return 2 * torch.finfo(dtype).eps * math.sqrt(sum(num_terms))


def logits_rounding(config: Any, num_positions: int, dtype: torch.dtype = torch.float32) -> float:
    """Of the logits of an HMoE with this config, whose tokens attend to `num_positions`."""
    return rounding(dtype, *_forward_terms(config, num_positions))


def step_rounding(config: Any, num_positions: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> float:
    """Of the loss of a batch of `num_tokens` and of its gradients, which come back through sums as long."""
    forward = [*_forward_terms(config, num_positions), config.vocab_size]
    return rounding(dtype, *forward, *forward, num_tokens)


def _forward_terms(config: Any, num_positions: int) -> list[int]:
    """The sums that a token passes, one after the other."""
    hidden, head_dim = config.hidden_size, config.head_dim or config.hidden_size // config.num_attention_heads
    terms = []
    for sizes in config.layer_expert_sizes:
        attention = [hidden, head_dim, num_positions, num_positions, config.num_attention_heads * head_dim]
        experts = [hidden, len(sizes), hidden, max(sizes), len(sizes)]
        terms += [hidden, *attention, hidden, *experts]  # each after its norm
    return [*terms, hidden, hidden]


def assert_close_to_largest(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """No element differs by more than `tolerance` of the largest: a small one is a difference of large terms."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance, f"{difference} of the largest element, at most {tolerance} is rounding"
