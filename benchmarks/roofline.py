"""What bounds the layer of experts on an H100: FLOPs and bytes of each kernel, by arithmetic. Nothing is run.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --presets hmoe-3b --tokens 64 4096 --kernels --json roofline.json

Compared, for one layer in bf16 with the routing weights in fp32 and an equal load:

    hmoe triton            the kernels of `hmoe/triton_hmoe.py`
    mixtral grouped_mm     Transformers' `grouped_mm_experts_forward` on equal experts of the mean size, hence with the
                           same FLOPs, kernel by kernel as PyTorch runs it eagerly

A kernel takes the longer of FLOPs / peak and bytes / bandwidth, and a pass the sum of its kernels: what ideal kernels
would take, not a prediction. Every operand counts once per kernel, so caches are taken to be perfect within a kernel
and useless between kernels. Sorting the pairs, a few bytes for each, is left out for both.

Peak and bandwidth are those of NVIDIA's datasheet of the H100 SXM ("NVIDIA H100 Tensor Core GPU"): 1,979 TFLOP/s in
bf16 with sparsity, hence 989 without, and 3.35 TB/s.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timing import Row, markdown_table, write_json

from hmoe import HMoEConfig


PEAK_FLOPS = 989e12
BYTES_PER_SECOND = 3.35e12
HALF, FULL, ID = 2, 4, 8  # bytes of a bf16 number, an fp32 number and an id


@dataclass(frozen=True)
class Kernel:
    """One launch: floating-point operations of its products, bytes read and written."""

    name: str
    flops: float
    read: float
    written: float

    @property
    def seconds(self) -> float:
        return max(self.flops / PEAK_FLOPS, (self.read + self.written) / BYTES_PER_SECOND)

    @property
    def bound_by_compute(self) -> bool:
        return self.flops / PEAK_FLOPS > (self.read + self.written) / BYTES_PER_SECOND


@dataclass(frozen=True)
class Layer:
    """Expected counts of one layer at equal load: every expert is as likely in a slot, none twice in a token.

    Attributes:
        tokens, hidden, slots: T, H, K.
        sizes: neurons of each expert.
    """

    tokens: int
    hidden: int
    slots: int
    sizes: Sequence[int]

    @property
    def pairs(self) -> int:
        return self.tokens * self.slots

    @property
    def neurons(self) -> float:
        """Sum over pairs of the size of their expert."""
        return self.pairs * sum(self.sizes) / len(self.sizes)

    @property
    def row(self) -> int:
        """Bytes of a token."""
        return self.hidden * HALF

    @property
    def down_bytes(self) -> int:
        return sum(self.sizes) * self.row

    @property
    def activated(self) -> float:
        """Expected share of the experts that some token activates: the weights that are read."""
        return 1 - (1 - self.slots / len(self.sizes)) ** self.tokens


def triton_kernels(layer: Layer) -> tuple[list[Kernel], list[Kernel], float]:
    """Kernels of forward and backward, and the bytes kept in between."""
    flops = 2 * layer.neurons * layer.hidden  # of one product over all pairs and neurons
    neurons, pair_rows, token_rows = layer.neurons * HALF, layer.pairs * layer.row, layer.tokens * layer.row
    down = layer.down_bytes * layer.activated
    sum_slots = Kernel("sum of slots", 0, pair_rows, token_rows)
    forward = [
        Kernel("up", 2 * flops, pair_rows + 2 * down, 3 * neurons),
        Kernel("down", flops, neurons + down, pair_rows),
        sum_slots,
    ]
    backward = [
        Kernel("gradient of neurons", flops, pair_rows + down + 2 * neurons, 3 * neurons),
        Kernel("gradient of down_proj", flops, neurons + pair_rows, layer.down_bytes),
        Kernel("gradient of gate_up_proj", 2 * flops, 2 * neurons + pair_rows, 2 * layer.down_bytes),
        Kernel("gradient of pair rows", 2 * flops, 2 * neurons + 2 * down, pair_rows),
        sum_slots,
    ]
    # Gate and up, in a buffer that is large enough for any routing; ids, the order of the pairs, and routing weights.
    kept = 2 * layer.pairs * max(layer.sizes) * HALF + layer.pairs * (2 * ID + FULL)
    return forward, backward, kept


def stock_kernels(layer: Layer) -> tuple[list[Kernel], list[Kernel], float]:
    """The same of `grouped_mm_experts_forward` on equal experts; its rows are the (token, slot) pairs."""
    flops = 2 * layer.neurons * layer.hidden
    row_bytes, token_rows = layer.pairs * layer.row, layer.tokens * layer.row
    neurons = layer.neurons * HALF
    down = layer.down_bytes * layer.activated

    def elementwise(name: str, read: float, written: float) -> Kernel:
        return Kernel(name, 0, read, written)

    forward = [
        elementwise("gather of tokens", row_bytes, row_bytes),
        Kernel("up", 2 * flops, row_bytes + 2 * down, 2 * neurons),
        elementwise("activation", neurons, neurons),
        elementwise("activation * up", 2 * neurons, neurons),
        Kernel("down", flops, neurons + down, row_bytes),
        elementwise("routing weights", row_bytes, 2 * row_bytes),  # fp32 from here
        elementwise("original order", 2 * row_bytes, 2 * row_bytes),
        elementwise("sum of slots", 2 * row_bytes, 2 * token_rows),
        elementwise("cast", 2 * token_rows, token_rows),
    ]
    backward = [
        elementwise("cast", token_rows, 2 * token_rows),
        elementwise("zeros", 0, 2 * row_bytes),
        elementwise("sorted order", 2 * row_bytes, 2 * row_bytes),
        elementwise("gradient of outputs", 2 * row_bytes, row_bytes),
        elementwise("gradient of weights, products", 3 * row_bytes, 2 * row_bytes),
        elementwise("gradient of weights, sum", 2 * row_bytes, 0),
        Kernel("gradient of neurons", flops, row_bytes + down, neurons),
        Kernel("gradient of down_proj", flops, neurons + row_bytes, layer.down_bytes),
        elementwise("gradient of up", 2 * neurons, neurons),
        elementwise("gradient of the activation's value", 2 * neurons, neurons),
        elementwise("gradient of gate", 2 * neurons, neurons),
        elementwise("gate and up together", 2 * neurons, 2 * neurons),
        Kernel("gradient of gathered tokens", 2 * flops, 2 * neurons + 2 * down, row_bytes),
        Kernel("gradient of gate_up_proj", 2 * flops, 2 * neurons + row_bytes, 2 * layer.down_bytes),
        elementwise("scatter to tokens", row_bytes, token_rows),
    ]
    # Gathered tokens; gate and up; act(gate); neurons; outputs; ids of both orders and routing weights of the rows.
    kept = 2 * row_bytes + 4 * neurons + layer.pairs * (2 * ID + FULL)
    return forward, backward, kept


def totals(kernels: Sequence[Kernel]) -> Row:
    seconds = sum(kernel.seconds for kernel in kernels)
    return {
        "gflop": sum(kernel.flops for kernel in kernels) / 1e9,
        "megabytes": sum(kernel.read + kernel.written for kernel in kernels) / 1e6,
        "microseconds": seconds * 1e6,
        "compute_bound": sum(kernel.seconds for kernel in kernels if kernel.bound_by_compute) / seconds,
    }


def analyse(preset: str, num_tokens: int) -> list[Row]:
    """A row for each way to compute the first layer of a preset."""
    config = HMoEConfig.from_preset(preset)
    layer = Layer(
        tokens=num_tokens,
        hidden=config.hidden_size,
        slots=config.num_experts_per_tok,
        sizes=config.layer_expert_sizes[0],
    )
    contenders = {
        "hmoe triton": triton_kernels(layer),
        "mixtral grouped_mm": stock_kernels(layer),
    }
    return [
        {
            "preset": preset,
            "tokens": num_tokens,
            "contender": name,
            "forward": totals(forward),
            "backward": totals(backward),
            "kept_megabytes": kept / 1e6,
            "kernels": {
                "forward": [vars(kernel) | {"microseconds": kernel.seconds * 1e6} for kernel in forward],
                "backward": [vars(kernel) | {"microseconds": kernel.seconds * 1e6} for kernel in backward],
            },
        }
        for name, (forward, backward, kept) in contenders.items()
    ]


def show_bound(part: Row) -> str:
    share = part["compute_bound"]
    return "memory" if share == 0 else "compute" if share == 1 else f"compute {share:.0%}"


def layer_table(rows: Sequence[Row]) -> str:
    columns = {name: name for name in ("preset", "tokens", "contender")}
    formats = {"gflop": "GFLOP", "megabytes": "MB", "microseconds": "us"}
    for part in ("forward", "backward"):
        for key, unit in formats.items():
            columns[f"{part} {unit}"] = lambda row, part=part, key=key: f"{row[part][key]:,.0f}"
        columns[f"{part} bound by"] = lambda row, part=part: show_bound(row[part])
    columns["kept MB"] = lambda row: f"{row['kept_megabytes']:,.0f}"
    return markdown_table(rows, columns)


def kernel_table(rows: Sequence[Row]) -> str:
    flat = [
        {"preset": row["preset"], "tokens": row["tokens"], "contender": row["contender"], "pass": part, **kernel}
        for row in rows
        for part, kernels in row["kernels"].items()
        for kernel in kernels
    ]
    columns = {name: name for name in ("preset", "tokens", "contender", "pass")}
    columns["kernel"] = "name"
    columns["GFLOP"] = lambda kernel: f"{kernel['flops'] / 1e9:,.1f}"
    columns["MB read"] = lambda kernel: f"{kernel['read'] / 1e6:,.1f}"
    columns["MB written"] = lambda kernel: f"{kernel['written'] / 1e6:,.1f}"
    columns["us"] = lambda kernel: f"{kernel['microseconds']:,.1f}"
    return markdown_table(flat, columns)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["hmoe-0.4b", "hmoe-3b"], help="of HMoEConfig.from_preset")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 1024, 16384, 65536], help="per device")
    parser.add_argument("--kernels", action="store_true", help="a second table, of the single kernels")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args(arguments)
    rows = [row for preset in options.presets for tokens in options.tokens for row in analyse(preset, tokens)]
    print(layer_table(rows))
    if options.kernels:
        print()
        print(kernel_table(rows))
    if options.json:
        write_json(options.json, "roofline", options, rows, peak_flops=PEAK_FLOPS, bytes_per_second=BYTES_PER_SECOND)


if __name__ == "__main__":
    main()
