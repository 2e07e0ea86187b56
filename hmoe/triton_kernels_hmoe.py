"""The Triton kernels of `triton_hmoe.py`, one launch per stage for the experts of a layer.

Letters in shapes: T tokens, K expert slots per token, P = T * K (token, slot) pairs, E experts, N tiles, g neurons per
    tile, H hidden size, I expert size, M = sum over used pairs of the size of their expert.

Five kernels do all of forward and backward:

    up_kernel              neurons = act(x gate^T) * (x up^T)         x is read by token index
    project_kernel         pair rows = values @ bank                  down projection; gradient of the hidden states
    sum_slots_kernel       token row = sum of its pair rows           in slot order and fp32, so no atomics
    grad_neurons_kernel    grad_output @ down^T, derivative of the activation, gradient of the routing weights
    bank_gradient_kernel   values^T @ token rows                      gradients of both banks

Every program finds its expert in the pair and tile offsets on the device. This file travels with every saved
checkpoint, so it imports only torch and, where it is installed, triton.
"""

from __future__ import annotations


try:
    import triton
    import triton.language as tl

    _jit = triton.jit
except ImportError:
    triton = None

    def _jit(kernel):
        return kernel


@_jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """accumulator + a @ b in fp32. Triton's interpreter multiplies bf16 bit patterns, so there operands are upcast."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@_jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """Value and derivative of the activation, in fp32."""
    if ACTIVATION == "relu":
        value = tl.maximum(gate, 0.0)
        slope = tl.where(gate > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))  # the normal distribution function
        value = gate * share
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "gelu_pytorch_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        value = gate * share
        slope = share + value * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * gate * gate)
    else:  # silu, swish
        share = tl.sigmoid(gate)
        value = gate * share
        slope = share * (1 + gate * (1 - share))
    return value, slope


@_jit
def _load_experts(pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr):
    """Pairs and tiles of every expert, [EXPERTS] each: the next power of two after the number of experts."""
    expert = tl.arange(0, EXPERTS)
    known = expert < NUM_EXPERTS
    pairs = tl.load(pair_offsets_ptr + expert + 1, known, 0) - tl.load(pair_offsets_ptr + expert, known, 0)
    tiles = tl.load(tile_offsets_ptr + expert + 1, known, 0) - tl.load(tile_offsets_ptr + expert, known, 0)
    return expert, pairs, tiles


@_jit
def _find_expert(block, blocks):
    """Expert that block number `block` belongs to, given blocks per expert, and its number within that expert.

    Past the last block the expert is EXPERTS, which no expert has as id.
    """
    ends = tl.cumsum(blocks, 0)
    past = ends <= block
    return tl.sum(past.to(tl.int32), 0), block - tl.max(tl.where(past, ends, 0), 0)


@_jit
def _find_rows(
    block, pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr
):
    """Which pairs a row block holds.

    Returns:
        expert (>= NUM_EXPERTS past the last block), its first tile and number of tiles; the first pair, and how many
        pairs of the expert are left from there; the place of the first pair's row in a buffer of neurons, in tiles.
        Tiles are multiplied by the constexpr g later, so that the compiler knows how rows are aligned.
    """
    experts, pairs, tiles = _load_experts(pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS)
    expert, block = _find_expert(block, (pairs + ROWS - 1) // ROWS)
    known = expert < NUM_EXPERTS
    first_tile = tl.load(tile_offsets_ptr + expert, known, 0)
    num_tiles = tl.load(tile_offsets_ptr + expert + 1, known, 0) - first_tile
    first_pair = tl.load(pair_offsets_ptr + expert, known, 0) + block * ROWS
    num_pairs = tl.load(pair_offsets_ptr + expert + 1, known, 0) - first_pair
    buffer_tile = tl.sum(tl.where(experts < expert, pairs * tiles, 0), 0) + block * ROWS * num_tiles
    # What may pass 2^31 stays 64 bits wide; indices within a block need not.
    return expert, first_tile, num_tiles.to(tl.int32), first_pair, num_pairs.to(tl.int32), buffer_tile


@_jit
def up_kernel(
    hidden_ptr,  # [T, H]
    order_ptr,  # [P]
    pair_offsets_ptr,  # [E + 1]
    tile_offsets_ptr,  # [E + 1]
    gate_up_ptr,  # [N, 2g, H]
    projected_ptr,  # [2 M], written if SAVE
    neurons_ptr,  # [M]
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    INNER: tl.constexpr,
):
    # Column blocks first: neighbouring programs share the tokens, and a wave of programs a few experts.
    block, column_block = tl.program_id(0) // COLUMN_BLOCKS, tl.program_id(0) % COLUMN_BLOCKS
    expert, first_tile, num_tiles, first_pair, num_pairs, buffer_tile = _find_rows(
        block, pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS, ROWS
    )
    width = num_tiles * TILE  # I
    if (expert >= NUM_EXPERTS) | (column_block * NEURONS >= width):
        return
    row = tl.arange(0, ROWS)
    live_row = row < num_pairs
    token = tl.load(order_ptr + first_pair + row, live_row, 0) // SLOTS
    neuron = column_block * NEURONS + tl.arange(0, NEURONS)
    live_neuron = neuron < width
    gate_row = neuron // TILE * (2 * TILE) + neuron % TILE  # of the expert's [2 I, H]; its up row is g further
    inner = tl.arange(0, INNER)
    x_ptr = hidden_ptr + token[:, None] * HIDDEN + inner[None, :]
    weight_ptr = gate_up_ptr + first_tile * (2 * TILE * HIDDEN) + gate_row[None, :] * HIDDEN + inner[:, None]
    gate = tl.zeros((ROWS, NEURONS), tl.float32)
    up = tl.zeros((ROWS, NEURONS), tl.float32)
    for start in range(0, HIDDEN, INNER):
        live = start + inner < HIDDEN
        x = tl.load(x_ptr + start, live_row[:, None] & live[None, :], 0.0)
        gate_weight = tl.load(weight_ptr + start, live[:, None] & live_neuron[None, :], 0.0)
        up_weight = tl.load(weight_ptr + TILE * HIDDEN + start, live[:, None] & live_neuron[None, :], 0.0)
        gate = _dot(x, gate_weight, gate, PRECISION, UPCAST)
        up = _dot(x, up_weight, up, PRECISION, UPCAST)

    dtype = neurons_ptr.dtype.element_ty
    mask = live_row[:, None] & live_neuron[None, :]
    if SAVE:
        saved_ptr = projected_ptr + buffer_tile * (2 * TILE) + row[:, None] * (2 * width) + gate_row[None, :]
        tl.store(saved_ptr, gate.to(dtype), mask)
        tl.store(saved_ptr + TILE, up.to(dtype), mask)
    value, _ = _activate(gate, ACTIVATION)
    tl.store(neurons_ptr + buffer_tile * TILE + row[:, None] * width + neuron[None, :], (value * up).to(dtype), mask)


@_jit
def project_kernel(
    values_ptr,  # [M] or [2 M]: rows of an expert's width I, or 2 I
    order_ptr,  # [P]
    pair_offsets_ptr,  # [E + 1]
    tile_offsets_ptr,  # [E + 1]
    bank_ptr,  # [N, g, H] or [N, 2g, H]
    weights_ptr,  # [P], read if WEIGHTED
    pair_rows_ptr,  # [P, H], in token and slot order
    COLUMN_BLOCKS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,  # rows of the bank per tile: g or 2g
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    block, column_block = tl.program_id(0) // COLUMN_BLOCKS, tl.program_id(0) % COLUMN_BLOCKS
    expert, first_tile, num_tiles, first_pair, num_pairs, buffer_tile = _find_rows(
        block, pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS, ROWS
    )
    if expert >= NUM_EXPERTS:
        return
    width = num_tiles * TILE
    row = tl.arange(0, ROWS)
    live_row = row < num_pairs
    pair = tl.load(order_ptr + first_pair + row, live_row, 0)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    live_column = column < HIDDEN
    inner = tl.arange(0, INNER)
    value_ptr = values_ptr + buffer_tile * TILE + row[:, None] * width + inner[None, :]
    weight_ptr = bank_ptr + first_tile * (TILE * HIDDEN) + inner[:, None] * HIDDEN + column[None, :]
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, INNER):
        live = start + inner < width
        value = tl.load(value_ptr + start, live_row[:, None] & live[None, :], 0.0)
        weight = tl.load(weight_ptr + start * HIDDEN, live[:, None] & live_column[None, :], 0.0)
        accumulator = _dot(value, weight, accumulator, PRECISION, UPCAST)
    if WEIGHTED:
        accumulator *= tl.load(weights_ptr + pair, live_row, 0.0).to(tl.float32)[:, None]
    tl.store(
        pair_rows_ptr + pair[:, None] * HIDDEN + column[None, :],
        accumulator.to(pair_rows_ptr.dtype.element_ty),
        live_row[:, None] & live_column[None, :],
    )


@_jit
def sum_slots_kernel(
    pair_rows_ptr,  # [P, H]
    index_ptr,  # [P], rows of unused slots were never written
    output_ptr,  # [T, H]
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = (tl.program_id(0) // COLUMN_BLOCKS).to(tl.int64)
    column = tl.program_id(0) % COLUMN_BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    live_column = column < HIDDEN
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        used = tl.load(index_ptr + pair) < NUM_EXPERTS
        total += tl.load(pair_rows_ptr + pair * HIDDEN + column, live_column & used, 0.0).to(tl.float32)
    tl.store(output_ptr + token * HIDDEN + column, total.to(output_ptr.dtype.element_ty), live_column)


@_jit
def grad_neurons_kernel(
    grad_output_ptr,  # [T, H]
    order_ptr,  # [P]
    pair_offsets_ptr,  # [E + 1]
    tile_offsets_ptr,  # [E + 1]
    down_ptr,  # [N, g, H]
    weights_ptr,  # [P]
    projected_ptr,  # [2 M]
    grad_projected_ptr,  # [2 M], written if GRAD_PROJECTED
    weighted_neurons_ptr,  # [M], written if WEIGHTED_NEURONS
    weight_parts_ptr,  # [P, COLUMN_BLOCKS], written if GRAD_WEIGHTS: sums over one block of neurons each
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GRAD_PROJECTED: tl.constexpr,
    WEIGHTED_NEURONS: tl.constexpr,
    GRAD_WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    INNER: tl.constexpr,
):
    block, column_block = tl.program_id(0) // COLUMN_BLOCKS, tl.program_id(0) % COLUMN_BLOCKS
    expert, first_tile, num_tiles, first_pair, num_pairs, buffer_tile = _find_rows(
        block, pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS, ROWS
    )
    width = num_tiles * TILE  # I
    if (expert >= NUM_EXPERTS) | (column_block * NEURONS >= width):
        return
    row = tl.arange(0, ROWS)
    live_row = row < num_pairs
    pair = tl.load(order_ptr + first_pair + row, live_row, 0)
    neuron = column_block * NEURONS + tl.arange(0, NEURONS)
    live_neuron = neuron < width
    mask = live_row[:, None] & live_neuron[None, :]
    inner = tl.arange(0, INNER)
    grad_ptr = grad_output_ptr + (pair // SLOTS)[:, None] * HIDDEN + inner[None, :]
    down_row_ptr = down_ptr + first_tile * (TILE * HIDDEN) + neuron[None, :] * HIDDEN + inner[:, None]
    grad_neurons = tl.zeros((ROWS, NEURONS), tl.float32)  # before the routing weight
    if GRAD_PROJECTED | GRAD_WEIGHTS:
        for start in range(0, HIDDEN, INNER):
            live = start + inner < HIDDEN
            grad = tl.load(grad_ptr + start, live_row[:, None] & live[None, :], 0.0)
            down = tl.load(down_row_ptr + start, live[:, None] & live_neuron[None, :], 0.0)
            grad_neurons = _dot(grad, down, grad_neurons, PRECISION, UPCAST)

    gate_column = neuron // TILE * (2 * TILE) + neuron % TILE  # of a row of 2 I; its up column is g further
    projected_offset = buffer_tile * (2 * TILE) + row[:, None] * (2 * width) + gate_column[None, :]
    gate = tl.load(projected_ptr + projected_offset, mask, 0.0).to(tl.float32)
    up = tl.load(projected_ptr + projected_offset + TILE, mask, 0.0).to(tl.float32)
    value, slope = _activate(gate, ACTIVATION)
    weight = tl.load(weights_ptr + pair, live_row, 0.0).to(tl.float32)[:, None]
    if GRAD_WEIGHTS:
        part = tl.sum(value * up * grad_neurons, 1)
        tl.store(weight_parts_ptr + pair * COLUMN_BLOCKS + column_block, part, live_row)
    if WEIGHTED_NEURONS:
        tl.store(
            weighted_neurons_ptr + buffer_tile * TILE + row[:, None] * width + neuron[None, :],
            (value * up * weight).to(weighted_neurons_ptr.dtype.element_ty),
            mask,
        )
    if GRAD_PROJECTED:
        dtype = grad_projected_ptr.dtype.element_ty
        grad_neurons *= weight
        tl.store(grad_projected_ptr + projected_offset, (grad_neurons * up * slope).to(dtype), mask)
        tl.store(grad_projected_ptr + projected_offset + TILE, (grad_neurons * value).to(dtype), mask)


@_jit
def bank_gradient_kernel(
    values_ptr,  # [M] or [2 M]: rows of an expert's width I, or 2 I
    token_rows_ptr,  # [T, H]
    order_ptr,  # [P]
    pair_offsets_ptr,  # [E + 1]
    tile_offsets_ptr,  # [E + 1]
    grad_bank_ptr,  # [N, g, H] or [N, 2g, H]
    COLUMN_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,  # rows of the bank per tile: g or 2g
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    # One program per block of the bank sums over all pairs of the expert: deterministic, and zero without pairs.
    block, column_block = tl.program_id(0) // COLUMN_BLOCKS, tl.program_id(0) % COLUMN_BLOCKS
    experts, pairs, tiles = _load_experts(pair_offsets_ptr, tile_offsets_ptr, NUM_EXPERTS, EXPERTS)
    expert, row_block = _find_expert(block, (tiles * TILE + ROWS - 1) // ROWS)
    first_tile = tl.load(tile_offsets_ptr + expert)
    width = (tl.load(tile_offsets_ptr + expert + 1) - first_tile) * TILE
    first_pair = tl.load(pair_offsets_ptr + expert)
    num_pairs = (tl.load(pair_offsets_ptr + expert + 1) - first_pair).to(tl.int32)
    buffer_tile = tl.sum(tl.where(experts < expert, pairs * tiles, 0), 0)

    row = row_block * ROWS + tl.arange(0, ROWS)
    live_row = row < width
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    live_column = column < HIDDEN
    inner = tl.arange(0, INNER)
    value_ptr = values_ptr + buffer_tile * TILE + inner[:, None] * width + row[None, :]
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_pairs, INNER):
        live = start + inner < num_pairs
        token = tl.load(order_ptr + first_pair + start + inner, live, 0) // SLOTS
        value = tl.load(value_ptr + start * width, live[:, None] & live_row[None, :], 0.0)
        token_row = tl.load(
            token_rows_ptr + token[:, None] * HIDDEN + column[None, :], live[:, None] & live_column[None, :], 0.0
        )
        accumulator = _dot(tl.trans(value), token_row, accumulator, PRECISION, UPCAST)
    tl.store(
        grad_bank_ptr + first_tile * (TILE * HIDDEN) + row[:, None] * HIDDEN + column[None, :],
        accumulator.to(grad_bank_ptr.dtype.element_ty),
        live_row[:, None] & live_column[None, :],
    )


# Chosen by TRITON_INTERPRET when triton decorates the kernels: they then run on CPU tensors, slowly.
INTERPRETED = triton is not None and not isinstance(up_kernel, triton.JITFunction)
