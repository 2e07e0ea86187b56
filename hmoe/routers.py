"""The routers of a model: finding them, reading them while it runs, counting what they choose, and how even that is.

Works on HMoE, Mixtral, Qwen-MoE and OLMoE, adapters and wrappers included.

Letters in shapes: T tokens, E experts, K expert slots per token (an unused Top-P slot holds the id E).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .placement import max_over_mean


@dataclass(frozen=True)
class RoutedLayer:
    """One MoE layer: its router, the sizes of its experts in neurons, and their parameters."""

    router: nn.Module
    sizes: list[int]
    parameters: list[int]


def shape_of(parameter: Tensor) -> torch.Size:
    """Also of a parameter that DeepSpeed ZeRO-3 has left empty: it notes the shape."""
    return getattr(parameter, "ds_shape", parameter.shape)


def text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The MoE layers of a model, first layer first; empty for a dense one.

    A layer is a module with `gate` and `experts` whose experts lie in one bank of three-dimensional parameters.
    """
    layer_sizes = getattr(text_config(model), "layer_expert_sizes", None)
    layers: list[RoutedLayer] = []
    for module in model.modules():
        router, experts = getattr(module, "gate", None), getattr(module, "experts", None)
        if not isinstance(router, nn.Module) or not isinstance(experts, nn.Module):
            continue
        named = {name: shape_of(p) for name, p in experts.named_parameters() if "lora_" not in name}
        # A learnable activation has parameters too, which belong to no expert.
        banks = {name: shape for name, shape in named.items() if len(shape) >= 2}
        if not any(len(shape) == 3 and "down_proj" in name for name, shape in banks.items()):
            continue
        # Neurons in a row of a bank: of an expert, or of a tile of one.
        hidden = next(shape for name, shape in banks.items() if "up_proj" in name)[-1]
        row_size = math.prod(next(shape for name, shape in banks.items() if "down_proj" in name)[1:]) // hidden
        row = sum(math.prod(shape[1:]) for shape in banks.values())
        num_rows = next(iter(banks.values()))[0]
        sizes = list(layer_sizes[len(layers)]) if layer_sizes else [row_size] * num_rows
        layers.append(RoutedLayer(router, sizes, [row * size // row_size for size in sizes]))
    return layers


class RouterTap(ExitStack):
    """Hands the outputs of every router to `consume(layer, logits [T, E], index [T, K])`, until it is closed."""

    def __init__(self, model: nn.Module, consume: Callable[[int, Tensor, Tensor], None]):
        super().__init__()
        for layer_idx, layer in enumerate(routed_layers(model)):
            self.callback(layer.router.register_forward_hook(partial(_consume_output, consume, layer_idx)).remove)


def _consume_output(
    consume: Callable[[int, Tensor, Tensor], None], layer_idx: int, module: nn.Module, args: tuple, output: Any
) -> None:
    if not isinstance(output, tuple) or len(output) != 3:
        raise ValueError(
            f"router {type(module).__name__} returns {type(output).__name__}, not (logits, weights, index): this kind "
            "of mixture cannot be analysed"
        )
    consume(layer_idx, output[0], output[2])


def tokens_per_expert(index: Tensor, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """How many tokens activate each expert, [E] int64, on the device of `index`, without waiting for it.

    Args:
        index: [T, K], expert ids; the id E of unused slots is not counted.
        mask: T values, True where the token counts; None counts all.
    """
    weight = torch.ones_like(index) if mask is None else mask.reshape(-1, 1).to(index).expand_as(index)
    # Unlike bincount, this does not wait for the device.
    counts = torch.zeros(num_experts + 1, dtype=index.dtype, device=index.device)
    return counts.scatter_add_(0, index.reshape(-1), weight.reshape(-1))[:num_experts]


def activated_experts(index: Tensor, num_experts: int) -> Tensor:
    """[T, E], whether a token activates an expert, from ids [T, K]."""
    chosen = torch.zeros(index.shape[0], num_experts + 1, dtype=torch.bool, device=index.device)
    return chosen.scatter_(1, index, True)[:, :num_experts]


def max_over_min(load: Sequence[float]) -> float | None:
    """Tokens of the busiest expert over those of the idlest (MoDSE Tables 7-8); None if an expert has none."""
    return max(load) / min(load) if min(load) > 0 else None


def balance(load: Sequence[float]) -> dict[str, Any]:
    """How even the load of a layer's experts is, from their tokens or shares of tokens.

    | entry | meaning |
    |---|---|
    | `max_over_min` | the busiest expert's load over the idlest's; None if that has none |
    | `load_imbalance` | the busiest expert's load over the mean; 1 is even |
    | `load_variation` | standard deviation over the mean; 0 is even |
    | `load_entropy_ratio` | entropy of the shares over ln E; 1 is even |
    | `dead_experts` | experts without a token |
    | `starved_experts` | experts with less than a tenth of the mean |
    """
    num_experts, total = len(load), sum(load)
    mean = total / num_experts
    shares = [value / total for value in load if value]
    entropy = -sum(share * math.log(share) for share in shares)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in load) / num_experts)
    return {
        "max_over_min": max_over_min(load),
        "load_imbalance": max_over_mean(load),
        "load_variation": deviation / mean if total else 0.0,
        "load_entropy_ratio": entropy / math.log(num_experts) if total and num_experts > 1 else 1.0,
        "dead_experts": sum(value == 0 for value in load),
        "starved_experts": sum(value < mean / 10 for value in load),
    }
