"""Training steps of HMoE beside Mixtral and Llama twins through `Trainer`, and what `HMoETrainer` costs over it.

    python benchmarks/train_step.py                                        # both
    python benchmarks/train_step.py --compare twins --rounds 20
    python benchmarks/train_step.py --compare trainers --routing top_p --metrics per_layer

`twins`: whole steps (forward, backward, clipping, AdamW) of the models of `twins.py`, which have equal activated
parameters, in fp32. Both mixtures send every token to the same experts, each expert equally often (the ids that the
routers choose are replaced; the routers and their load-balancing losses run and learn), so that their activated widths
are equal. Blocks of steps of all contenders take turns; figures are ratios of tokens/s within a round.

`trainers`: blocks of steps of `Trainer` and `HMoETrainer` on the same model and data; the figure is the ratio of the
medians of their step times. On a CPU times are those of the processor, which other programs disturb less than the
clock. Every step is logged in both, the most that metrics can cost. Also measured: how many tokens a second the data
path of `hmoe train` delivers, over how many training consumes.
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
import twins
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hmoe.training.arguments import DataOptions, HMoETrainingArguments
from hmoe.training.trainer import HMoETrainer


# `width` is the mean size of an expert, `block` the timed steps of one turn.
SCALES = {
    "twins": {
        "hidden_size": 512,
        "layers": 4,
        "width": 1024,
        "vocabulary": 8192,
        "length": 512,
        "batch": 4,
        "block": 2,
    },
    "trainers": {
        "hidden_size": 192,
        "layers": 4,
        "width": 192,
        "vocabulary": 4096,
        "length": 256,
        "batch": 4,
        "block": 10,
    },
}


class StepTimes(TrainerCallback):
    """Seconds from one step's end to the next's, logging included; the first step of a block only warms up."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.seconds, self._last = [], None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = self.clock()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


class Contender:
    """A trainer whose blocks of steps are timed."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        options: argparse.Namespace,
        folder: Path,
        *,
        clock: Callable[[], float],
        trainer_class: type[Trainer] = Trainer,
        **fields,
    ):
        generator = torch.Generator().manual_seed(0)
        shape = options.batch * (options.block + 1), options.length
        ids = torch.randint(options.vocabulary, shape, generator=generator).tolist()
        fields |= {
            "output_dir": str(folder / name.replace(" ", "-")),
            "max_steps": options.block + 1,
            "per_device_train_batch_size": options.batch,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": options.device == "cpu",
            "bf16": options.device != "cpu",
            "dataloader_pin_memory": False,
        }
        arguments_class = HMoETrainingArguments if trainer_class is HMoETrainer else TrainingArguments
        self.times = StepTimes(clock)
        self.trainer = trainer_class(
            model=model,
            args=arguments_class(**fields),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            data_collator=default_data_collator,
            callbacks=[self.times],
        )
        self.trainer.remove_callback(PrinterCallback)

    def run_block(self) -> list[float]:
        """Seconds of each timed step."""
        self.trainer.train()
        return self.times.seconds


def compare_twins(options: argparse.Namespace, folder: Path) -> list[timing.Row]:
    scale = make_scale(options)
    contenders, parameters = {}, {}
    for name in twins.CONTENDERS:
        if name.endswith("batched_mm") and scale.copied_bytes(options.batch * options.length) > twins.MAX_COPIED_BYTES:
            continue
        family, _, backend = name.partition(" ")
        model = twins.make_model(family, scale)
        if backend:
            model.set_experts_implementation(backend)
        if family != "llama":
            twins.BalancedRouting(model, num_tokens=max(options.batch * options.length, 2**14))
        parameters[name] = twins.count_parameters(model)
        contenders[name] = Contender(
            name, model, options, folder, clock=time.perf_counter, logging_steps=options.logging_steps
        )
    samples: timing.Samples = {name: [] for name in contenders}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for number in timing.progress(range(options.rounds), "training steps: twins"):
        for name in timing.shuffled(contenders, number):
            seconds = contenders[name].run_block()
            samples[name].append(statistics.median(seconds))
            steps[name] += seconds
    stock = timing.fastest(samples, twins.STOCK)
    of_stock = timing.speedups(samples, stock) if stock else {}
    of_llama = timing.speedups(samples, "llama")
    tokens = options.batch * options.length
    rows: list[timing.Row] = []
    for name in twins.CONTENDERS:
        if name not in contenders:
            copied = scale.copied_bytes(tokens) / 2**30
            rows.append({"contender": name, "skipped": f"would copy {copied:.0f} GiB of weights"})
            continue
        row = {"contender": name, "million_parameters": parameters[name]["total"]}
        row |= {"million_activated": parameters[name]["activated"]}
        row |= {"tokens_per_second": tokens / statistics.median(steps[name]), "rounds": options.rounds}
        rows.append({**row, "speed_to_stock": of_stock.get(name), "speed_to_llama": of_llama[name], "stock": stock})
    return rows


def compare_trainers(options: argparse.Namespace, folder: Path) -> list[timing.Row]:
    """`HMoETrainer` over `Trainer`, on a small model: the smaller, the more visible."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    contenders = {}
    for trainer_class in (Trainer, HMoETrainer):
        model = twins.make_model("hmoe", make_scale(options), routing=options.routing, parameter_penalty_loss_coef=0.1)
        fields = {"router_metrics": options.metrics} if trainer_class is HMoETrainer else {}
        contenders[trainer_class.__name__] = Contender(
            trainer_class.__name__,
            model,
            options,
            folder,
            clock=clock,
            trainer_class=trainer_class,
            logging_steps=options.logging_steps,
            **fields,
        )
    samples: timing.Samples = {name: [] for name in contenders}
    for number in timing.progress(range(options.rounds), "training steps: trainers"):
        for name in timing.shuffled(contenders, number):
            samples[name].append(statistics.median(contenders[name].run_block()))
    ratios = timing.ratios(samples, "Trainer")
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    tokens_per_second = options.batch * options.length / seconds["Trainer"]
    rows = [
        {"contender": name, "milliseconds": 1000 * seconds[name], "ratio": ratios[name], "rounds": options.rounds}
        for name in contenders
    ]
    delivered = data_tokens_per_second(options, folder)
    return [
        *rows,
        {"contender": "data", "tokens_per_second": delivered, "over_training": delivered / tokens_per_second},
    ]


