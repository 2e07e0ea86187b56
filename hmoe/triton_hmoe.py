"""Triton kernels for experts of different sizes: one launch per stage for all experts, no padding, no gathered copies.

The layer is the one of `experts_hmoe.py`: a bank of tiles, expert e being the tiles tile_offsets[e] .. [e + 1].

    gate_up_proj [N, 2g, H]   the tiles of an expert are one contiguous [2 I, H] matrix
    down_proj    [N, g, H]    and one contiguous [I, H] matrix

Letters in shapes: T tokens, K expert slots per token, P = T * K (token, slot) pairs, E experts, N tiles, g neurons per
    tile, H hidden size, I expert size, M = sum over used pairs of the size of their expert.

The pairs are sorted by expert once. Buffers of neurons hold a row of I numbers per pair, in that order, with no gaps.
The five kernels are in `triton_kernels_hmoe.py`; every program finds its expert in the pair and tile offsets on the
device. Grids and buffers are bounded by static shapes, so nothing is read back to the host, except one number per
layer in eager training with Top-P routing.

The launch configurations are estimates for an H100 and were never tuned on a GPU: the kernels are tested in Triton's
interpreter, on CPU tensors, and compiled for compute capability 9.0, no more. So nothing chooses this backend by
itself (`TUNED_DEVICES` is empty).

This file travels with every saved checkpoint, so it imports only torch and its sibling.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .triton_kernels_hmoe import (
    INTERPRETED,
    bank_gradient_kernel,
    grad_neurons_kernel,
    project_kernel,
    sum_slots_kernel,
    triton,
    up_kernel,
)


# Compute capabilities on which the launch configurations were tuned: there the models choose this backend themselves.
TUNED_DEVICES: frozenset[tuple[int, int]] = frozenset()

_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The installed package and every checkpoint's copy of this file define the ops: each under a name of its own.
_OP_NAMESPACE = re.sub(r"\W", "_", __name__)


class Launch(NamedTuple):
    """Blocks of a program, and how Triton compiles it.

    Attributes:
        rows: pairs per block (rows of the bank in the gradients of the banks).
        columns: columns of H per block.
        neurons: neurons per block where gate and up are computed together.
        inner: steps of the inner dimension of a product.
        num_warps, num_stages: Triton's compile options.
    """

    rows: int
    columns: int
    neurons: int
    inner: int
    num_warps: int
    num_stages: int


# (bytes per element, size class): estimates from the H100's shared memory and registers, never tuned.
LAUNCHES: dict[tuple[int, str], Launch] = {
    (2, "small"): Launch(rows=16, columns=64, neurons=64, inner=128, num_warps=4, num_stages=4),
    (2, "medium"): Launch(rows=64, columns=128, neurons=64, inner=64, num_warps=4, num_stages=4),
    (2, "large"): Launch(rows=128, columns=128, neurons=64, inner=64, num_warps=8, num_stages=3),
    (4, "small"): Launch(rows=16, columns=32, neurons=32, inner=64, num_warps=4, num_stages=3),
    (4, "medium"): Launch(rows=32, columns=64, neurons=32, inner=32, num_warps=4, num_stages=3),
    (4, "large"): Launch(rows=64, columns=64, neurons=64, inner=32, num_warps=8, num_stages=3),
}


def _launch_for(dtype: torch.dtype, num_pairs: int, num_experts: int) -> Launch:
    """By the pairs of an expert if the load were equal; the real load is known on the device only."""
    rows = num_pairs / num_experts
    size_class = "small" if rows <= 16 else "medium" if rows <= 128 else "large"
    return LAUNCHES[dtype.itemsize, size_class]


def is_tuned() -> bool:
    """Whether the current GPU is one on which the launch configurations were tuned."""
    if triton is None or not TUNED_DEVICES or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() in TUNED_DEVICES


def supports(config) -> bool:
    """Whether the kernels know the activation of a config; a caller takes another backend where they do not."""
    return config.hidden_act in _ACTIVATIONS


@lru_cache(maxsize=1024)
def _device_offsets(tile_offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached, because a copy from host to device waits for the device."""
    return torch.tensor(tile_offsets, device=device)


