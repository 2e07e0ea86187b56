"""Experts of different sizes as runs of equal tiles, and the backends that compute them.

A gated FFN is a sum over its intermediate neurons, so an expert of size I is the sum of I / g tiles of g neurons that
share one gate weight. One bank holds the tiles of all experts of a layer, expert after expert:

    gate_up_proj [N, 2g, H]   the gate rows of a tile, then its up rows
    down_proj    [N, g, H]    neuron by neuron, so that the tiles of an expert are one contiguous [I, H] matrix

Letters in shapes: T tokens, K expert slots per token, E experts, N tiles, g neurons per tile, H hidden size, I expert
    size.
A slot with the id E (or more) is unused: it costs nothing and adds nothing. This file travels with every saved
checkpoint, so it imports only torch and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ExpertsInterface,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)


# Activations that the fused op knows, with their derivatives; the others are computed by the eager loop.
_FUSED_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda gate: F.gelu(gate, approximate="tanh"),
        lambda grad, gate: torch.ops.aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
    "relu": (F.relu, lambda grad, gate: torch.ops.aten.threshold_backward(grad, gate, 0)),
}
_FUSED_ACTIVATIONS["swish"] = _FUSED_ACTIVATIONS["silu"]

# The installed package and every checkpoint's copy of this file define the op: each under a name of its own.
_OP_NAMESPACE = re.sub(r"\W", "_", __name__)


def _expert_rows(bank: Tensor, tile_offsets: list[int], expert: int) -> Tensor:
    """The tiles of one expert as a matrix [rows, H], a view of the contiguous bank."""
    return bank[tile_offsets[expert] : tile_offsets[expert + 1]].reshape(-1, bank.shape[-1])


@torch.library.custom_op(f"{_OP_NAMESPACE}::gated_experts", mutates_args=())
def _gated_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tile_offsets: list[int],
    activation: str,
    saved_numel: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of each token's experts.

    Args:
        saved_numel: elements of the buffer that keeps the gate and up projections for backward: 0 for none, -1 for
            exactly what is needed (a size that depends on the routing), or a bound on it (a static shape, for the
            compiler).

    Returns:
        output [T, H]; the buffer, experts in order, each [tokens, tiles, 2, g]; the (token, slot) pairs sorted by
        expert [T * K]; pairs per expert [E + 1], the last entry the unused slots.
    """
    act = _FUSED_ACTIVATIONS[activation][0]
    num_experts, tile = len(tile_offsets) - 1, down_proj.shape[1]
    order, counts = _sort_pairs(top_k_index, num_experts)
    rows_per_expert = counts.tolist()[:num_experts]
    widths = [2 * tile * (end - start) for start, end in zip(tile_offsets, tile_offsets[1:])]  # gate and up columns
    needed = sum(rows * width for rows, width in zip(rows_per_expert, widths))
    saved = hidden_states.new_empty(needed if saved_numel < 0 else saved_numel)

    output = torch.zeros(hidden_states.shape, dtype=_accumulator_dtype(hidden_states), device=hidden_states.device)
    flat_weights = top_k_weights.reshape(-1)
    pair_start = saved_start = 0
    for expert, rows in enumerate(rows_per_expert):
        if rows == 0:
            continue
        pairs = order[pair_start : pair_start + rows]
        token = pairs // top_k_index.shape[1]  # [rows]
        gate_up_rows = _expert_rows(gate_up_proj, tile_offsets, expert).t()
        if saved_numel:
            projected = saved[saved_start : saved_start + rows * widths[expert]].view(rows, widths[expert])
            torch.mm(hidden_states[token], gate_up_rows, out=projected)  # [rows, 2 I]
        else:
            projected = hidden_states[token] @ gate_up_rows  # [rows, 2 I]
        gate, up = projected.view(rows, -1, 2, tile).unbind(2)  # [rows, tiles, g] each
        neurons = act(gate).mul_(up).view(rows, -1)  # [rows, I]
        expert_output = neurons @ _expert_rows(down_proj, tile_offsets, expert)  # [rows, H]
        output.index_add_(0, token, expert_output.to(output.dtype) * flat_weights[pairs].unsqueeze(1).to(output.dtype))
        pair_start += rows
        saved_start += rows * widths[expert]
    return output.to(hidden_states.dtype, copy=False), saved, order, counts


