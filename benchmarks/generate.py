"""Prefill and decode of HMoE beside Mixtral and Llama twins through `model.generate`, and loading a checkpoint.

    python benchmarks/generate.py
    python benchmarks/generate.py --batches 1 8 --new_tokens 64 --rounds 10

The models are those of `twins.py`: equal activated parameters, random weights, greedy decoding of random prompts to a
fixed length. Both mixtures send every token to the same experts, each expert equally often (the ids that the routers
choose are replaced; the routers run). Prefill ends with the first new token; decode is all that follows. All
contenders take turns; figures are ratios of tokens/s within a round. Stock `batched_mm` copies the weights of every
token's experts, so prompts go through `grouped_mm` and only decoding through it, as Transformers does on GPUs.

Loading: time of `from_pretrained` from a local folder that is in the page cache, the same plus reading every weight
once (files are mapped, so that weights may come later), and the growth of resident memory at its highest, each in a
process of its own. The checkpoints take 2.5 GB of temporary disk space with the default sizes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timing
import torch
import transformers
import twins
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hmoe


FAMILIES = ("hmoe", "mixtral", "llama")


class TokenTimes(BaseStreamer):
    """When each step's tokens came; `after_prefill` runs once the first are there."""

    def __init__(self, after_prefill: Callable[[], None] | None):
        self.after_prefill = after_prefill
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.prefilled = self.times[0]
            if self.after_prefill:
                self.after_prefill()
                self.times[0] = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` after the last token; nothing is buffered here."""


class Generator:
    """A model under one backend of experts."""

    def __init__(self, model: PreTrainedModel, routing: twins.BalancedRouting | None, backend: str | None):
        self.model, self.routing, self.backend = model, routing, backend

    def run(self, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
        """Seconds of prefill and of decode."""
        after_prefill = None
        if self.routing:
            self.routing.restart()
        if self.backend:
            batched = self.backend == "batched_mm"
            self.model.set_experts_implementation("grouped_mm" if batched else self.backend)
            if batched:
                after_prefill = lambda: self.model.set_experts_implementation("batched_mm")  # noqa: E731
        times = TokenTimes(after_prefill)
        start = time.perf_counter()
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=times,
        )
        if output.shape[1] != prompt.shape[1] + new_tokens or len(times.times) != new_tokens:
            raise RuntimeError(f"expected {new_tokens} new tokens, got {len(times.times)}")
        return times.prefilled - start, times.times[-1] - times.times[0]


def make_generators(models: dict[str, PreTrainedModel]) -> dict[str, Generator]:
    routings = {name: twins.BalancedRouting(models[name]) for name in ("hmoe", "mixtral")}
    generators = {}
    for name in twins.CONTENDERS:
        family, _, backend = name.partition(" ")
        generators[name] = Generator(models[family], routings.get(family), backend or None)
    return generators


def measure_generation(generators: dict[str, Generator], batch: int, options: argparse.Namespace) -> list[timing.Row]:
    """One row per contender, tokens/s and their ratios to the fastest stock backend and to Llama."""
    shape = batch, options.prompt_tokens
    prompt = torch.randint(1, options.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    copied = twins_scale(options).copied_bytes(batch)
    names = [name for name in generators if not (name.endswith("batched_mm") and copied > twins.MAX_COPIED_BYTES)]
    stages: dict[str, timing.Samples] = {stage: {name: [] for name in names} for stage in ("prefill", "decode")}
    for name in names:
        generators[name].run(prompt, min(2, options.new_tokens))  # warms up
    for number in range(options.rounds):
        for name in timing.shuffled(names, number):
            prefill, decode = generators[name].run(prompt, options.new_tokens)
            stages["prefill"][name].append(prefill)
            stages["decode"][name].append(decode)
    stages["prefill"].pop("mixtral batched_mm", None)
    tokens = {"prefill": batch * options.prompt_tokens, "decode": batch * (options.new_tokens - 1)}
    rows = []
    for stage, samples in stages.items():
        stock = timing.fastest(samples, twins.STOCK)
        of_stock = timing.speedups(samples, stock) if stock else {}
        of_llama = timing.speedups(samples, "llama")
        for name, seconds in samples.items():
            rows.append(
                {
                    "stage": stage,
                    "batch": batch,
                    "contender": name,
                    "tokens_per_second": tokens[stage] / statistics.median(seconds),
                    "speed_to_stock": of_stock.get(name),
                    "speed_to_llama": of_llama[name],
                    "stock": stock,
                    "rounds": options.rounds,
                }
            )
    return rows


def measure_loading(models: dict[str, PreTrainedModel], options: argparse.Namespace) -> list[timing.Row]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.save_pretrained(Path(folder) / name)
        for number in timing.progress(range(options.rounds), "from_pretrained"):
            for name in timing.shuffled(models, number):
                path = str(Path(folder) / name)
                found[name].append(timing.in_own_process(load, type(models[name]).__name__, path))
    seconds = {name: [entry["seconds"] for entry in entries] for name, entries in found.items()}
    ready = {name: [entry["ready_seconds"] for entry in entries] for name, entries in found.items()}
    rows = []
    for name, model in models.items():
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        peak = statistics.median(entry["peak_bytes"] for entry in found[name])
        rows.append(
            {
                "contender": name,
                "weights_mib": weights / 2**20,
                "seconds": statistics.median(seconds[name]),
                "ready_seconds": statistics.median(ready[name]),
                "ready_over_mixtral": timing.ratios(ready, "mixtral")[name],
                "peak_mib": peak / 2**20,
                "peak_over_weights": peak / weights,
                "rounds": options.rounds,
            }
        )
    return rows


@timing.quiet_logs()
def load(model_class: str, folder: str) -> dict[str, float]:
    """Loads a checkpoint and reads its weights."""
    cls = getattr(hmoe if hasattr(hmoe, model_class) else transformers, model_class)
    before, start = timing.restart_peak(), time.perf_counter()
    model = cls.from_pretrained(folder)
    seconds = time.perf_counter() - start
    for parameter in model.parameters():
        parameter.detach().sum()
    ready = time.perf_counter() - start
    return {"seconds": seconds, "ready_seconds": ready, "peak_bytes": timing.resident_bytes("VmHWM") - before}


def twins_scale(options: argparse.Namespace) -> twins.Scale:
    length = options.prompt_tokens + options.new_tokens
    return twins.Scale(options.hidden_size, options.layers, options.width, options.vocabulary, length)


COLUMNS: dict[str, str | Callable[[timing.Row], str]] = {
    "stage": "stage",
    "batch": "batch",
    "model": "contender",
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "tokens/s over fastest stock": lambda row: timing.show_spread(row["speed_to_stock"]),
    "tokens/s over Llama": lambda row: timing.show_spread(row["speed_to_llama"]),
    "rounds": "rounds",
}
LOADING_COLUMNS: dict[str, str | Callable[[timing.Row], str]] = {
    "model": "contender",
    "weights MiB": lambda row: f"{row['weights_mib']:,.0f}",
    "from_pretrained s": "seconds",
    "weights read s": "ready_seconds",
    "weights read, time over Mixtral": lambda row: timing.show_spread(row["ready_over_mixtral"]),
    "peak memory MiB": lambda row: f"{row['peak_mib']:,.0f}",
    "peak / weights": "peak_over_weights",
    "rounds": "rounds",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = timing.make_parser(__doc__, rounds=5)
    parser.add_argument("--batches", type=timing.positive_int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt_tokens", type=timing.positive_int, default=64)
    parser.add_argument("--new_tokens", type=timing.positive_int, default=32)
    parser.add_argument("--hidden_size", type=timing.positive_int, default=768)
    parser.add_argument("--layers", type=timing.positive_int, default=8)
    parser.add_argument("--width", type=timing.positive_int, default=1536, help="mean size of the eight experts")
    parser.add_argument("--vocabulary", type=timing.positive_int, default=8192)
    options = parser.parse_args(argv)
    if options.new_tokens < 2:
        parser.error(
            f"--new_tokens must be at least 2, so that there is something to decode, got {options.new_tokens}"
        )
    try:
        twins_scale(options)
    except ValueError as error:
        parser.error(str(error))
    return options


@timing.quiet_logs()
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    models = {family: twins.make_model(family, twins_scale(options)).eval() for family in FAMILIES}
    loading = measure_loading(models, options)
    print(timing.markdown_table(loading, LOADING_COLUMNS), end="\n\n")
    generators, rows = make_generators(models), []
    for batch in timing.progress(options.batches, "generate, batch by batch"):
        rows += measure_generation(generators, batch, options)
    print(timing.markdown_table(rows, COLUMNS))
    if options.json:
        timing.write_json(options.json, "generate", options, rows, loading=loading)


if __name__ == "__main__":
    main()
