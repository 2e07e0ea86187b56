"""Random shapes and routings: every backend of the experts against dense fp64, output and all gradients.

    python benchmarks/soak.py --shapes 10000 --minutes 60
    python benchmarks/soak.py --seed 1234 --shapes 1           # one shape again, by the seed of its failure

Drawn at random: experts, sizes, tile, hidden size, tokens, slots per token, dtype, activation, routing (even, skewed,
all tokens on the same experts, idle experts, unused slots, no slot used at all), and which of the four inputs need
gradients. Fresh memory is filled with NaN, so that reading what was never written shows. Exits with 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import timing
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from hmoe import HMoEConfig
from hmoe.experts_hmoe import EXPERTS_IMPLEMENTATIONS, HMoEExperts


# Relative to the norm of a tensor plus a tenth of what its elements are made of (see `allowed_error`).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps}
BACKENDS = [name for name in EXPERTS_IMPLEMENTATIONS if name != "triton"]
MAX_COPIED = 10**6  # elements of weights or tokens
ROUTINGS = ("even", "skewed", "same", "idle", "partly_unused", "unused")


@dataclass(frozen=True)
class Shape:
    """One random layer with its inputs; equal seeds give equal tensors."""

    seed: int
    sizes: list[int]
    tile: int
    hidden: int
    tokens: int
    slots: int
    dtype: torch.dtype
    router_dtype: torch.dtype
    activation: str
    routing: str
    trained: tuple[str, ...]

    @classmethod
    def draw(cls, seed: int) -> Shape:
        rng = random.Random(seed)
        tile = rng.choice([1, 2, 3, 4, 5, 8, 16, 32])
        num_experts = rng.choice([1, 2, 3, 4, 5, 8, 8, 13, 16, 40])
        most = rng.choice([1, 4, 4, 12])
        sizes = [tile * rng.randint(1, most) for _ in range(num_experts)]
        if rng.random() < 0.05:
            sizes[rng.randrange(num_experts)] = tile * (rng.choice([1100, 2048]) // tile)
        dtype = rng.choice([torch.float32] * 3 + [torch.float64, torch.bfloat16])
        # Rounding moves a gate across the kink of ReLU.
        activations = ["silu", "silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"]
        activations += ["relu"] * 2 if dtype == torch.float64 else []
        inputs = ("hidden_states", "weights", "gate_up_proj", "down_proj")
        trained = inputs if rng.random() < 0.6 else tuple(rng.sample(inputs, rng.randint(1, 3)))
        return cls(
            seed=seed,
            sizes=sizes,
            tile=tile,
            hidden=8 * rng.choice([1, 2, 2, 3, 4, 8, 9]),
            tokens=rng.choice([0, 1, 2, 3, 5, 8, 16, 33, 64, 150]),
            slots=rng.randint(1, min(num_experts, 6)),
            dtype=dtype,
            router_dtype=rng.choice([dtype, torch.promote_types(dtype, torch.float32)]),
            activation=rng.choice(activations),
            routing=rng.choice(ROUTINGS),
            trained=trained,
        )

    def fits(self, backend: str) -> bool:
        """Whether the backend does not copy so many weights that the soak would stand still."""
        return backend != "batched_mm" or self.tokens * self.slots * max(self.sizes) * 3 * self.hidden <= MAX_COPIED

    def make_experts(self, generator: torch.Generator) -> HMoEExperts:
        config = HMoEConfig(
            hidden_size=self.hidden,
            num_attention_heads=1,
            num_hidden_layers=1,
            expert_intermediate_sizes=self.sizes,
            expert_tile_size=self.tile,
            num_experts_per_tok=1,
            hidden_act=self.activation,
        )
        experts = HMoEExperts(config, 0)
        with torch.no_grad():
            experts.gate_up_proj.normal_(std=self.hidden**-0.5, generator=generator)
            experts.down_proj.normal_(std=(sum(self.sizes) / len(self.sizes)) ** -0.5, generator=generator)
        return experts.to(self.dtype)

    def make_inputs(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [T, H], expert ids [T, K] and weights [T, K]; ids of a token are distinct."""
        num_experts = len(self.sizes)
        scores = torch.rand(self.tokens, num_experts, generator=generator)
        order = torch.randperm(num_experts, generator=generator)
        if self.routing == "skewed":
            scores += 0.3 * torch.arange(num_experts)[order]
        elif self.routing == "same":
            scores += 10 * torch.arange(num_experts)[order]
        elif self.routing == "idle":
            scores[:, order[: num_experts - self.slots]] -= 10
        index = scores.topk(self.slots, dim=-1).indices
        weights = torch.rand(self.tokens, self.slots, generator=generator) + 0.1
        unused = torch.rand(self.tokens, self.slots, generator=generator) < 0.5
        if self.routing == "unused":
            unused.fill_(True)
        if self.routing in ("partly_unused", "unused"):
            index, weights = index.masked_fill(unused, num_experts), weights.masked_fill(unused, 0)
        hidden_states = torch.randn(self.tokens, self.hidden, generator=generator)
        return hidden_states.to(self.dtype), index, weights.to(self.router_dtype)


