"""What `HMoETrainer` costs over `Trainer`, in the same process, on the same model and data.

    python benchmarks/train_step.py                       # a small HMoE on this machine
    python benchmarks/train_step.py --hidden_size 512 --layers 8 --length 512 --device cuda

Blocks of steps of both trainers alternate (A B B A ...), so that a machine that slows down or is shared slows both;
the answer is the ratio of the medians of their step times, with the spread over pairs of blocks. On a CPU times are
those of the processor, which other programs disturb less than the clock. Every step is logged in both, the most that
metrics can cost. Also printed: how many tokens a second the data path of `hmoe train` delivers, over how many training
consumes.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.utils import logging as transformers_logging

from hmoe import HMoEConfig, HMoEForCausalLM, expert_sizes
from hmoe.training.arguments import HMoETrainingArguments
from hmoe.training.options import DataOptions
from hmoe.training.trainer import HMoETrainer


class StepTimes(TrainerCallback):
    """Seconds from one step's begin to the next's, logging included."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        now = self.clock()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._last = None


def make_config(options: argparse.Namespace) -> HMoEConfig:
    return HMoEConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 32,
        max_position_embeddings=options.length,
        expert_intermediate_sizes=expert_sizes("arithmetic", 8, total=8 * options.hidden_size, multiple_of=16),
        routing=options.routing,
        parameter_penalty_loss_coef=0.1,
    )


def make_trainer(kind: str, options: argparse.Namespace, folder: Path) -> tuple[Trainer, StepTimes]:
    torch.manual_seed(0)
    model = HMoEForCausalLM(make_config(options))
    rows = options.batch * (options.block + 1)
    ids = torch.randint(options.vocabulary, (rows, options.length)).tolist()
    fields = {
        "output_dir": str(folder / kind),
        "max_steps": options.block + 1,
        "per_device_train_batch_size": options.batch,
        "logging_steps": options.logging_steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": options.device == "cpu",
        "bf16": options.device != "cpu",
        "dataloader_pin_memory": False,
    }
    times = StepTimes(time.process_time if options.device == "cpu" else time.perf_counter)
    if kind == "Trainer":
        trainer_class, arguments = Trainer, TrainingArguments(**fields)
    else:
        trainer_class, arguments = HMoETrainer, HMoETrainingArguments(**fields, router_metrics=options.metrics)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=default_data_collator,
        callbacks=[times],
    )
    return trainer, times


def compare(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    kinds = ["Trainer", "HMoETrainer"]
    trainers = {kind: make_trainer(kind, options, folder) for kind in kinds}
    medians: dict[str, list[float]] = {kind: [] for kind in kinds}
    everything: dict[str, list[float]] = {kind: [] for kind in kinds}
    # The first round warms caches and the optimizer up.
    for number in range(options.rounds + 1):
        for kind in kinds if number % 2 else kinds[::-1]:
            trainer, times = trainers[kind]
            trainer.train()
            if number:
                medians[kind].append(statistics.median(times.seconds))
                everything[kind] += times.seconds
            times.seconds.clear()
    ratios = sorted(b / a for a, b in zip(medians["Trainer"], medians["HMoETrainer"]))
    seconds = statistics.median(everything["Trainer"])
    return {
        "step_milliseconds": 1000 * seconds,
        "cost_percent": 100 * (statistics.median(everything["HMoETrainer"]) / seconds - 1),
        "cost_percent_median_of_rounds": 100 * (statistics.median(ratios) - 1),
        "cost_percent_lowest_round": 100 * (ratios[0] - 1),
        "cost_percent_highest_round": 100 * (ratios[-1] - 1),
        "tokens_per_second": options.batch * options.length / seconds,
    }


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
    while time.perf_counter() - start < 3:
        for batch in loader:
            tokens += batch["input_ids"].numel()
    return tokens / (time.perf_counter() - start)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--routing", default="top_k", choices=["top_k", "top_p"])
    parser.add_argument("--metrics", default="brief", choices=["off", "brief", "per_layer"])
    parser.add_argument("--logging_steps", type=int, default=1)
    parser.add_argument("--block", type=int, default=10, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each trainer")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    transformers_logging.set_verbosity_error()
    logging.getLogger("hmoe").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        result = compare(options, Path(name))
        result["data_tokens_per_second"] = data_tokens_per_second(options, Path(name))
    result["data_over_training"] = result["data_tokens_per_second"] / result["tokens_per_second"]
    for name, value in result.items():
        print(f"{name:<34}{value:>14,.2f}")
    print(json.dumps({"options": vars(options), **{name: round(value, 3) for name, value in result.items()}}))


if __name__ == "__main__":
    main()
