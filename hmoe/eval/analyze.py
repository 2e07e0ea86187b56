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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from hmoe.costs import moe_costs
from hmoe.metrics import held_out_metrics
from hmoe.routers import routed_layers
from hmoe.sources import read_texts

from .difficulty import difficulty
from .loading import Checkpoint, check_same_tokenizer, find_checkpoints
from .observe import batches, observe, windows
from .report import headline, write_report
from .stability import RouteSample, stability
from .statistics import RoutingStatistics
from .tokens import TokenLosses, TokenRoutes, example_tokens, similarity, top_tokens


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

    def __post_init__(self) -> None:
        for name in ("batch_size", "stability_tokens", "min_count", "top_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.window is not None and self.window < 2:
            raise ValueError(f"`window` must be at least 2 tokens, so that one is predicted, got {self.window}")
        if self.ground_metric not in GROUND_METRICS:
            raise ValueError(f"`ground_metric` must be 'discrete' or 'embedding', got {self.ground_metric!r}")


@dataclass
class ModelRun:
    """One checkpoint after its pass over the text: its numbers, and what is compared between tokens and runs."""

    checkpoint: Checkpoint
    summary: dict[str, Any]
    losses: TokenLosses
    routes: TokenRoutes | None
    sample: RouteSample | None
    embedding: Tensor | None

    def checkpoint_summary(self) -> dict[str, Any]:
        return {**self.summary, "path": self.checkpoint.path, "step": self.checkpoint.step}


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
    source, against, earlier = find_checkpoints(
        model, settings.peft, baseline, checkpoints, settings.trust_remote_code
    )
    tokenizer = source.tokenizer()
    others = [*([against] if against else []), *earlier]
    for other in others:
        # Trainers need not save the tokenizer beside every checkpoint.
        folder = Path(other.model)
        if other is against or not folder.is_dir() or any(folder.glob("tokenizer*")):
            check_same_tokenizer(tokenizer, other.tokenizer(), (source.model, other.model))
    window = settings.window or min(512, *(checkpoint.context() for checkpoint in (source, *others)))

    def rows() -> Iterator[list[int]]:
        return windows(read_texts(data), tokenizer, window, settings.max_tokens)

    next(rows())  # text that is too short is refused before a model is loaded
    whole = _run(source, rows, settings, wants=("routes", "sample") if earlier else ("routes",))
    against_run = _run(against, rows, settings, wants=()) if against else None
    history = [_run(checkpoint, rows, settings, wants=("sample",)) for checkpoint in earlier]
    if history:
        history.append(whole)
    samples = [(run.checkpoint.name, run.sample) for run in history if run.sample]
    reported = ("batch_size", "max_tokens", "min_count", "ground_metric", "dtype", "peft")
    return {
        "settings": {
            "data": [str(path) for path in data],
            "window": window,
            **{name: getattr(settings, name) for name in reported},
        },
        "model": whole.checkpoint_summary(),
        "baseline": against_run.summary if against_run else None,
        "tokens": _token_results(whole, against_run, tokenizer, settings),
        "checkpoints": [run.checkpoint_summary() for run in history],
        "stability": stability(samples) if samples else None,
    }


def _run(
    checkpoint: Checkpoint, rows: Callable[[], Iterator[list[int]]], settings: Settings, *, wants: Sequence[str]
) -> ModelRun:
    network = checkpoint.network(settings.dtype, settings.device)
    costs = moe_costs(network) if wants or routed_layers(network) else None
    vocab_size = network.config.get_text_config().vocab_size
    scores, losses = held_out_metrics(), TokenLosses(vocab_size)
    routing = routes = sample = None
    if costs:
        routing = RoutingStatistics(costs)
        routes = TokenRoutes(costs, vocab_size) if "routes" in wants else None
        sample = RouteSample(list(map(len, costs.sizes)), settings.stability_tokens) if "sample" in wants else None
    tables: list[Any] = [table for table in (losses, routing, routes, sample) if table is not None]
    with tqdm(
        desc=f"reading with {checkpoint.name}",
        total=settings.max_tokens,
        unit="tok",
        unit_scale=True,
        disable=not settings.progress,
    ) as bar:
        for seen in observe(network, batches(rows(), settings.batch_size)):
            scores.add_batch(**seen.scored())
            for table in tables:
                table.update(seen)
            bar.update(seen.input_ids.numel())
    summary = {
        "name": checkpoint.name,
        "model_type": network.config.model_type,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **scores.compute(),
        "predicted_tokens": int(losses.count.sum()),
        "routing": routing.summary() if routing else None,
    }
    is_needed = routes and settings.ground_metric == "embedding"
    embedding = network.get_input_embeddings().weight.detach().float().cpu() if is_needed else None
    return ModelRun(checkpoint, summary, losses, routes, sample, embedding)


def _token_results(run: ModelRun, baseline: ModelRun | None, tokenizer: Any, settings: Settings) -> dict[str, Any]:
    routes = run.routes
    assert routes is not None
    top = top_tokens(routes, settings.top_tokens, settings.min_count)
    examples = example_tokens(routes, settings.min_count)
    for row in [*top, examples]:
        row["tokens"] = [readable(tokenizer, token) for token in row["ids"]]
    return {
        "layers": routes.layers,
        "loss_and_size": routes.loss_and_size(),
        "top_tokens": top,
        "examples": examples,
        "similarity": {"ground_metric": settings.ground_metric, **similarity(routes, run.embedding)},
        "difficulty": difficulty(
            run.losses, baseline.losses if baseline else None, routes, settings.thresholds, settings.min_count
        ),
    }


def readable(tokenizer: Any, token: int) -> str:
    """A token as text, its leading space as `_`, which the paper uses too."""
    text = tokenizer.decode([token])
    return ("_" + text[1:] if text.startswith(" ") else text).replace("\n", "\\n")


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