def with_defaults(options: argparse.Namespace, comparison: str) -> argparse.Namespace:
    """The options of one comparison: what was not given has its default."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{**SCALES[comparison], **given})


def make_scale(options: argparse.Namespace) -> twins.Scale:
    return twins.Scale(options.hidden_size, options.layers, options.width, options.vocabulary, options.length)


def data_tokens_per_second(options: argparse.Namespace, folder: Path) -> float:
    """Of the packed, tokenized data of `hmoe train`, read as the trainer reads them."""
    from transformers import PreTrainedTokenizerFast

    from hmoe.training.data import build_data
    from hmoe.training.tokenizer import train_tokenizer

    text = (Path(__file__).parents[1] / "examples" / "data" / "state_of_the_union.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text], 4096)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    data = build_data(
        DataOptions(dataset=[str(path)], text_documents="paragraph", data_cache_dir=str(folder / "cache")),
        tokenizer,
        options.length,
        seed=0,
    )
    loader = torch.utils.data.DataLoader(
        data.train, batch_size=options.batch, shuffle=True, collate_fn=data.collate, drop_last=True
    )
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() - start < options.data_seconds:
        for batch in loader:
            tokens += batch["input_ids"].numel()
    return tokens / (time.perf_counter() - start)


TWINS_COLUMNS: dict[str, str | Callable[[timing.Row], str]] = {
    "model": "contender",
    "parameters M": "million_parameters",
    "activated M": "million_activated",
    "tokens/s": lambda row: row.get("skipped") or f"{row['tokens_per_second']:,.0f}",
    "tokens/s over fastest stock": lambda row: timing.show_spread(row.get("speed_to_stock")),
    "tokens/s over Llama": lambda row: timing.show_spread(row.get("speed_to_llama")),
    "rounds": "rounds",
}
TRAINERS_COLUMNS: dict[str, str | Callable[[timing.Row], str]] = {
    "": "contender",
    "ms per step": "milliseconds",
    "time over Trainer": lambda row: timing.show_spread(row.get("ratio"), 3),
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "-",
    "over training": "over_training",
    "rounds": "rounds",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = timing.make_parser(__doc__, rounds=8)
    parser.add_argument("--compare", choices=list(SCALES), nargs="+", default=list(SCALES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    scale = parser.add_argument_group("scale", "defaults: " + "; ".join(f"{k} {v}" for k, v in SCALES.items()))
    for name in SCALES["twins"]:
        scale.add_argument(f"--{name}", type=timing.positive_int)
    trainers = parser.add_argument_group("trainers")
    trainers.add_argument("--routing", default="top_k", choices=["top_k", "top_p"])
    trainers.add_argument("--metrics", default="brief", choices=["off", "brief", "per_layer"])
    trainers.add_argument("--logging_steps", type=timing.positive_int, default=1)
    trainers.add_argument("--data_seconds", type=timing.positive_float, default=3, help="time the data path so long")
    options = parser.parse_args(argv)
    try:
        for comparison in options.compare:
            make_scale(with_defaults(options, comparison))
    except ValueError as error:
        parser.error(str(error))
    return options


@timing.quiet_logs()
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    torch.set_num_threads(options.threads)
    results: dict[str, list[timing.Row]] = {"twins": [], "trainers": []}
    with tempfile.TemporaryDirectory() as name:
        if "twins" in options.compare:
            results["twins"] = compare_twins(with_defaults(options, "twins"), Path(name))
            print(timing.markdown_table(results["twins"], TWINS_COLUMNS), end="\n\n")
        if "trainers" in options.compare:
            results["trainers"] = compare_trainers(with_defaults(options, "trainers"), Path(name))
            print(timing.markdown_table(results["trainers"], TRAINERS_COLUMNS))
    if options.json:
        timing.write_json(options.json, "train_step", options, results["twins"], trainers=results["trainers"])


if __name__ == "__main__":
    main()