def check(shape: Shape) -> Iterator[str]:
    """Names the tensors of each backend that differ from the reference, with the error over what is allowed."""
    generator = torch.Generator().manual_seed(shape.seed)
    experts = shape.make_experts(generator)
    hidden_states, index, weights = shape.make_inputs(generator)
    grad_output = torch.randn(hidden_states.shape, generator=generator).to(shape.dtype)
    leaves = {"hidden_states": hidden_states, "weights": weights, **dict(experts.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in shape.trained)
    expected = reference(shape, {name: leaf.detach().double() for name, leaf in leaves.items()}, index, grad_output)
    for backend in BACKENDS:
        if not shape.fits(backend):
            continue
        experts.config._experts_implementation = backend
        try:
            output = experts(leaves["hidden_states"], index, leaves["weights"])
            trained = [leaves[name] for name in shape.trained]
            gradients = torch.autograd.grad(output, trained, grad_output, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                inference = experts(leaves["hidden_states"], index, leaves["weights"])
        except Exception as error:
            yield f"{backend}: {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        found = {"output": output.detach(), "inference": inference, **dict(zip(shape.trained, gradients))}
        for name, value in found.items():
            wanted = expected["output" if name == "inference" else name]
            if value.shape != wanted.shape:
                yield f"{backend}: {name}: shape {tuple(value.shape)} instead of {tuple(wanted.shape)}"
                continue
            allowed = allowed_error(shape, name, wanted)
            error = (value.double() - wanted).norm()
            if not error <= allowed:  # NaN too
                yield f"{backend}: {name}: error {error / allowed:.3g} times what is allowed"


def allowed_error(shape: Shape, name: str, wanted: Tensor) -> float:
    """Inputs are scaled to terms near 1; what is summed from many terms may cancel, but their rounding does not."""
    terms = shape.hidden if name == "weights" else 1
    return TOLERANCE[shape.dtype] * (wanted.norm().item() + 0.1 * (wanted.numel() * terms) ** 0.5)


def reference(shape: Shape, leaves: dict[str, Tensor], index: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """Every expert on every token in fp64, weighted by what the token gives it."""
    for leaf in leaves.values():
        leaf.requires_grad_()
    num_experts, act = len(shape.sizes), ACT2FN[shape.activation]
    x, tile = leaves["hidden_states"], shape.tile
    share = x.new_zeros(shape.tokens, num_experts + 1).scatter_add(1, index, leaves["weights"])  # [T, E + 1]
    output, start = torch.zeros_like(x), 0
    for expert, size in enumerate(shape.sizes):
        tiles = slice(start, start + size // tile)
        gate = leaves["gate_up_proj"][tiles, :tile].reshape(size, -1)
        up = leaves["gate_up_proj"][tiles, tile:].reshape(size, -1)
        down = leaves["down_proj"][tiles].reshape(size, -1)  # [I, H]
        output = output + share[:, expert, None] * ((act(x @ gate.t()) * (x @ up.t())) @ down)
        start = tiles.stop
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output.double())
    return {"output": output.detach(), **dict(zip(leaves, gradients))}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=timing.positive_int, default=10_000)
    parser.add_argument("--minutes", type=timing.positive_float, default=5, help="stop then, whatever was checked")
    parser.add_argument("--seed", type=int, default=0, help="of the first shape; each further shape adds 1")
    parser.add_argument("--threads", type=timing.positive_int, default=torch.get_num_threads())
    parser.add_argument("--json", type=timing.Path, metavar="FILE", help="write the results here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    checked, failures = Counter[str](), []
    start = time.perf_counter()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        for seed in timing.progress(range(options.seed, options.seed + options.shapes), "soak"):
            shape = Shape.draw(seed)
            for failure in check(shape):
                failures.append({"seed": seed, "failure": failure, "shape": str(shape)})
                print(f"seed {seed}: {failure}\n    {shape}", flush=True)
            checked.update(backend for backend in BACKENDS if shape.fits(backend))
            checked.update(["shapes", str(shape.dtype).removeprefix("torch."), shape.routing])
            if time.perf_counter() - start > 60 * options.minutes:
                break
    finally:
        torch.use_deterministic_algorithms(deterministic)
    seconds = time.perf_counter() - start
    print(f"{checked['shapes']:,} of {options.shapes:,} shapes in {seconds:.0f} s, {len(failures)} mismatches")
    if options.json:
        row = {"backends": BACKENDS, "checked": dict(checked), "seconds": seconds, "mismatches": len(failures)}
        timing.write_json(options.json, "soak", options, [row], failures=failures)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
