"""Everything that a training run can be told: dataclasses that a YAML recipe and the command line fill."""

# ruff: noqa: RUF009 (`_field` makes a `dataclasses.field`)

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from hmoe.experts_hmoe import EXPERTS_IMPLEMENTATIONS


# Schedules that need no length.
OPEN_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")


def _field(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _check_choices(options: Any) -> None:
    """Raises ValueError for a field declared `Literal` with another value; the parser checks only what it parses."""
    for name, hint in get_type_hints(type(options)).items():
        if get_origin(hint) is Literal and getattr(options, name) not in get_args(hint):
            raise ValueError(f"`{name}` must be one of {list(get_args(hint))}, got {getattr(options, name)!r}")


def parse_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping from YAML, or from JSON on the command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"`{name}`={value!r} is not JSON ({error}): write it as '{{\"key\": value}}'; "
                f"`--{name}.key value` sets one key"
            ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must map keys to values, got {value!r}")
    return value


@dataclass
class ModelOptions:
    """The model: a preset, a checkpoint, or a model type with config fields."""

    _argument_group_name = "model"

    preset: str | None = _field(None, "a model of the papers or its twin, such as hmoe-0.4b")
    model_name_or_path: str | None = _field(None, "checkpoint to continue from: a folder or a Hub name")
    model_type: str | None = _field(None, "type of a fresh model: hmoe, llama, mixtral, or any causal LM")
    model_config: dict | str | None = _field(
        None, "config fields over those of preset, checkpoint or type; --model_config.FIELD VALUE sets one"
    )
    dtype: str | None = _field(None, "of the weights: float32, bfloat16, auto; default float32, mixed by --bf16")
    attn_implementation: str | None = _field(None, "sdpa, eager, flash_attention_2, flex_attention")
    experts_implementation: str | None = _field(None, ", ".join(EXPERTS_IMPLEMENTATIONS))
    trust_remote_code: bool = _field(False, "run the code that a checkpoint or tokenizer carries")
    distributed: dict | str | None = _field(
        None,
        "sharding by Transformers, fields of its DistributedConfig: fsdp_size, tp_size, ep_size; "
        "--distributed.ep_size 2 sets one",
    )

    def __post_init__(self) -> None:
        self.model_config = parse_mapping("model_config", self.model_config)
        self.distributed = parse_mapping("distributed", self.distributed)
        named = [n for n in ("preset", "model_name_or_path", "model_type") if getattr(self, n)]
        if len(named) > 1:
            values = ", ".join(f"`{name}`={getattr(self, name)!r}" for name in named)
            raise ValueError(f"{values}: these exclude each other, keep one (`model_config` may override its fields)")
        if not named:
            raise ValueError(
                "no model: give `preset` (a model of the papers), `model_name_or_path` (a checkpoint to continue "
                "from), or `model_type` with `model_config`"
            )


@dataclass
class TokenizerOptions:
    """The tokenizer: given, the checkpoint's, or trained on the corpus."""

    _argument_group_name = "tokenizer"

    tokenizer: str | None = _field(None, "folder or Hub name; default: that of the checkpoint")
    train_tokenizer: int | None = _field(None, "train a byte-level BPE of this many tokens on the corpus")
    train_tokenizer_bytes: int = _field(100_000_000, "text that the new tokenizer is trained on, at most")
    chat_template: str | None = _field(None, "file with a Jinja chat template; default: the tokenizer's own")

    def __post_init__(self) -> None:
        if self.tokenizer and self.train_tokenizer:
            raise ValueError(
                f"`tokenizer`={self.tokenizer!r} and `train_tokenizer`={self.train_tokenizer}: keep one of them"
            )
        # The byte alphabet and the special tokens come first.
        if self.train_tokenizer is not None and self.train_tokenizer < 260:
            raise ValueError(f"`train_tokenizer`={self.train_tokenizer} is fewer than 256 bytes and 4 special tokens")


@dataclass
class DataOptions:
    """The data: what to read, how to cut it into sequences, what to hold out."""

    _argument_group_name = "data"

    dataset: list[str] = _field(
        [],
        "files, folders or globs of txt, jsonl, json, parquet or csv (.gz, .xz, .bz2, .zst too), folders "
        "of `save_to_disk`, or Hub names; several make a mixture. An entry may be a mapping (JSON on the command "
        "line) with path, weight, name, split, format, text_column, data_files",
    )
    validation_dataset: list[str] = _field([], "the same, held out; default: a part of `dataset`")
    validation_fraction: float = _field(0.0, "share of the documents held out, chosen by a hash of their text")
    max_validation_sequences: int | None = _field(None, "evaluate on this many sequences; 512 when streaming")
    max_documents: int | None = _field(None, "use only the first so many rows of each source")
    task: Literal["pretrain", "instruct"] = _field(
        "pretrain", "pretrain: loss on every token; instruct: loss on answers only"
    )
    text_column: str = _field("text", "column of the text in jsonl, parquet and Hub data")
    text_documents: Literal["file", "line", "paragraph"] = _field(
        "file", "what a document is in text files: file, line or paragraph"
    )
    document_separator: str | None = _field(None, "regular expression of the lines that part documents of a file")
    messages_column: str = _field("messages", "instruct: column of the chat messages (role, content)")
    prompt_column: str | None = _field(None, "instruct: column of the prompt, instead of messages")
    answer_column: str | None = _field(None, "instruct: column of the answer, with `prompt_column`")
    sequence_length: int | None = _field(None, "tokens per sequence; default: the model's max_position_embeddings")
    document_attention: Literal["across", "within"] = _field(
        "across", "across: attention crosses the documents of a sequence; within: not"
    )
    add_bos: bool = _field(False, "begin each document with the tokenizer's BOS; EOS always ends it")
    streaming: bool = _field(False, "read while training instead of tokenizing first; needs a budget")
    shuffle_buffer: int = _field(10_000, "streaming: documents to shuffle among")
    preprocessing_workers: int | None = _field(
        None, "processes that tokenize; default: one, with the tokenizer's own threads"
    )
    data_cache_dir: str | None = _field(None, "where tokenized data is kept; default: the cache of `datasets`")

    def __post_init__(self) -> None:
        _check_choices(self)
        if not self.dataset:
            raise ValueError("`dataset` is empty: name at least one file, folder, glob or Hub data set")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in [0, 1), got {self.validation_fraction}")
        if self.validation_fraction and self.validation_dataset:
            raise ValueError(
                f"`validation_fraction`={self.validation_fraction} and `validation_dataset`="
                f"{self.validation_dataset}: keep one of them"
            )
        if bool(self.prompt_column) != bool(self.answer_column):
            raise ValueError(
                f"`prompt_column`={self.prompt_column!r} and `answer_column`={self.answer_column!r}: give both"
            )
        for name in ("sequence_length", "max_documents", "max_validation_sequences", "shuffle_buffer"):
            value = getattr(self, name)
            if value is not None and value < 1 + (name == "sequence_length"):
                raise ValueError(f"`{name}`={value} is too small")


@dataclass
class LoraOptions:
    """Fine-tuning of low-rank adapters instead of all weights."""

    _argument_group_name = "lora"

    lora: bool = _field(False, "train LoRA adapters and freeze the model")
    lora_r: int = _field(8, "rank")
    lora_alpha: int = _field(16, "scale")
    lora_dropout: float = _field(0.0, "dropout; attention only")
    lora_attention: bool = _field(True, "adapt attention")
    lora_experts: bool = _field(True, "adapt the experts")
    lora_router: bool = _field(False, "adapt the router")
    lora_merge: bool = _field(False, "also save the model with the adapters merged, in OUTPUT_DIR/merged")


@dataclass
class RunOptions:
    """Budgets, router metrics and resuming, beside the fields of `transformers.TrainingArguments`."""

    _argument_group_name = "training"

    max_train_tokens: int | None = _field(None, "stop after so many tokens")
    max_train_flops: float | None = _field(None, "stop after so many training FLOPs, as routing makes them")
    flops_convention: Literal["matmul", "6nd"] = _field(
        "matmul", "matmul: every product; 6nd: 6 x activated parameters x tokens"
    )
    resume: str = _field("auto", "auto: newest complete checkpoint of OUTPUT_DIR; never; or a checkpoint folder")
    router_metrics: Literal["off", "brief", "per_layer"] = _field("brief", "off, brief or per_layer")
    router_heat_maps: bool = _field(False, "load by expert and layer as pictures to TensorBoard")
    metrics_file: str | None = _field("metrics.jsonl", "all logs as jsonl, in OUTPUT_DIR")


@dataclass
class HMoETrainingArguments(RunOptions, TrainingArguments):
    """`transformers.TrainingArguments` and what [`RunOptions`] adds."""

    output_dir: str | None = _field("runs/train", "folder of checkpoints, logs and model")
    # Metrics are wanted from the first step on: a wrong run should be seen before step 500.
    logging_steps: float = _field(10, "log every so many steps")
    logging_first_step: bool = _field(True, "log the first step too")
    # Every parameter of a bank of experts gets a gradient; the search for others costs time in each step.
    ddp_find_unused_parameters: bool | None = _field(False, "let DDP search for parameters without gradient")

    def __post_init__(self) -> None:
        _check_choices(self)
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
        has_length = self.max_steps > 0 or self.max_train_tokens is not None
        if self.max_train_flops and not has_length and schedule not in OPEN_SCHEDULES:
            raise ValueError(
                f"`lr_scheduler_type`={schedule!r} needs to know the number of steps, and `max_train_flops`="
                f"{self.max_train_flops:g} alone does not tell it (routing decides): give `max_steps` or "
                "`max_train_tokens` too, where the schedule ends, or use 'constant_with_warmup'"
            )


@dataclass
class Arguments:
    """Everything a run is told; `recipe` holds the final values of what recipe and command line set, flat."""

    model: ModelOptions
    tokenizer: TokenizerOptions
    data: DataOptions
    lora: LoraOptions
    training: HMoETrainingArguments
    recipe: dict[str, Any]


OPTION_TYPES = (ModelOptions, TokenizerOptions, DataOptions, LoraOptions, HMoETrainingArguments)


def known_fields() -> dict[str, Any]:
    """Every field a recipe may set, with its default."""
    return {f.name: f.default for options in OPTION_TYPES for f in fields(options) if f.init}
