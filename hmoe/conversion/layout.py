"""The tensors of a converted model: experts as matrices, and as the tile bank of a layer.

An expert is three matrices of its neurons, `gate`, `up` and `down`, each [I, H]: row n belongs to neuron n. The bank
is described in `hmoe/experts_hmoe.py`. Letters: N tiles, g neurons per tile, I neurons of an expert, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from ..configuration_hmoe import HMoEConfig
from ..modeling_hmoe import HMoEForCausalLM
from .checkpoint import SourceCheckpoint
from .families import family_of


# read(expert, part) gives a matrix [I, H]; part is "gate", "up" or "down".
ReadExpert = Callable[[int, str], Tensor]


def model_tensors(
    source: SourceCheckpoint, config: HMoEConfig, experts: Callable[[int], Iterator[tuple[str, Tensor]]]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a converted model; attention, norms and embeddings are those of the source.

    Args:
        config: of HMoE; where source and target are both HMoE, either.
        experts: from a layer, what it has in the place of an FFN.
    """
    without_bias = family_of(source.config).without_bias
    with torch.device("meta"):
        parameters = dict(HMoEForCausalLM(config).named_parameters())
    for layer, names in groupby(parameters, _moe_layer):
        if layer is not None:
            yield from experts(layer)
            continue
        for name in names:
            if name.endswith(".bias") and name.split(".")[-2] in without_bias:
                yield name, torch.zeros(parameters[name].shape, dtype=config.dtype)
            else:
                yield name, source.tensor(name)


def _moe_layer(name: str) -> int | None:
    """The layer whose router or experts a parameter of HMoE belongs to, if any."""
    match = re.match(r"model\.layers\.(\d+)\.mlp\.", name)
    return int(match[1]) if match else None


def bank_tensors(config: HMoEConfig, layer: int, read: ReadExpert) -> Iterator[tuple[str, Tensor]]:
    """The two bank tensors of a layer, one after the other, filled expert by expert."""
    prefix = f"model.layers.{layer}.mlp.experts"
    yield f"{prefix}.gate_up_proj", _fill(config, layer, ("gate", "up"), read)
    yield f"{prefix}.down_proj", _fill(config, layer, ("down",), read)


def _fill(config: HMoEConfig, layer: int, parts: tuple[str, ...], read: ReadExpert) -> Tensor:
    sizes, tile = config.layer_expert_sizes[layer], config.expert_tile_size
    assert tile is not None
    bank = None
    for expert, (start, end) in enumerate(tile_ranges(sizes, tile)):
        for position, part in enumerate(parts):
            rows = read(expert, part)
            if bank is None:
                bank = torch.empty(sum(sizes) // tile, len(parts) * tile, rows.shape[1], dtype=rows.dtype)
            tiles = bank[start:end, position * tile : (position + 1) * tile]  # [n, g, H]
            tiles.copy_(rows.reshape(end - start, tile, -1))
    assert bank is not None
    return bank


def tile_ranges(sizes: Sequence[int], tile: int) -> list[tuple[int, int]]:
    """First tile of each expert in the bank, and the one after its last."""
    offsets = [0, *accumulate(size // tile for size in sizes)]
    return list(zip(offsets, offsets[1:]))


def unpack_expert(banks: tuple[Tensor, Tensor], sizes: Sequence[int], expert: int) -> dict[str, Tensor]:
    """An expert's `gate`, `up` and `down` [I, H] from its layer's `gate_up_proj` [N, 2g, H], `down_proj` [N, g, H]."""
    gate_up, down = banks
    tile, hidden = down.shape[1:]
    start, end = tile_ranges(sizes, tile)[expert]
    return {
        "gate": gate_up[start:end, :tile].reshape(-1, hidden),
        "up": gate_up[start:end, tile:].reshape(-1, hidden),
        "down": down[start:end].reshape(-1, hidden),
    }


def read_banks(source: SourceCheckpoint, layer: int) -> tuple[Tensor, Tensor]:
    """`gate_up_proj` [N, 2g, H] and `down_proj` [N, g, H] of a layer of an HMoE checkpoint."""
    prefix = f"model.layers.{layer}.mlp.experts"
    return source.tensor(f"{prefix}.gate_up_proj"), source.tensor(f"{prefix}.down_proj")
