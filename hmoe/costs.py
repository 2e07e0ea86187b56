"""Training FLOPs of a causal language model, counted from the parameters that tokens activate.

A multiply and an add are two FLOPs. Two conventions:

| | `"matmul"` (default) | `"6nd"` |
|---|---|---|
| a matrix of n entries, per token that passes it | 2n | 2n |
| input embedding, norms | 0: no product | 2n, as any parameter |
| attention scores and values, per token | 4 x heads x head_dim x keys, in every layer | 0 |
| an expert of size I | 6 H I per token that activates it | the same |
| training | 3 x forward | 3 x forward |

`"matmul"` equals a literal count of the products a forward pass computes; masked attention scores count, recomputation
under gradient checkpointing does not, padding does. `"6nd"` is C = 6 N_activated D, with both embeddings in N, as
HMoE (arXiv 2408.10681) counts activated parameters; its budgets of 7e19 and 2.6e20 FLOPs are read so here, because the
paper does not say what it counts. For HMoE-0.4B with 4096 tokens of context `"matmul"` counts a third more per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


CONVENTIONS = ("matmul", "6nd")
# Backward computes two products, for inputs and for weights, where forward computes one.
TRAIN_FACTOR = 3


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass by their cause; [`forward_flops`] makes it from a model.

    Attributes:
        per_token: of every token, whatever its routing.
        per_key: of every pair of a token and a position that its attention scores, over all layers.
        window: most positions that a token scores, with sliding-window attention.
        per_expert: per layer, per expert, of a token that activates it.
        experts_per_token: experts that a token activates in a layer, where it is the same for all tokens; else None.
    """

    per_token: int
    per_key: int
    window: int | None
    per_expert: list[list[int]]
    experts_per_token: int | None

    @property
    def depends_on_load(self) -> bool:
        """Whether routing changes the FLOPs: experts of different sizes, or Top-P."""
        return any(len(set(row)) > 1 for row in self.per_expert) or (
            bool(self.per_expert) and self.experts_per_token is None
        )

    def shared(self, num_tokens: int, length: int) -> int:
        """Of everything but the experts, for `num_tokens` tokens in sequences of `length`."""
        keys = length if self.window is None else min(length, self.window)
        return num_tokens * (self.per_token + self.per_key * keys)

    def count(self, num_tokens: int, length: int, expert_tokens: Sequence[Sequence[float]] | None = None) -> float:
        """Of `num_tokens` tokens in sequences of `length`.

        Args:
            expert_tokens: per layer, per expert, how many tokens activate it. Default: every expert equally often,
                which is exact for equal sizes; with Top-P then one expert per token, a lower estimate.
        """
        if expert_tokens is None:
            chosen = self.experts_per_token or 1
            expert_tokens = [[num_tokens * chosen / len(row)] * len(row) for row in self.per_expert]
        pairs = zip(expert_tokens, self.per_expert, strict=True)
        experts = sum(n * flops for counts, row in pairs for n, flops in zip(counts, row, strict=True))
        return self.shared(num_tokens, length) + experts

    def least(self, num_tokens: int, length: int) -> int:
        """The fewest that any routing can cost: all tokens on the smallest experts."""
        chosen = self.experts_per_token or 1
        experts = sum(sum(sorted(row)[:chosen]) for row in self.per_expert)
        return self.shared(num_tokens, length) + num_tokens * experts


def forward_flops(model: nn.Module, convention: str = "matmul") -> ForwardFlops:
    """What a forward pass of a causal language model costs, from its parameters and config.

    Knows embeddings, matrices of any module, and banks of experts (three-dimensional parameters). LoRA adapters are
    left out. The model may be on the meta device.

    Raises:
        ValueError: for a convention that does not exist.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"`flops_convention` must be one of {list(CONVENTIONS)}, got {convention!r}")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    layers = getattr(config, "layer_expert_sizes", None)
    per_token = 0
    per_expert: list[list[int]] = [[6 * config.hidden_size * size for size in sizes] for sizes in layers or []]
    seen: set[int] = set()
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        banks = 0
        for parameter in module.parameters(recurse=False):
            # DeepSpeed ZeRO-3 leaves an empty tensor of a parameter and notes its shape.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) == 3:
                banks += 2 * shape[1] * shape[2]
                num_experts = shape[0]
            elif convention == "6nd":
                per_token += 0 if id(parameter) in seen else 2 * math.prod(shape)
                seen.add(id(parameter))
            elif len(shape) == 2 and not isinstance(module, nn.Embedding):
                per_token += 2 * math.prod(shape)
        if banks and layers is None:
            per_expert.append([banks] * num_experts)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    chosen = getattr(config, "num_experts_per_tok", None)
    return ForwardFlops(
        per_token=per_token,
        per_key=4 * config.num_hidden_layers * heads * head_dim if convention == "matmul" else 0,
        window=getattr(config, "sliding_window", None),
        per_expert=per_expert,
        experts_per_token=None if getattr(config, "routing", "top_k") == "top_p" else chosen,
    )
