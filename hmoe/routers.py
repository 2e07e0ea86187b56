"""Reading the routers of a model while it runs: HMoE, Mixtral, Qwen-MoE and OLMoE, adapters and wrappers included.

Letters in shapes: T tokens, E experts, K expert slots per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
        row_size, row = _row_size(banks), sum(math.prod(shape[1:]) for shape in banks.values())
        num_rows = next(iter(banks.values()))[0]
        sizes = list(layer_sizes[len(layers)]) if layer_sizes else [row_size] * num_rows
        layers.append(RoutedLayer(router, sizes, [row * size // row_size for size in sizes]))
    return layers


def _row_size(banks: dict[str, torch.Size]) -> int:
    """Neurons in a row of a bank: of an expert, or of a tile of one."""
    hidden = next(shape for name, shape in banks.items() if "up_proj" in name)[-1]
    return math.prod(next(shape for name, shape in banks.items() if "down_proj" in name)[1:]) // hidden


class RouterTap:
    """Hands the outputs of every router to `consume(layer, logits [T, E], index [T, K])`, while it is open.

    In `index` the id E marks an unused Top-P slot.
    """

    def __init__(self, model: nn.Module, consume: Callable[[int, Tensor, Tensor], None]):
        self._handles = []
        for number, layer in enumerate(routed_layers(model)):
            self._handles.append(layer.router.register_forward_hook(_hook(number, consume)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> RouterTap:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _hook(number: int, consume: Callable[[int, Tensor, Tensor], None]) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if not isinstance(output, tuple) or len(output) != 3:
            raise ValueError(
                f"router {type(module).__name__} returns {type(output).__name__}, not (logits, weights, index): "
                "this kind of mixture cannot be analysed"
            )
        consume(number, output[0], output[2])

    return hook