@torch.library.custom_op(f"{_OP_NAMESPACE}::gated_experts_backward", mutates_args=())
def _gated_experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    saved: Tensor,
    order: Tensor,
    counts: Tensor,
    tile_offsets: list[int],
    activation: str,
    bank_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, routing weights, `gate_up_proj` and `down_proj` (the banks' empty unless asked)."""
    act, act_backward = _FUSED_ACTIVATIONS[activation]
    num_experts, tile = len(tile_offsets) - 1, down_proj.shape[1]
    grad_hidden = torch.zeros(
        hidden_states.shape, dtype=_accumulator_dtype(hidden_states), device=hidden_states.device
    )
    grad_weights = torch.zeros_like(top_k_weights, memory_format=torch.contiguous_format)
    grad_gate_up = torch.empty_like(gate_up_proj) if bank_gradients else gate_up_proj.new_empty(0)
    grad_down = torch.empty_like(down_proj) if bank_gradients else down_proj.new_empty(0)
    flat_weights, flat_grad_weights = top_k_weights.reshape(-1), grad_weights.view(-1)

    pair_start = saved_start = 0
    for expert, rows in enumerate(counts.tolist()[:num_experts]):
        if bank_gradients and rows == 0:
            _expert_rows(grad_gate_up, tile_offsets, expert).zero_()
            _expert_rows(grad_down, tile_offsets, expert).zero_()
        if rows == 0:
            continue
        pairs = order[pair_start : pair_start + rows]
        token = pairs // top_k_weights.shape[1]  # [rows]
        width = 2 * tile * (tile_offsets[expert + 1] - tile_offsets[expert])
        gate, up = saved[saved_start : saved_start + rows * width].view(rows, -1, 2, tile).unbind(2)
        weight = flat_weights[pairs].to(hidden_states.dtype).view(rows, 1, 1)

        grad_rows = grad_output[token]  # [rows, H]
        grad_neurons = (grad_rows @ _expert_rows(down_proj, tile_offsets, expert).t()).view_as(
            gate
        )  # before the weight
        activated = act(gate)  # [rows, tiles, g]
        neurons = activated * up
        flat_grad_weights[pairs] = torch.linalg.vecdot(neurons.view(rows, -1), grad_neurons.view(rows, -1)).to(
            flat_grad_weights.dtype
        )
        if bank_gradients:
            weighted = neurons.mul_(weight).view(rows, -1)
            torch.mm(weighted.t(), grad_rows, out=_expert_rows(grad_down, tile_offsets, expert))
        grad_neurons.mul_(weight)
        grad_projected = torch.empty_like(
            gate.unsqueeze(2).expand(-1, -1, 2, -1), memory_format=torch.contiguous_format
        )
        torch.mul(grad_neurons, activated, out=grad_projected[:, :, 1])
        grad_projected[:, :, 0] = act_backward(grad_neurons.mul_(up), gate)
        grad_projected = grad_projected.view(rows, width)
        if bank_gradients:
            torch.mm(grad_projected.t(), hidden_states[token], out=_expert_rows(grad_gate_up, tile_offsets, expert))
        grad_tokens = grad_projected @ _expert_rows(gate_up_proj, tile_offsets, expert)  # [rows, H]
        grad_hidden.index_add_(0, token, grad_tokens.to(grad_hidden.dtype))
        pair_start += rows
        saved_start += rows * width
    return grad_hidden.to(hidden_states.dtype, copy=False), grad_weights, grad_gate_up, grad_down


def _sort_pairs(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(token, slot) pairs stably sorted by expert [T * K], and pairs per expert [E + 1], unused slots last."""
    flat = top_k_index.reshape(-1).clamp(max=num_experts)
    return torch.sort(flat, stable=True).indices, torch.bincount(flat, minlength=num_experts + 1)


def _accumulator_dtype(hidden_states: Tensor) -> torch.dtype:
    """A token's experts are summed in fp32 when the model is in half precision."""
    return torch.promote_types(hidden_states.dtype, torch.float32)


@_gated_experts.register_fake
def _(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, tile_offsets, activation, saved_numel):
    numel = torch.library.get_ctx().new_dynamic_size() if saved_numel < 0 else saved_numel
    order = top_k_index.new_empty(top_k_index.numel(), dtype=torch.int64)
    counts = top_k_index.new_empty(len(tile_offsets), dtype=torch.int64)
    return torch.empty_like(hidden_states), hidden_states.new_empty(numel), order, counts


@_gated_experts_backward.register_fake
def _(
    grad_output,
    hidden_states,
    top_k_weights,
    gate_up_proj,
    down_proj,
    saved,
    order,
    counts,
    tile_offsets,
    activation,
    bank_gradients,
):
    banks = [torch.empty_like(bank) if bank_gradients else bank.new_empty(0) for bank in (gate_up_proj, down_proj)]
    return torch.empty_like(hidden_states), torch.empty_like(top_k_weights), *banks


def _save_for_backward(ctx, inputs, output):
    hidden_states, _, top_k_weights, gate_up_proj, down_proj, ctx.tile_offsets, ctx.activation, _ = inputs
    _, saved, order, counts = output
    ctx.mark_non_differentiable(saved, order, counts)
    ctx.save_for_backward(hidden_states, top_k_weights, gate_up_proj, down_proj, saved, order, counts)


def _backward(ctx, grad_output, *_):
    banks_need_gradients = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grad_hidden, grad_weights, grad_gate_up, grad_down = _gated_experts_backward(
        grad_output.contiguous(), *ctx.saved_tensors, ctx.tile_offsets, ctx.activation, banks_need_gradients
    )
    if not banks_need_gradients:
        grad_gate_up = grad_down = None
    return grad_hidden, None, grad_weights, grad_gate_up, grad_down, None, None, None


_gated_experts.register_autograd(_backward, setup_context=_save_for_backward)


def grouped_mm_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The default backend: pairs sorted by expert once, then one product per expert and stage, on slices."""
    if self.config.hidden_act not in _FUSED_ACTIVATIONS:
        return eager_forward(self, hidden_states, top_k_index, top_k_weights)
    dtype = self.gate_up_proj.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    operands = [tensor.to(dtype).contiguous() for tensor in (hidden_states, self.gate_up_proj, self.down_proj)]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (*operands, top_k_weights))
    saved_numel = 0
    if differentiable:
        # A token activates an expert at most once, so its K widest experts bound what it keeps.
        widest = sum(sorted(self.expert_sizes(), reverse=True)[: top_k_index.shape[1]])
        saved_numel = 2 * widest * hidden_states.shape[0] if torch.compiler.is_compiling() else -1
    output, *_ = _gated_experts(
        operands[0],
        top_k_index,
        top_k_weights,
        operands[1],
        operands[2],
        self.tile_offsets,
        self.config.hidden_act,
        saved_numel,
    )
    return output.to(hidden_states.dtype)


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
    """What the stock kernels read from an experts module, with tiles in the place of experts."""

    has_gate = True
    has_bias = has_post_expert_norm = is_transposed = False
    _is_expert_parallel = True  # the stock kernels skip unused ids only then

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, apply_gate: Callable[[Tensor], Tensor]):
        self.num_experts = gate_up_proj.shape[0]
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj.transpose(1, 2)  # [N, H, g], as stock experts store it
        self._apply_gate = apply_gate


def _run_on_tiles(
    self,
    stock_forward: Callable[..., Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """A stock backend of Transformers run on tile ids: exact FLOPs, each token gathered once per tile."""
    tiles_of_expert = self.tiles_of_expert(hidden_states.device)  # [E + 1, n], padded with the id N
    tile_index = tiles_of_expert[top_k_index.clamp(max=len(tiles_of_expert) - 1)]  # [T, K, n]
    used = tile_index < gate_up_proj.shape[0]
    tile_weights = torch.where(used, top_k_weights.unsqueeze(-1), 0)  # [T, K, n]
    bank = _TileBank(gate_up_proj, down_proj, self._apply_gate)
    return stock_forward(bank, hidden_states, tile_index.flatten(1), tile_weights.flatten(1))


def batched_mm_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Stock `batched_mm` on tiles: gathers the weights of every (token, tile), for short decoding steps."""
    inputs = hidden_states, top_k_index, top_k_weights
    return _run_on_tiles(self, batched_mm_experts_forward, *inputs, self.gate_up_proj, self.down_proj)


def tiled_grouped_mm_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Stock `grouped_mm` on tiles."""
    inputs = hidden_states, top_k_index, top_k_weights
    # The kernel's backward leaves garbage in the rows of unused ids; a learnable activation would sum it up.
    if any(True for _ in self.act_fn.parameters()):
        return eager_forward(self, *inputs)
    gate_up_proj, down_proj = self.gate_up_proj, self.down_proj
    tile = down_proj.shape[1]
    # The kernel wants strides in multiples of 16 bytes; zero neurons add nothing.
    if missing := -tile % (16 // down_proj.element_size()):
        gate_up_proj = F.pad(gate_up_proj.unflatten(1, (2, tile)), (0, 0, 0, missing)).flatten(1, 2)
        down_proj = F.pad(down_proj, (0, 0, 0, missing))
    return _run_on_tiles(self, grouped_mm_experts_forward, *inputs, gate_up_proj, down_proj)


class HMoEExpertsInterface(ExpertsInterface):
    """The backends of this model, under the stock names (`eager` is the class's own forward)."""

    _global_mapping = {
        "grouped_mm": grouped_mm_forward,
        "batched_mm": batched_mm_forward,
        "tiled_grouped_mm": tiled_grouped_mm_forward,
    }


EXPERTS_IMPLEMENTATIONS = ("eager", *HMoEExpertsInterface._global_mapping)


@use_experts_implementation(experts_interface=HMoEExpertsInterface())
class HMoEExperts(nn.Module):
    """The experts of one layer, of any sizes that the tile divides.

    `forward(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]` takes expert ids, as
    Transformers calls experts.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        sizes = config.layer_expert_sizes[layer_idx]
        self.num_experts = len(sizes)  # expert parallelism sets it to the number of tiles held here
        self.tile_offsets = [0, *accumulate(size // config.expert_tile_size for size in sizes)]
        num_tiles, tile, hidden = self.tile_offsets[-1], config.expert_tile_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_tiles, 2 * tile, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_tiles, tile, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return eager_forward(self, hidden_states, top_k_index, top_k_weights)

    def expert_sizes(self) -> list[int]:
        """Neurons of each expert held here (a tensor-parallel rank holds a part of every tile)."""
        tile = self.down_proj.shape[1]
        return [tile * (end - start) for start, end in zip(self.tile_offsets, self.tile_offsets[1:])]

    def tiles_of_expert(self, device: torch.device) -> Tensor:
        """[E + 1, n]: tile ids of each expert and, last, of the unused slot, padded with the id N."""
        num_tiles = self.tile_offsets[-1]
        runs = [list(range(start, end)) for start, end in zip(self.tile_offsets, self.tile_offsets[1:])] + [[]]
        most = max(map(len, runs))
        return torch.tensor([run + [num_tiles] * (most - len(run)) for run in runs], device=device)

    def extra_repr(self) -> str:
        # Of shapes no index is taken: DeepSpeed ZeRO-3 leaves parameters empty, and prints the model.
        tiles = [end - start for start, end in zip(self.tile_offsets, self.tile_offsets[1:])]
        return f"tiles={tiles}, gate_up_proj={list(self.gate_up_proj.shape)}, down_proj={list(self.down_proj.shape)}"
