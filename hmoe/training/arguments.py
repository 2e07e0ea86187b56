"""Arguments of `hmoe train`: dataclasses filled from a YAML recipe and the command line, which wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from hmoe.costs import CONVENTIONS

from .options import ROUTER_METRICS, DataOptions, LoraOptions, ModelOptions, RunOptions, TokenizerOptions, check_choice
from .recipe import as_argv, merge, nearest, read_recipe, take_configs, take_dotted


# Mappings that a recipe may hold; one key of them is set with --NAME.KEY VALUE.
MAPPINGS = ("model_config", "distributed", *sorted(TrainingArguments._VALID_DICT_FIELDS))
# Schedules that need no length.
OPEN_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")


@dataclass
class HMoETrainingArguments(RunOptions, TrainingArguments):
    """`transformers.TrainingArguments` and what [`RunOptions`] adds."""

    _argument_group_name = "training"

    output_dir: str | None = field(default="runs/train", metadata={"help": "folder of checkpoints, logs and model"})
    # Metrics are wanted from the first step on: a wrong run should be seen before step 500.
    logging_steps: float = field(default=10, metadata={"help": "log every so many steps"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step too"})
    # Every parameter of a bank of experts gets a gradient; the search for others costs time in each step.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "let DDP search for parameters without gradient"}
    )

    def __post_init__(self) -> None:
        check_choice("router_metrics", self.router_metrics, ROUTER_METRICS)
        check_choice("flops_convention", self.flops_convention, CONVENTIONS)
        for name in ("max_train_tokens", "max_train_flops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, got {value!r}; leave it out for no such budget")
        if self.resume_from_checkpoint:
            self.resume = self.resume_from_checkpoint
        super().__post_init__()
        self._check_schedule()

    def __getstate__(self) -> dict[str, Any]:
        """`training_args.bin` of every checkpoint is a pickle of this: it must not hold the token."""
        return {**self.__dict__, "hub_token": None}

    def _check_schedule(self) -> None:
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if self.max_train_flops and not self._has_length and schedule not in OPEN_SCHEDULES:
            raise ValueError(
                f"`lr_scheduler_type`={schedule!r} needs to know the number of steps, and `max_train_flops`="
                f"{self.max_train_flops:g} alone does not tell it (routing decides): give `max_steps` or "
                "`max_train_tokens` too, where the schedule ends, or use 'constant_with_warmup'"
            )

    @property
    def _has_length(self) -> bool:
        return self.max_steps > 0 or self.max_train_tokens is not None


@dataclass
class Arguments:
    """Everything a run is told."""

    model: ModelOptions
    tokenizer: TokenizerOptions
    data: DataOptions
    lora: LoraOptions
    training: HMoETrainingArguments
    recipe: dict[str, Any]
    """What recipe and command line set, flat."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def make_parser() -> HfArgumentParser:
    types = (ModelOptions, TokenizerOptions, DataOptions, LoraOptions, HMoETrainingArguments)
    return _Parser(types, prog="hmoe train", allow_abbrev=False)


def known_fields() -> dict[str, Any]:
    """Every field a recipe may set, with its default."""
    types = (ModelOptions, TokenizerOptions, DataOptions, LoraOptions, HMoETrainingArguments)
    return {f.name: f.default for dataclass_type in types for f in fields(dataclass_type) if f.init}


def parse_arguments(argv: list[str]) -> Arguments:
    """Arguments from `--config recipe.yaml --field value ...`; later values win, the command line over the recipe.

    Raises:
        ValueError: for an unknown key (with the nearest one), a value of the wrong type, or values that exclude each
            other.
    """
    paths, rest = take_configs(argv)
    recipe: dict[str, Any] = {}
    for path in paths:
        recipe = merge(recipe, read_recipe(path, known_fields()))
    overrides, rest = take_dotted(rest, MAPPINGS)
    recipe = merge(recipe, overrides)
    parser = make_parser()
    nulls = {name: None for name, value in recipe.items() if value is None}
    parser.set_defaults(**nulls)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        [*as_argv(recipe), *rest], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_unknown_argument(unknown))
    given = _given(parsed, recipe, rest)
    model, tokenizer, data, lora, training = parsed
    return Arguments(model, tokenizer, data, lora, training, given)


def _unknown_argument(words: list[str]) -> str:
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
            return f"unknown argument `--{name}`{nearest(name, known_fields())}"
    return f"unexpected words {words}: every argument is `--field value`"


def _given(parsed: list[Any], recipe: Mapping[str, Any], argv: list[str]) -> dict[str, Any]:
    """The final values of all fields that recipe or command line name."""
    flags = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    flags |= {flag.removeprefix("no_") for flag in flags}
    values: dict[str, Any] = {}
    for options in parsed:
        for f in fields(options):
            if f.init and (f.name in recipe or f.name in flags):
                value = getattr(options, f.name)
                values[f.name] = getattr(value, "value", value)
    return {name: value for name, value in values.items() if name not in ("hub_token",)}
