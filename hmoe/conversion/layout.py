"""Between experts as matrices and the tile bank of a layer.

An expert is three matrices of its neurons, `gate`, `up` and `down`, each [I, H]: row n belongs to neuron n. The bank
is described in `hmoe/experts_hmoe.py`. Letters: N tiles, g neurons per tile, I neurons of an expert, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..configuration_hmoe import HMoEConfig
from .checkpoint import CheckpointReader
from .families import PROJECTIONS, attention_names, model_names


# read(expert, part) gives a matrix [I, H]; part is "gate", "up" or "down".
ReadExpert = Callable[[int, str], Tensor]


def model_tensors(
    reader: CheckpointReader,
    config: HMoEConfig,
    experts: Callable[[int], Iterator[tuple[str, Tensor]]],
    biases: Sequence[str] = PROJECTIONS,
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a converted model; attention, norms and embeddings are those of the source.

    Args:
        config: of the source or the target, which agree in all but the experts.
        experts: yields what a layer has in the place of an FFN.
        biases: attention projections that have a bias in the source, if the config has biases; others get zeros.
    """
    for layer in range(config.num_hidden_layers):
        for name in attention_names(config, layer):
            projection, kind = name.split(".")[-2:]
            if kind == "bias" and projection not in biases:
                yield name, torch.zeros(config.hidden_size, dtype=config.dtype)
            else:
                yield name, reader.tensor(name)
        yield from experts(layer)
    for name in model_names(config):
        yield name, reader.tensor(name)


def bank_tensors(config: HMoEConfig, layer: int, read: ReadExpert) -> Iterator[tuple[str, Tensor]]:
    """The two bank tensors of a layer, one after the other, filled expert by expert."""
    prefix = f"model.layers.{layer}.mlp.experts"
    yield f"{prefix}.gate_up_proj", _fill(config, layer, ("gate", "up"), read)
    yield f"{prefix}.down_proj", _fill(config, layer, ("down",), read)


def _fill(config: HMoEConfig, layer: int, parts: tuple[str, ...], read: ReadExpert) -> Tensor:
    sizes, tile = config.layer_expert_sizes[layer], config.expert_tile_size
    assert tile is not None
    bank = None
    for expert, (start, end) in enumerate(_tile_ranges(sizes, tile)):
        for position, part in enumerate(parts):
            rows = read(expert, part)
            if bank is None:
                bank = torch.empty(sum(sizes) // tile, len(parts) * tile, rows.shape[1], dtype=rows.dtype)
            tiles = bank[start:end, position * tile : (position + 1) * tile]  # [n, g, H]
            tiles.copy_(rows.reshape(end - start, tile, -1))
    assert bank is not None
    return bank


def _tile_ranges(sizes: Sequence[int], tile: int) -> list[tuple[int, int]]:
    offsets = [0, *accumulate(size // tile for size in sizes)]
    return list(zip(offsets, offsets[1:]))


def unpack_expert(banks: tuple[Tensor, Tensor], sizes: Sequence[int], expert: int) -> dict[str, Tensor]:
    """An expert's `gate`, `up` and `down` [I, H] from its layer's `gate_up_proj` [N, 2g, H], `down_proj` [N, g, H]."""
    gate_up, down = banks
    tile, hidden = down.shape[1:]
    start, end = _tile_ranges(sizes, tile)[expert]
    return {
        "gate": gate_up[start:end, :tile].reshape(-1, hidden),
        "up": gate_up[start:end, tile:].reshape(-1, hidden),
        "down": down[start:end].reshape(-1, hidden),
    }


def read_banks(reader: CheckpointReader, layer: int) -> tuple[Tensor, Tensor]:
    """`gate_up_proj` [N, 2g, H] and `down_proj` [N, g, H] of a layer of an HMoE checkpoint."""
    prefix = f"model.layers.{layer}.mlp.experts"
    return reader.tensor(f"{prefix}.gate_up_proj"), reader.tensor(f"{prefix}.down_proj")
