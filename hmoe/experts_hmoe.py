"""Experts of different sizes as runs of equal tiles, and the backends that compute them.

A gated FFN is a sum over its intermediate neurons, so an expert of size I is the sum of I / g tiles of g neurons that
share one gate weight. One bank holds the tiles of all experts of a layer, expert after expert:

    gate_up_proj [N, 2g, H]   the gate rows of a tile, then its up rows
    down_proj    [N, g, H]    neuron by neuron, so that the tiles of an expert are one contiguous [I, H] matrix

Letters in shapes: T tokens, K expert slots per token, E experts, N tiles, g neurons per tile, H hidden size, I expert
    size.
A slot with the id E (or more) is unused: it costs nothing and adds nothing. This file travels with every saved
checkpoint, so it imports only torch, transformers and its siblings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ExpertsInterface,
    batched_mm_experts_forward,
    use_experts_implementation,
)

from .grouped_hmoe import ACTIVATIONS, gated_experts
from .triton_hmoe import is_tuned, triton_experts


def _run_op(
    self, op: Callable[..., Tensor], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An op on contiguous tensors in the dtype of autocast, or else of the banks; `eager` for other activations."""
    if self.config.hidden_act not in ACTIVATIONS:
        return eager_forward(self, hidden_states, top_k_index, top_k_weights)
    dtype = self.gate_up_proj.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    inputs, gate_up_proj, down_proj = (
        tensor.to(dtype).contiguous() for tensor in (hidden_states, self.gate_up_proj, self.down_proj)
    )
    output = op(inputs, top_k_index, top_k_weights, gate_up_proj, down_proj, self.tile_offsets, self.config.hidden_act)
    return output.to(hidden_states.dtype)


def grouped_mm_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The default backend: pairs sorted by expert once, then one product per expert and stage, on slices."""
    return _run_op(self, gated_experts, hidden_states, top_k_index, top_k_weights)


def _expert_rows(bank: Tensor, tile_offsets: list[int], expert: int) -> Tensor:
    """The tiles of one expert as a matrix [rows, H]."""
    return bank[tile_offsets[expert] : tile_offsets[expert + 1]].flatten(0, 1)


def eager_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The reference: a static loop over experts in plain PyTorch. Every other backend is tested against it."""
    output = torch.zeros_like(hidden_states)
    tile = self.down_proj.shape[1]
    for expert in range(len(self.tile_offsets) - 1):
        token, slot = torch.where(top_k_index == expert)  # [rows] each
        projected = F.linear(hidden_states[token], _expert_rows(self.gate_up_proj, self.tile_offsets, expert))
        gate, up = projected.unflatten(1, (-1, 2, tile)).unbind(2)  # [rows, tiles, g] each
        neurons = (self.act_fn(gate) * up).flatten(1)  # [rows, I]
        expert_output = neurons @ _expert_rows(self.down_proj, self.tile_offsets, expert)  # [rows, H]
        weighted = expert_output * top_k_weights[token, slot, None]
        output.index_add_(0, token, weighted.to(output.dtype))
    return output


class _TileBank:
    """What Transformers' `batched_mm` reads from an experts module, with tiles in the place of experts."""

    has_gate = True
    has_bias = has_post_expert_norm = is_transposed = False
    _is_expert_parallel = True  # it skips unused ids only then

    def __init__(self, experts: HMoEExperts):
        self.num_experts = experts.gate_up_proj.shape[0]
        self.gate_up_proj = experts.gate_up_proj
        self.down_proj = experts.down_proj.transpose(1, 2)  # [N, H, g], as stock experts store it
        self._apply_gate = experts._apply_gate


def batched_mm_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Stock `batched_mm` on tile ids: gathers the weights of every (token, tile), for short decoding steps."""
    num_tiles = self.tile_offsets[-1]
    runs = [list(range(start, end)) for start, end in zip(self.tile_offsets, self.tile_offsets[1:])] + [[]]
    most = max(map(len, runs))
    padded = [run + [num_tiles] * (most - len(run)) for run in runs]
    tiles_of_expert = torch.tensor(padded, device=hidden_states.device)  # [E + 1, n], the last of unused slots
    tile_index = tiles_of_expert[top_k_index.clamp(max=len(tiles_of_expert) - 1)]  # [T, K, n]
    used = tile_index < num_tiles
    tile_weights = torch.where(used, top_k_weights.unsqueeze(-1), 0)  # [T, K, n]
    return batched_mm_experts_forward(_TileBank(self), hidden_states, tile_index.flatten(1), tile_weights.flatten(1))


def triton_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Triton kernels over all experts at once, for GPUs; chosen by default only on those they were tuned on."""
    op = partial(triton_experts, count_neurons=self.config.routing == "top_p")  # Top-P leaves most of its slots unused
    return _run_op(self, op, hidden_states, top_k_index, top_k_weights)


class HMoEExpertsInterface(ExpertsInterface):
    """The backends of this model, under the stock names (`eager` is the class's own forward)."""

    _global_mapping = {
        "grouped_mm": grouped_mm_forward,
        "batched_mm": batched_mm_forward,
        "triton": triton_forward,
    }


EXPERTS_IMPLEMENTATIONS = ("eager", *HMoEExpertsInterface._global_mapping)


def choose_experts_implementation(requested: str | None) -> str:
    """The backend asked for; by default `triton` on a GPU that it was tuned on, else `grouped_mm`.

    Raises:
        ValueError: there is no backend of this name, or no longer.
    """
    if requested is None:
        return "triton" if is_tuned() else "grouped_mm"
    if requested == "tiled_grouped_mm":
        raise ValueError(
            "`experts_implementation`='tiled_grouped_mm' was removed, because 'grouped_mm' was faster in every "
            "measurement and computes the same: use 'grouped_mm'"
        )
    if requested not in EXPERTS_IMPLEMENTATIONS:
        raise ValueError(
            f"`experts_implementation`={requested!r} does not exist for experts of different sizes: "
            f"use one of {list(EXPERTS_IMPLEMENTATIONS)}"
        )
    return requested


@use_experts_implementation(experts_interface=HMoEExpertsInterface())
class HMoEExperts(nn.Module):
    """The experts of one layer, of any sizes that the tile divides.

    `forward(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]` takes expert ids, as
    Transformers calls experts.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        sizes = config.layer_expert_sizes[layer_idx]
        self.num_experts = len(sizes)  # E, also under expert parallelism: forward takes the ids of all experts
        self.tile_offsets = [0, *accumulate(size // config.expert_tile_size for size in sizes)]
        num_tiles, tile, hidden = self.tile_offsets[-1], config.expert_tile_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_tiles, 2 * tile, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_tiles, tile, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return eager_forward(self, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        # Shapes are printed whole: DeepSpeed ZeRO-3 prints the model while its parameters are empty, of shape [0].
        tiles = [end - start for start, end in zip(self.tile_offsets, self.tile_offsets[1:])]
        return f"tiles={tiles}, gate_up_proj={list(self.gate_up_proj.shape)}, down_proj={list(self.down_proj.shape)}"