class _Layer:
    """The sorted pairs of one call, and what every launch needs to know about the layer."""

    def __init__(
        self, like: Tensor, num_slots: int, order: Tensor, pair_offsets: Tensor, tile_offsets: list[int], tile: int
    ):
        self.hidden_size = like.shape[-1]
        self.tile = tile
        self.tiles = [end - start for start, end in zip(tile_offsets, tile_offsets[1:])]
        self.launch = _launch_for(like.dtype, len(order), len(self.tiles))
        # No more row blocks than this, however the pairs fall on the experts.
        self.row_blocks = len(order) // self.launch.rows + min(len(self.tiles), len(order))
        self.neuron_blocks = triton.cdiv(max(self.tiles) * tile, self.launch.neurons)
        self.hidden_blocks = triton.cdiv(self.hidden_size, self.launch.columns)
        self.num_slots = num_slots
        self.pairs = order, pair_offsets, _device_offsets(tuple(tile_offsets), like.device)
        self.shape = {
            "HIDDEN": self.hidden_size,
            "NUM_EXPERTS": len(self.tiles),
            "EXPERTS": triton.next_power_of_2(len(self.tiles)),
        }
        self.product = {
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "UPCAST": INTERPRETED and like.dtype == torch.bfloat16,
            "ROWS": self.launch.rows,
            "INNER": self.launch.inner,
            "num_warps": self.launch.num_warps,
            "num_stages": self.launch.num_stages,
        }

    def up(self, hidden_states: Tensor, gate_up_proj: Tensor, projected: Tensor, neurons: Tensor, activation: str):
        """Writes neurons [M] and, unless it is empty, projected [2 M]: per row, tile by tile, gate then up."""
        if self.row_blocks:
            up_kernel[(self.row_blocks * self.neuron_blocks,)](
                hidden_states,
                *self.pairs,
                gate_up_proj,
                projected,
                neurons,
                COLUMN_BLOCKS=self.neuron_blocks,
                SLOTS=self.num_slots,
                TILE=self.tile,
                ACTIVATION=activation,
                SAVE=projected.numel() > 0,
                NEURONS=self.launch.neurons,
                **self.shape,
                **self.product,
            )

    def project_and_sum(self, values: Tensor, bank: Tensor, top_k_index: Tensor, weights: Tensor | None) -> Tensor:
        """Sum over a token's experts of values @ bank, times the routing weights if given. Returns [T, H]."""
        # Each pair has a row of its own, rounded once to the model's dtype: half the traffic of fp32, no atomics.
        pair_rows = values.new_empty(top_k_index.numel(), self.hidden_size)
        output = values.new_empty(top_k_index.shape[0], self.hidden_size)
        if not self.row_blocks:
            return output.zero_()
        project_kernel[(self.row_blocks * self.hidden_blocks,)](
            values,
            *self.pairs,
            bank,
            values if weights is None else weights,
            pair_rows,
            COLUMN_BLOCKS=self.hidden_blocks,
            TILE=bank.shape[1],
            WEIGHTED=weights is not None,
            COLUMNS=self.launch.columns,
            **self.shape,
            **self.product,
        )
        columns = min(1024, triton.next_power_of_2(self.hidden_size))
        column_blocks = triton.cdiv(self.hidden_size, columns)
        sum_slots_kernel[(len(output) * column_blocks,)](
            pair_rows,
            top_k_index,
            output,
            COLUMN_BLOCKS=column_blocks,
            SLOTS=self.num_slots,
            COLUMNS=columns,
            **self.shape,
        )
        return output

    def grad_neurons(
        self,
        grad_output: Tensor,
        down_proj: Tensor,
        weights: Tensor,
        projected: Tensor,
        activation: str,
        grad_projected: Tensor | None,
        weighted_neurons: Tensor | None,
        weight_parts: Tensor | None,
    ) -> None:
        """Writes those of grad_projected [2 M], weighted_neurons [M], weight_parts [P, blocks] that are given."""
        if self.row_blocks:
            grad_neurons_kernel[(self.row_blocks * self.neuron_blocks,)](
                grad_output,
                *self.pairs,
                down_proj,
                weights,
                projected,
                projected if grad_projected is None else grad_projected,
                projected if weighted_neurons is None else weighted_neurons,
                projected if weight_parts is None else weight_parts,
                COLUMN_BLOCKS=self.neuron_blocks,
                SLOTS=self.num_slots,
                TILE=self.tile,
                ACTIVATION=activation,
                GRAD_PROJECTED=grad_projected is not None,
                WEIGHTED_NEURONS=weighted_neurons is not None,
                GRAD_WEIGHTS=weight_parts is not None,
                NEURONS=self.launch.neurons,
                **self.shape,
                **self.product,
            )

    def bank_gradient(self, values: Tensor, token_rows: Tensor, bank: Tensor) -> Tensor:
        """Per expert values^T @ token_rows, in the shape of the bank; zero for an expert without tokens."""
        gradient = torch.empty_like(bank)
        blocks = sum(triton.cdiv(tiles * bank.shape[1], self.launch.rows) for tiles in self.tiles)
        bank_gradient_kernel[(blocks * self.hidden_blocks,)](
            values,
            token_rows,
            *self.pairs,
            gradient,
            COLUMN_BLOCKS=self.hidden_blocks,
            SLOTS=self.num_slots,
            TILE=bank.shape[1],
            COLUMNS=self.launch.columns,
            **self.shape,
            **self.product,
        )
        return gradient


