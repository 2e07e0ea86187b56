"""The `hmoe analyze` command: how a mixture of experts routes a text, as one report.

hmoe analyze runs/cpu/hmoe --against runs/cpu/moe --data held_out.txt --output_dir runs/report
hmoe analyze runs/cpu/hmoe --checkpoints runs/cpu/hmoe/checkpoint-* --data held_out.txt
hmoe analyze runs/cpu/hmoe --peft runs/lora --against runs/cpu/hmoe --data held_out.txt
hmoe analyze allenai/OLMoE-1B-7B-0924 --data articles.jsonl --max_tokens 200000 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hmoe.costs import moe_costs
from hmoe.metrics import held_out_metrics
from hmoe.routers import routed_layers
from hmoe.sources import read_texts

from .difficulty import difficulty
from .loading import Loader, Source, find_sources
from .observe import batches, check_same_tokenizer, observe, step_of, windows
from .report import headline, write_report
from .stability import RouteSample, stability
from .statistics import RoutingStatistics
from .tokens import (
    TokenLosses,
    TokenRoutes,
    activation_share,
    kl_divergence,
    pool_by_size,
    top_tokens,
    wasserstein,
)


GROUND_METRICS = ("discrete", "embedding")


def _option(default: Any, help: str, **settings: Any) -> Any:
    """A field that is an option of the command too, with these settings of argparse."""
    return field(default=default, metadata={"help": help, **settings})


@dataclass(frozen=True)
class Settings:
    """What to read and how."""

    window: int | None = _option(None, "tokens read at once (default: 512, or the model's context)", type=int)
    batch_size: int = _option(8, "windows at once (default: %(default)s)", type=int)
    max_tokens: int | None = _option(None, "read no more than this (default: all)", type=int)
    stability_tokens: int = _option(1 << 17, "compared between checkpoints (default: %(default)s)", type=int)
    min_count: int = _option(10, "occurrences for a token to be judged alone (default: %(default)s)", type=int)
    thresholds: Sequence[float] | None = _option(
        None,
        "losses in nats above which a token is difficult (default: as far above the baseline's mean as MoDSE's)",
        type=float,
        nargs="+",
    )
    top_tokens: int = _option(10, "per expert size (default: %(default)s)", type=int)
    ground_metric: str = _option(
        "discrete",
        "distance of two tokens for the Wasserstein distance: 1, or between input embeddings",
        choices=GROUND_METRICS,
    )
    device: str | None = _option(None, "default: cuda where there is one, else cpu")
    dtype: str = _option("float32", "of the weights (default: %(default)s)")
    peft: str | None = _option(
        None,
        "a PEFT adapter on the model, folder or Hub id; --checkpoints may then be adapters too",
        metavar="ADAPTER",
    )
    trust_remote_code: bool = _option(
        False, "run code that comes with the checkpoints; HMoE needs none", action="store_true"
    )
    progress: bool = True

    @property
    def loader(self) -> Loader:
        return Loader(self.dtype, self.device, self.trust_remote_code)


@dataclass
class ModelRun:
    """One model after its pass over the text; a dense one has no routes.

    `scores` are those of [`hmoe.metrics.held_out_metrics`].
    """

    name: str
    model_type: str
    parameters: int
    scores: dict[str, float]
    losses: TokenLosses
    routing: RoutingStatistics | None
    routes: TokenRoutes | None
    sample: RouteSample | None
    embedding: Tensor | None

    def summary(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model_type": self.model_type,
            "parameters": self.parameters,
            **{name: self.scores[name] for name in ("loss", "perplexity", "accuracy")},
            "predicted_tokens": int(self.losses.count.sum()),
            "routing": None if self.routing is None else self.routing.summary(),
        }


def analyze(
    model: str,
    data: Sequence[str | Path],
    *,
    baseline: str | None = None,
    checkpoints: Sequence[str] = (),
    settings: Settings | None = None,
) -> dict[str, Any]:
    """All numbers of the report, as plain values; each model reads the text once, one model in memory at a time.

    Args:
        model, baseline: folders or Hub ids; the baseline may be dense. `settings.peft` is an adapter on the model.
        data: files, folders, globs or data sets, as `dataset` of a recipe takes them.
        checkpoints: of the model's training, in order; the model itself is added as the last. With `settings.peft`
            they may be adapters on the model.

    Raises:
        ValueError: for a model that is no mixture of experts, text shorter than a window, tokenizers that differ, or
            checkpoints of other models.
    """
    settings = settings or Settings()
    _check(settings)
    source, against_source, earlier = find_sources(model, settings.peft, baseline, checkpoints)
    others = [*earlier, *([against_source] if against_source else [])]
    tokenizer = settings.loader.tokenizer(source)
    _check_tokenizers(settings.loader, tokenizer, source, against_source, earlier)
    window = settings.window or min(512, *map(settings.loader.context, [source, *others]))

    def rows() -> Iterator[list[int]]:
        return windows(read_texts(data), tokenizer, window, settings.max_tokens)

    next(rows())  # text that is too short is refused before a model is loaded
    whole = _run(source, rows, settings, wants=("routes", "sample") if earlier else ("routes",))
    against = _run(against_source, rows, settings, wants=()) if against_source else None
    runs = [_run(checkpoint, rows, settings, wants=("sample",)) for checkpoint in earlier]
    history = [*runs, whole] if runs else []
    return {
        "settings": {"data": [str(path) for path in data], "window": window, **_reported(settings)},
        "model": _checkpoint_summary(whole, source),
        "baseline": None if against is None else against.summary(),
        "tokens": _token_results(whole, against, tokenizer, settings),
        "checkpoints": [_checkpoint_summary(run, place) for run, place in zip(history, [*earlier, source])],
        "stability": stability([run.name for run in history], [run.sample for run in history]) if history else None,  # type: ignore[misc]
    }


def _check(settings: Settings) -> None:
    for name in ("batch_size", "stability_tokens", "min_count", "top_tokens"):
        if getattr(settings, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(settings, name)}")
    if settings.window is not None and settings.window < 2:
        raise ValueError(f"`window` must be at least 2 tokens, so that one is predicted, got {settings.window}")
    if settings.ground_metric not in GROUND_METRICS:
        raise ValueError(f"`ground_metric` must be 'discrete' or 'embedding', got {settings.ground_metric!r}")


def _reported(settings: Settings) -> dict[str, Any]:
    names = ("batch_size", "max_tokens", "min_count", "ground_metric", "dtype", "peft")
    return {name: value for name, value in asdict(settings).items() if name in names}


def _check_tokenizers(
    loader: Loader, tokenizer: Any, source: Source, baseline: Source | None, earlier: Sequence[Source]
) -> None:
    for other in [*([baseline] if baseline else []), *earlier]:
        # Trainers need not save the tokenizer beside every checkpoint.
        if other != baseline and Path(other.model).is_dir() and not list(Path(other.model).glob("tokenizer*")):
            continue
        check_same_tokenizer(tokenizer, loader.tokenizer(other), (source.model, other.model))


def _run(
    source: Source, rows: Callable[[], Iterator[list[int]]], settings: Settings, *, wants: Sequence[str]
) -> ModelRun:
    network = settings.loader.network(source)
    shape = moe_costs(network) if wants or routed_layers(network) else None
    vocab_size = network.config.get_text_config().vocab_size
    scores, losses = held_out_metrics(), TokenLosses(vocab_size)
    routing = RoutingStatistics(shape) if shape else None
    routes = TokenRoutes(shape, vocab_size) if shape and "routes" in wants else None
    sample = (
        RouteSample(list(map(len, shape.sizes)), settings.stability_tokens) if shape and "sample" in wants else None
    )
    with tqdm(
        desc=f"reading with {source.name}",
        total=settings.max_tokens,
        unit="tok",
        unit_scale=True,
        disable=not settings.progress,
    ) as bar:
        for seen in observe(network, batches(rows(), settings.batch_size)):
            scores.add_batch(**seen.scored())
            for sums in (losses, routing, routes, sample):
                if sums is not None:
                    sums.update(seen)
            bar.update(seen.input_ids.numel())
    embedding = network.get_input_embeddings().weight.detach().float().cpu()
    return ModelRun(
        name=source.name,
        model_type=network.config.model_type,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        scores=scores.compute(),
        losses=losses,
        routing=routing,
        routes=routes,
        sample=sample,
        embedding=embedding if settings.ground_metric == "embedding" and routes is not None else None,
    )


def _checkpoint_summary(run: ModelRun, source: Source) -> dict[str, Any]:
    return {**run.summary(), "path": source.path, "step": step_of(source.path)}


def _token_results(run: ModelRun, baseline: ModelRun | None, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    assert run.routes is not None
    top = top_tokens(run.routes, settings.top_tokens, settings.min_count)
    for row in top:
        row["tokens"] = [readable(tokenizer, token) for token in row["ids"]]
    return {
        "layers": run.routes.layers,
        "loss_and_size": run.routes.loss_and_size(),
        "top_tokens": top,
        "examples": _examples(run, tokenizer, settings.min_count),
        "similarity": _similarity(run, settings),
        "difficulty": difficulty(
            run.losses,
            baseline.losses if baseline else None,
            run.routes,
            settings.thresholds,
            settings.min_count,
        ),
    }


def _examples(run: ModelRun, tokenizer: Any, min_count: int, num_each: int = 8) -> dict[str, Any]:
    """The types whose experts are smallest and widest on average, and the most frequent ones between them."""
    assert run.routes is not None
    table, sizes = pool_by_size(run.routes.activations, run.routes.kept_sizes)
    frequent = (run.routes.occurrences >= min_count).nonzero().squeeze(1)
    widths = table.new_tensor(sizes)
    mean = (table[frequent] @ widths) / table[frequent].sum(1)
    order = frequent[mean.argsort()].tolist()
    ids = list(dict.fromkeys([*order[:num_each], *order[-num_each:]]))
    return {
        "sizes": sizes,
        "ids": ids,
        "tokens": [readable(tokenizer, token) for token in ids],
        "occurrences": run.routes.occurrences[ids].tolist(),
        "shares": activation_share(run.routes, ids),
    }


def readable(tokenizer: Any, token: int) -> str:
    """A token as text, its leading space as `_`, which the paper uses too."""
    text = tokenizer.decode([token])
    return ("_" + text[1:] if text.startswith(" ") else text).replace("\n", "\\n")


def _similarity(run: ModelRun, settings: Settings) -> dict[str, Any]:
    assert run.routes is not None
    layers: list[dict[str, Any]] = []
    for layer, table, sizes in zip(run.routes.layers, run.routes.activations, run.routes.kept_sizes):
        distance, divergence = wasserstein(table, run.embedding), kl_divergence(table)
        layers.append({"layer": layer, "sizes": sizes, "wasserstein": distance, "kl": divergence})
    mean = None
    if all(layer["sizes"] == layers[0]["sizes"] for layer in layers):
        stacked = {kind: torch.stack([layer[kind] for layer in layers]).nanmean(0) for kind in ("wasserstein", "kl")}
        mean = {"sizes": layers[0]["sizes"], **stacked}
    result = {"ground_metric": settings.ground_metric, "layers": layers, "mean": mean}
    return _without_nan(result)


def _without_nan(value: Any) -> Any:
    """Tensors as lists, with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if hasattr(value, "tolist"):
        return _without_nan(value.tolist())
    return None if isinstance(value, float) and value != value else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hmoe analyze",
        description="How an HMoE, Mixtral, Qwen-MoE or OLMoE model routes a text: a report with pictures "
        "(report.html), and all numbers as report.json and CSV files.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a model folder or Hub id")
    parser.add_argument(
        "--data", nargs="+", required=True, help="text of any format that `hmoe train` reads, with a column `text`"
    )
    parser.add_argument("--against", metavar="BASELINE", help="a model with the same tokenizer, MoE or dense")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="earlier checkpoints of the same run, in order")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/analysis"), help="default: %(default)s")
    for option in fields(Settings):
        if option.metadata:
            parser.add_argument(f"--{option.name}", default=option.default, **option.metadata)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hmoe analyze ...`; returns the exit status."""
    args = _parser().parse_args(argv)
    options = {option.name: getattr(args, option.name) for option in fields(Settings) if option.metadata}
    settings = Settings(**options, progress=sys.stderr.isatty())
    result = analyze(args.model, args.data, baseline=args.against, checkpoints=args.checkpoints, settings=settings)
    path = write_report(result, args.output_dir)
    print(headline(result))
    print(path)
    return 0
