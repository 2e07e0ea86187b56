"""The model card of a training run, from what it measured, and the way of its folder to the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments

from hmoe.cards import public, write_card

from .checkpointing import STAGING_PREFIX


# What a folder of a run holds besides the model.
# Recipe and tokenizer notes name local paths, the pickled arguments may hold a token; the card has a clean recipe.
NOT_PUBLISHED = [
    "checkpoint-*",
    f"{STAGING_PREFIX}*",
    "_*",
    "tokenizer/*",
    "merged/*",
    "runs/*",
    "recipe.yaml",
    "training_args.bin",
]
_SPEEDS = ("_runtime", "_per_second", "_preparation_time")
_TOTALS = {"steps": "{:,}", "tokens": "{:,}", "flops": "{:.3e}", "seconds": "{:,.0f}", "processes": "{}"}


def write_model_card(
    model: Any, args: TrainingArguments, output_dir: str | os.PathLike, run_info: Mapping[str, Any]
) -> Path:
    """Writes `README.md` into `output_dir` and returns its path.

    Args:
        model: a causal LM, or its PEFT wrapper: the card then tells how to load the adapter.
        args: hyper-parameters; `hub_model_id`, if set, is the name in the usage example.
        run_info: all optional; [`run_info_of`] gives what a trainer knows. The keys of [`hmoe.cards.write_card`] and

            | key | value |
            |---|---|
            | `steps`, `tokens`, `flops`, `seconds`, `processes` | totals of the run |
            | `losses` | name to value: the last training log |
            | `recipe` | the fields that recipe and command line set |
    """
    info = dict(run_info)
    if recipe := info.get("recipe"):
        info["recipe"] = yaml.safe_dump(public(recipe), sort_keys=False, allow_unicode=True).strip()
    info |= {
        "is_adapter": hasattr(model, "peft_config"),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": _training_rows(args, run_info),
    }
    name = getattr(args, "hub_model_id", None) or Path(output_dir).resolve().name
    return write_card(output_dir, name, model.config, info)


def _training_rows(args: TrainingArguments, run_info: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, style.format(run_info[name])) for name, style in _TOTALS.items() if run_info.get(name) is not None]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * (run_info.get("processes") or 1)
    rows += [
        ("sequences per step", f"{batch:,}"),
        ("optimizer", f"{_value(args.optim)}, betas ({args.adam_beta1}, {args.adam_beta2}), eps {args.adam_epsilon}"),
        ("learning rate", f"{args.learning_rate}, {_value(args.lr_scheduler_type)}, warm-up {args.warmup_steps}"),
        ("weight decay", str(args.weight_decay)),
        ("gradient clipping", str(args.max_grad_norm)),
        ("precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"),
        ("seed", str(args.seed)),
    ]
    losses = run_info.get("losses") or {}
    return [*rows, *((f"last {name.replace('_', ' ')}", f"{value:.4f}") for name, value in losses.items())]


def _value(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def run_info_of(trainer: Trainer) -> dict[str, Any]:
    """What [`write_model_card`] needs and a trainer knows; `load` and `losses` are of the last training log."""
    state = trainer.state
    logs = state.log_history[::-1]
    training: dict[str, float] = next((entry for entry in logs if "loss" in entry), {})
    evaluation: dict[str, float] = next((entry for entry in logs if any(map(_is_of_evaluation, entry))), {})
    window = getattr(trainer, "router_window", None)
    adapters = getattr(trainer.model, "peft_config", None) or {}
    bases = [adapter.base_model_name_or_path for adapter in adapters.values()]
    return {
        "steps": state.global_step,
        "tokens": state.num_input_tokens_seen or None,
        "flops": state.total_flos or None,
        "processes": trainer.args.world_size,
        "losses": {name: value for name, value in training.items() if name.endswith("loss")},
        "load": window.load() if window is not None else None,
        "evaluation": {
            name: value for name, value in evaluation.items() if _is_of_evaluation(name) and not name.endswith(_SPEEDS)
        },
        "base_model": next(iter(bases), None) or trainer.model.config.name_or_path or None,
    }


def _is_of_evaluation(name: str) -> bool:
    return name.startswith("eval_")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Publishes the final folder of a run, without its checkpoints; returns the address of the commit.

    The repository is made if it does not exist. Files of it that the folder does not have stay.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=Path(folder),
        commit_message=commit_message,
        revision=revision,
        ignore_patterns=NOT_PUBLISHED,
    )
    return str(commit.commit_url)