def _sort_pairs(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Pairs stably sorted by expert [P], and where each expert's pairs begin [E + 1]; unused slots lie behind."""
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    # bincount would wait for the device.
    return order, torch.searchsorted(expert, torch.arange(num_experts + 1, device=expert.device, dtype=expert.dtype))


@torch.library.custom_op(f"{_OP_NAMESPACE}::triton_experts", mutates_args=())
def _triton_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tile_offsets: list[int],
    activation: str,
    num_neurons: int,
    keep_projected: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of each token's experts. All tensors are contiguous.

    Args:
        num_neurons: a bound on the neurons M of all pairs, or -1 to count them, for which the host waits.
        keep_projected: whether to return the gate and up projections, for backward.

    Returns:
        output [T, H]; gate and up projections [2 M], empty unless kept; the pairs sorted by expert [P]; where each
        expert's pairs begin [E + 1].
    """
    order, pair_offsets = _sort_pairs(top_k_index, len(tile_offsets) - 1)
    with torch.cuda.device_of(hidden_states):
        layer = _Layer(hidden_states, top_k_index.shape[1], order, pair_offsets, tile_offsets, down_proj.shape[1])
        if num_neurons < 0:
            tiles = _device_offsets(tuple(tile_offsets), order.device).diff()
            num_neurons = int((pair_offsets.diff() * tiles).sum()) * layer.tile
        projected = hidden_states.new_empty(2 * num_neurons if keep_projected else 0)
        neurons = hidden_states.new_empty(num_neurons)
        layer.up(hidden_states, gate_up_proj, projected, neurons, activation)
        output = layer.project_and_sum(neurons, down_proj, top_k_index, top_k_weights)
    return output, projected, order, pair_offsets


@torch.library.custom_op(f"{_OP_NAMESPACE}::triton_experts_backward", mutates_args=())
def _triton_experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    projected: Tensor,
    order: Tensor,
    pair_offsets: Tensor,
    tile_offsets: list[int],
    activation: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, routing weights, `gate_up_proj` and `down_proj`: each empty unless it is needed."""
    need_hidden, need_weights, need_gate_up, need_down = needed
    grad_hidden, grad_weights, grad_gate_up, grad_down = (grad_output.new_empty(0) for _ in needed)
    with torch.cuda.device_of(hidden_states):
        layer = _Layer(hidden_states, top_k_index.shape[1], order, pair_offsets, tile_offsets, down_proj.shape[1])
        grad_projected = torch.empty_like(projected) if need_hidden or need_gate_up else None
        weighted_neurons = projected.new_empty(projected.numel() // 2) if need_down else None
        weight_parts = None
        if need_weights:  # zero where an expert has fewer blocks, and in unused slots
            weight_parts = projected.new_zeros(len(order), layer.neuron_blocks, dtype=torch.float32)
        layer.grad_neurons(
            grad_output,
            down_proj,
            top_k_weights,
            projected,
            activation,
            grad_projected,
            weighted_neurons,
            weight_parts,
        )
        if weight_parts is not None:
            grad_weights = weight_parts.sum(1).view_as(top_k_weights).to(top_k_weights.dtype)
        if weighted_neurons is not None:
            grad_down = layer.bank_gradient(weighted_neurons, grad_output, down_proj)
        if grad_projected is not None and need_gate_up:
            grad_gate_up = layer.bank_gradient(grad_projected, hidden_states, gate_up_proj)
        if grad_projected is not None and need_hidden:
            grad_hidden = layer.project_and_sum(grad_projected, gate_up_proj, top_k_index, None)
    return grad_hidden, grad_weights, grad_gate_up, grad_down


@_triton_experts.register_fake
def _(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    tile_offsets,
    activation,
    num_neurons,
    keep_projected,
):
    if not keep_projected:
        num_neurons = 0
    elif num_neurons < 0:
        num_neurons = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty_like(hidden_states),
        hidden_states.new_empty(2 * num_neurons),
        top_k_index.new_empty(top_k_index.numel(), dtype=torch.int64),
        top_k_index.new_empty(len(tile_offsets), dtype=torch.int64),
    )


@_triton_experts_backward.register_fake
def _(
    grad_output,
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    projected,
    order,
    pair_offsets,
    tile_offsets,
    activation,
    needed,
):
    tensors = hidden_states, top_k_weights, gate_up_proj, down_proj
    return tuple(
        torch.empty_like(tensor) if need else grad_output.new_empty(0) for tensor, need in zip(tensors, needed)
    )


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.tile_offsets, ctx.activation, _, _ = inputs
    _, projected, order, pair_offsets = output
    ctx.mark_non_differentiable(projected, order, pair_offsets)
    ctx.set_materialize_grads(False)  # no zeros for the three
    ctx.save_for_backward(*tensors, projected, order, pair_offsets)


def _backward(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 9
    needed = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    gradients = _triton_experts_backward(
        grad_output.contiguous(), *ctx.saved_tensors, ctx.tile_offsets, ctx.activation, needed
    )
    hidden, weights, gate_up, down = (value if need else None for value, need in zip(gradients, needed))
    return hidden, None, weights, gate_up, down, None, None, None, None


_triton_experts.register_autograd(_backward, setup_context=_save_for_backward)


def _check_usable(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    other = "or set experts_implementation='grouped_mm'"
    if triton is None:
        raise RuntimeError(f"experts_implementation='triton' needs the package triton: pip install triton, {other}")
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "experts_implementation='triton' got CPU tensors: move the model to a GPU, set TRITON_INTERPRET=1 before "
            f"Python starts (slow, for tests), {other}"
        )
    if dtype not in _DTYPES:
        raise RuntimeError(
            f"experts_implementation='triton' computes in float32, bfloat16 or float16, got {dtype}: convert the "
            f"model, {other}"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"experts_implementation='triton' knows the activations {', '.join(_ACTIVATIONS)}, got "
            f"hidden_act={activation!r}: set experts_implementation='eager'"
        )


def triton_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of each token's experts, by Triton kernels; an id of E or more is an unused slot.

    Args:
        self: an `HMoEExperts` module.
        hidden_states: [T, H]. top_k_index, top_k_weights: [T, K].

    Returns:
        [T, H] in the dtype of the hidden states. Products accumulate in fp32 and a token's experts are added in fp32.
        Every result is a fixed sum in a fixed order: two runs are equal bit by bit.

    Raises:
        RuntimeError: without triton, on CPU tensors outside Triton's interpreter, in another dtype than float32,
            bfloat16 and float16.
        ValueError: for an activation that the kernels do not know (see [`supports`]).
    """
    dtype = self.gate_up_proj.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    _check_usable(hidden_states.device, dtype, self.config.hidden_act)
    operands = [tensor.to(dtype).contiguous() for tensor in (hidden_states, self.gate_up_proj, self.down_proj)]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (*operands, top_k_weights))
    # The bound holds for any ids. Top-P uses few of its slots: what it keeps for backward is counted, unless compiled.
    if differentiable and self.config.routing == "top_p" and not torch.compiler.is_compiling():
        num_neurons = -1
    else:
        num_neurons = max(self.expert_sizes()) * top_k_index.numel()
    output, *_ = _triton_experts(
        operands[0],
        top_k_index.contiguous(),
        top_k_weights.contiguous(),
        operands[1],
        operands[2],
        self.tile_offsets,
        self.config.hidden_act,
        num_neurons,
        differentiable,
    )
    return output.to(hidden_states.dtype)
