"""One layer of experts: our backends, the stock Mixtral layer, a loop over modules, and the limit.

    python benchmarks/experts.py --json docs/performance/experts.json             # the default grid
    python benchmarks/experts.py --experts 8 64 --tokens 1 16 --pass forward      # every combination of these
    python benchmarks/experts.py --tokens 4096 --pass forward+backward --rounds 30 --seconds 300
    python benchmarks/experts.py --full                                           # every combination of all (hours)

The limit is `dense`: one gated FFN that does the same FLOPs, its width the neurons that a token activates on average,
gate and up in one product; `dense_split` has them apart, as Llama's.
`mixtral` has the same number of experts and the same total width in equal experts, and gets the same expert ids.
`module_list` is a loop over one gated FFN per expert, of the sizes of `hmoe`. With `uniform` routing every expert gets
the same number of tokens, so that all contenders do the same FLOPs; with `zipf` the i-th most popular expert is drawn
with weight 1 / i (popularity does not depend on size), and with `random` all with the same. Where FLOPs differ,
`cost per FLOP` is the ratio of times over that of FLOPs.

For few tokens a pass goes through several layers (`--layers`) and routings, so that the activated weights are not in
the CPU's L2 cache, as in a model of many layers; `read` sums buffers of as many bytes as the activated experts have
and `copy` copies them, in the same order. Saved bytes are those of the tensors kept for backward, without parameters;
peak memory is the growth of resident memory over weights and inputs, in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import timing
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hmoe import HMoEConfig, expert_sizes
from hmoe.experts_hmoe import EXPERTS_IMPLEMENTATIONS, HMoEExperts
from hmoe.routers import tokens_per_expert


DTYPES = ("float32", "bfloat16")
SIZES = ("arithmetic", "hybrid", "pairs", "uniform")
ROUTINGS = ("uniform", "random", "zipf")
PASSES = ("forward", "forward+backward")
EXPERTS = (8, 64, 256)
TOKENS = (1, 16, 256, 4096)

HMOE = tuple(f"hmoe {name}" for name in EXPERTS_IMPLEMENTATIONS if name != "triton")
MIXTRAL = tuple(f"mixtral {name}" for name in ("eager", "batched_mm", "grouped_mm"))
BANDWIDTH = ("read", "copy")
DENSE = ("dense", "dense_split")
CONTENDERS = (*HMOE, *MIXTRAL, "module_list", *DENSE)

FEW_TOKENS = 16  # up to here reading the weights is the bound
MAX_COPIED_BYTES = 2**30  # of weights copied by a backend that gathers them for every token


@dataclass(frozen=True)
class Point:
    """What is compared.

    Attributes:
        total: neurons of all experts together.
        spread: largest / smallest size, for arithmetic and geometric sizes (None: the strategy's own).
        multiple_of: of which every size is a multiple (None: a sixteenth of the mean, at least 8).
    """

    experts: int = 8
    tokens: int = 4096
    dtype: str = "float32"
    sizes: str = "arithmetic"
    routing: str = "uniform"
    backward: bool = True
    hidden: int = 512
    total: int = 8192
    top_k: int = 2
    spread: float | None = None
    multiple_of: int | None = None
    layers: int = 1

    def __post_init__(self) -> None:
        if self.experts % self.top_k:
            raise ValueError(f"the number of experts must be a multiple of {self.top_k}, got {self.experts}")
        if self.total % self.experts:
            raise ValueError(f"the number of experts must divide the total width {self.total}, got {self.experts}")
        self.widths()

    def widths(self) -> list[int]:
        mean = self.total // self.experts
        multiple_of = self.multiple_of or math.gcd(max(8, mean // 16), mean)
        return expert_sizes(self.sizes, self.experts, self.total, multiple_of=multiple_of, spread=self.spread)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        direction = PASSES[self.backward]
        return f"E={self.experts} T={self.tokens} {self.dtype} {self.sizes} {self.routing} {direction}"


class DenseFFN(nn.Module):
    """A gated FFN with gate and up in one product. Further inputs are ignored."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden_states: Tensor, *_: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class SplitFFN(nn.Module):
    """The same with separate gate and up projections."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, hidden_states: Tensor, *_: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_states)) * self.up(hidden_states))


class ModuleListExperts(nn.Module):
    """What one writes first: one module per expert, in a loop."""

    def __init__(self, hidden: int, widths: Sequence[int]):
        super().__init__()
        self.experts = nn.ModuleList(SplitFFN(hidden, width) for width in widths)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert, ffn in enumerate(self.experts):
            token, slot = torch.where(top_k_index == expert)
            if len(token):
                weighted = ffn(hidden_states[token]) * top_k_weights[token, slot, None]
                output.index_add_(0, token, weighted.to(output.dtype))
        return output


class Comparison:
    """The contenders of a point: their modules, made when first asked for, and their calls."""

    def __init__(self, point: Point):
        self.point, self.widths = point, point.widths()
        generator = torch.Generator().manual_seed(0)
        # One pass over `calls` reads every expert of every layer once, where that is not too much.
        deck = math.ceil(point.experts / (point.tokens * point.top_k))
        calls = max(point.layers, min(point.layers * deck, 8 if point.backward else 64))
        self.index = make_routing(point, calls, generator)
        self.hidden_states = torch.randn(point.tokens, point.hidden, generator=generator).to(point.torch_dtype)
        self.weights = torch.rand(point.tokens, point.top_k, generator=generator)
        self.weights /= self.weights.sum(-1, keepdim=True)
        self.grad_output = torch.randn(self.hidden_states.shape, generator=generator).to(point.torch_dtype)
        if point.backward:
            self.hidden_states.requires_grad_()
            self.weights.requires_grad_()

    def contender(self, name: str) -> Callable[[], object]:
        """One pass over all calls."""
        if name in BANDWIDTH:
            return self._bandwidth(name)
        calls = [self.call(name, number) for number in range(len(self.index))]

        def run() -> None:
            for call in calls:
                call()

        return run

    def call(self, name: str, number: int = 0, tokens: int | None = None) -> Callable[[], object]:
        """Forward, and backward if the point says so, of one module; its gradients are returned, not accumulated."""
        module = self.modules(name)[number % len(self.modules(name))]
        inputs = [tensor[:tokens] for tensor in (self.hidden_states, self.index[number], self.weights)]
        if not self.point.backward:
            return torch.no_grad()(lambda: module(*inputs))
        leaves = [inputs[0], inputs[2], *module.parameters()]
        grad_output = self.grad_output[:tokens]
        return lambda: torch.autograd.grad(module(*inputs), leaves, grad_output, allow_unused=True)

    def saved_bytes(self, name: str) -> int:
        module, inputs = self.modules(name)[0], (self.hidden_states, self.index[0], self.weights)
        return timing.saved_bytes(lambda: module(*inputs), list(module.parameters()))

    def modules(self, name: str) -> list[nn.Module]:
        if name in DENSE:
            return self._dense[name]
        if name == "module_list":
            return self._module_list
        family, backend = name.split()
        return [with_backend(layer, backend) for layer in (self._hmoe if family == "hmoe" else self._mixtral)]

    @cached_property
    def _hmoe(self) -> list[nn.Module]:
        config = HMoEConfig(
            hidden_size=self.point.hidden,
            num_hidden_layers=1,
            num_attention_heads=1,
            expert_intermediate_sizes=self.widths,
            num_experts_per_tok=self.point.top_k,
        )
        return [self._initialized(HMoEExperts(config, 0)) for _ in range(self.point.layers)]

    @cached_property
    def _mixtral(self) -> list[nn.Module]:
        config = MixtralConfig(
            hidden_size=self.point.hidden,
            intermediate_size=self.point.total // self.point.experts,
            num_local_experts=self.point.experts,
            num_experts_per_tok=self.point.top_k,
        )
        return [self._initialized(MixtralExperts(config)) for _ in range(self.point.layers)]

    @cached_property
    def _module_list(self) -> list[nn.Module]:
        layers = [ModuleListExperts(self.point.hidden, self.widths) for _ in range(self.point.layers)]
        return [self._initialized(layer) for layer in layers]

    @cached_property
    def _dense(self) -> dict[str, list[nn.Module]]:
        """One module per call: every routing has a width of its own."""
        modules = {}
        for name, make in zip(DENSE, (DenseFFN, SplitFFN)):
            layers = [make(self.point.hidden, width) for width in self._dense_widths()]
            modules[name] = [self._initialized(layer) for layer in layers]
        return modules

    def _dense_widths(self) -> list[int]:
        return [dense_width(neurons) for neurons in self._activated_neurons(self.widths)]

    def _initialized(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        return module.to(self.point.torch_dtype)

    def _bandwidth(self, name: str) -> Callable[[], object]:
        buffers = [torch.ones(num_bytes // 4) for num_bytes in self.activated_bytes()]
        target = torch.ones(max(map(len, buffers)))

        def run() -> None:
            for buffer in buffers:
                if name == "read":
                    buffer.sum()
                else:
                    target[: len(buffer)].copy_(buffer)

        return run

    def activated_bytes(self) -> list[int]:
        """Bytes of the weights of the distinct experts that each call activates."""
        size = 3 * self.point.hidden * self.point.torch_dtype.itemsize
        return [size * sum(self.widths[expert] for expert in index.unique()) for index in self.index]

    def _activated_neurons(self, widths: Sequence[int]) -> list[float]:
        """Of each call: neurons that a token activates, on average."""
        counts = [tokens_per_expert(index, len(widths)).tolist() for index in self.index]
        return [sum(count * width for count, width in zip(row, widths)) / self.point.tokens for row in counts]

    def gflops(self, name: str) -> float | None:
        """Of one pass, products alone (a product's backward is two)."""
        if name in BANDWIDTH:
            return None
        if name in DENSE:
            neurons = list(map(float, self._dense_widths()))
        elif name.startswith("mixtral"):
            neurons = self._activated_neurons([self.point.total // self.point.experts] * self.point.experts)
        else:
            neurons = self._activated_neurons(self.widths)
        per_neuron = 2 * 3 * self.point.hidden * self.point.tokens * (3 if self.point.backward else 1)
        return sum(neurons) * per_neuron / 1e9

    def reason_to_skip(self, name: str) -> str | None:
        if name.endswith("batched_mm"):
            # On tiles every expert is padded to the widest.
            width = max(self.widths) if name.startswith("hmoe") else self.point.total // self.point.experts
            copied = self.point.tokens * self.point.top_k * 3 * width * self.point.hidden
            copied *= self.point.torch_dtype.itemsize
            if copied > MAX_COPIED_BYTES:
                return f"would copy {copied / 2**30:.1f} GiB of weights"
        return None


def with_backend(layer: nn.Module, backend: str) -> nn.Module:
    """The same parameters under a config of its own."""
    twin = copy.copy(layer)
    twin.config = copy.copy(layer.config)
    twin.config._experts_implementation = backend
    return twin


def dense_width(neurons: float) -> int:
    """A width that vectors divide, as near as it gets."""
    step = 16 if neurons >= 512 else 8
    return max(step, round(neurons / step) * step)


def make_routing(point: Point, calls: int, generator: torch.Generator) -> list[Tensor]:
    """Expert ids [T, K] of each call, those of a token distinct."""
    rows = calls * point.tokens
    if point.routing == "uniform":
        # Dealt from shuffled decks of all experts: loads differ by one at most.
        decks = math.ceil(rows * point.top_k / point.experts)
        cards = torch.cat([torch.randperm(point.experts, generator=generator) for _ in range(decks)])
        index = cards[: rows * point.top_k].view(rows, point.top_k)
    else:
        logits = torch.zeros(point.experts)
        if point.routing == "zipf":
            ranks = torch.randperm(point.experts, generator=generator) + 1
            logits = -ranks.float().log()
        uniform = torch.rand(rows, point.experts, generator=generator)
        gumbel = -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()  # the K largest: draws without replacement
        index = (logits + gumbel).topk(point.top_k, dim=-1).indices
    return list(index.view(calls, point.tokens, point.top_k))


def make_peak(point: Point, name: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """For `timing.peak_bytes`: a call on one token, and the whole."""
    comparison = Comparison(replace(point, layers=1))
    call = comparison.call(name)
    one_token = [tensor[:1].detach() for tensor in (comparison.hidden_states, comparison.index[0], comparison.weights)]
    module = comparison.modules(name)[0]
    return torch.no_grad()(lambda: module(*one_token)), call


def measure(
    point: Point,
    contenders: Sequence[str],
    *,
    rounds: int,
    max_seconds: float,
    memory: bool = False,
) -> list[timing.Row]:
    """One row per contender. Ratios are to `dense`, to the fastest stock backend and, for few tokens, to `read`."""
    comparison = Comparison(point)
    if point.tokens <= FEW_TOKENS and not point.backward:
        contenders = [*contenders, *BANDWIDTH]
    reasons = {name: comparison.reason_to_skip(name) for name in contenders}
    calls = {name: comparison.contender(name) for name, reason in reasons.items() if reason is None}
    samples = timing.interleave(calls, rounds, max_seconds=max_seconds)
    baselines = {
        "ratio": "dense" if "dense" in calls else None,
        "ratio_to_stock": timing.fastest(samples, MIXTRAL),
        "ratio_to_read": "read" if "read" in calls else None,
    }
    ratios = {key: timing.ratios(samples, base) for key, base in baselines.items() if base}
    dense_gflops = comparison.gflops("dense")
    rows = []
    for name, reason in reasons.items():
        row = {**asdict(point), "widest": max(comparison.widths), "narrowest": min(comparison.widths)}
        row |= {"pass": PASSES[point.backward], "calls": len(comparison.index), "contender": name}
        if reason:
            rows.append({**row, "skipped": reason})
            continue
        gflops = comparison.gflops(name)
        row |= {"milliseconds": 1000 * statistics.median(samples[name]) / len(comparison.index), "gflops": gflops}
        row |= {key: values[name] for key, values in ratios.items()}
        row |= {"stock": baselines["ratio_to_stock"], "rounds": len(samples[name])}
        if gflops and "ratio" in row:
            row["cost_per_flop"] = {key: value * dense_gflops / gflops for key, value in row["ratio"].items()}
        if name in BANDWIDTH:
            gigabytes = sum(comparison.activated_bytes()) / 1e9
            row["gigabytes_per_second"] = gigabytes / statistics.median(samples[name])
        if point.backward:
            row["saved_mib"] = comparison.saved_bytes(name) / 2**20
        if memory and name not in BANDWIDTH:
            row["peak_mib"] = timing.peak_bytes(make_peak, point, name) / 2**20
        rows.append(row)
    return rows


def default_grid() -> list[Point]:
    """Experts x tokens in fp32, and every other factor alone."""
    products = itertools.product(EXPERTS, TOKENS, (False, True))
    points = [Point(experts=e, tokens=t, backward=b) for e, t, b in products]
    points += [Point(dtype="bfloat16", tokens=t, backward=b) for t, b in ((1, False), (16, False), (4096, False))]
    points += [Point(dtype="bfloat16"), Point(dtype="bfloat16", experts=64)]
    points += [Point(sizes=sizes) for sizes in SIZES[1:]]
    points += [Point(routing="zipf"), Point(routing="zipf", experts=64)]
    return points


def chosen_grid(options: argparse.Namespace) -> list[Point]:
    names = ("experts", "tokens", "dtype", "sizes", "routing", "passes")
    given = {name: getattr(options, name) for name in names}
    if options.full:
        everything = (EXPERTS, TOKENS, DTYPES, SIZES, ("uniform", "zipf"), PASSES)
        given = {name: given[name] or list(values) for name, values in zip(names, everything)}
    elif not any(given.values()):
        points = default_grid()
        return [replace(point, layers=num_layers(options, point)) for point in points]
    given["passes"] = given["passes"] or list(PASSES)
    base = Point()
    lists = [given[name] or [getattr(base, name)] for name in names[:-1]]
    points = []
    for e, t, dtype, sizes, routing, direction in itertools.product(*lists, given["passes"]):
        point = Point(e, t, dtype, sizes, routing, direction == PASSES[1], hidden=options.hidden, total=options.total)
        points.append(replace(point, layers=num_layers(options, point)))
    return points


def num_layers(options: argparse.Namespace, point: Point) -> int:
    return options.layers or (1 if point.tokens > FEW_TOKENS else 2)


COLUMNS: dict[str, str | Callable[[timing.Row], str]] = {
    "experts": "experts",
    "tokens": "tokens",
    "dtype": "dtype",
    "sizes": "sizes",
    "routing": "routing",
    "pass": "pass",
    "contender": "contender",
    "ms": lambda row: row.get("skipped") or f"{row['milliseconds']:.3g}",
    "time / dense": lambda row: timing.show_spread(row.get("ratio")),
    "cost per FLOP / dense": lambda row: timing.show_spread(row.get("cost_per_flop")),
    "time / fastest stock": lambda row: timing.show_spread(row.get("ratio_to_stock")),
    "time / read": lambda row: timing.show_spread(row.get("ratio_to_read")),
    "saved MiB": "saved_mib",
    "peak MiB": "peak_mib",
    "rounds": "rounds",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = timing.make_parser(__doc__, rounds=11, seconds=8)
    parser.add_argument("--experts", type=timing.positive_int, nargs="+")
    parser.add_argument("--tokens", type=timing.positive_int, nargs="+")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+")
    parser.add_argument("--sizes", choices=SIZES, nargs="+")
    parser.add_argument("--routing", choices=ROUTINGS, nargs="+")
    parser.add_argument("--pass", dest="passes", choices=PASSES, nargs="+")
    parser.add_argument("--full", action="store_true", help="all values of every factor that is not given")
    parser.add_argument("--hidden", type=timing.positive_int, default=512)
    parser.add_argument("--total", type=timing.positive_int, default=8192, help="neurons of all experts together")
    parser.add_argument("--layers", type=timing.positive_int, help="default: 2 up to 16 tokens, else 1")
    parser.add_argument("--contenders", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    parser.add_argument("--no_memory", action="store_true", help="do not measure peak memory")
    options = parser.parse_args(argv)
    try:
        options.points = chosen_grid(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    points = options.__dict__.pop("points")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[timing.Row] = []
    bar = timing.progress(points, "experts")
    for point in bar:
        bar.set_postfix_str(str(point))
        # The targets stand at the base point, and memory is a matter of many tokens.
        is_base = replace(point, layers=1) == Point()
        plain = point.dtype == "float32" and point.sizes == "arithmetic" and point.routing == "uniform"
        memory = point.backward and point.tokens >= 1024 and (plain or options.full) and not options.no_memory
        seconds = options.seconds * (20 if is_base else 1)
        found = measure(point, options.contenders, rounds=options.rounds, max_seconds=seconds, memory=memory)
        table = timing.markdown_table(found, COLUMNS)
        bar.write(table if not rows else table.split("\n", 2)[2])
        rows += found
    if options.json:
        timing.write_json(options.json, "experts", options, rows)


if __name__ == "__main__":
    main()
