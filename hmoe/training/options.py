"""What a training run is told, apart from the fields of `transformers.TrainingArguments`.

Imports nothing heavy, so that `hmoe train --help` is instant.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


TASKS = ("pretrain", "instruct")
TEXT_DOCUMENTS = ("file", "line", "paragraph")
DOCUMENT_ATTENTION = ("across", "within")
ROUTER_METRICS = ("off", "brief", "per_layer")


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}")


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
    model_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "config fields over those of preset, checkpoint or type; --model_config.FIELD VALUE sets one"
        },
    )
    dtype: str | None = _field(None, "of the weights: float32, bfloat16, auto; default float32, mixed by --bf16")
    attn_implementation: str | None = _field(None, "sdpa, eager, flash_attention_2, flex_attention")
    experts_implementation: str | None = _field(None, "eager, grouped_mm, batched_mm, triton")
    trust_remote_code: bool = _field(False, "run the code that a checkpoint or tokenizer carries")
    distributed: dict | str | None = field(
        default=None,
        metadata={
            "help": "sharding by Transformers, fields of its DistributedConfig: fsdp_size, tp_size, ep_size; "
            "--distributed.ep_size 2 sets one"
        },
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

    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files, folders or globs of txt, jsonl, json, parquet or csv (.gz, .xz, .bz2, .zst too), folders "
            "of `save_to_disk`, or Hub names; several make a mixture. An entry may be a mapping (JSON on the command "
            "line) with path, weight, name, split, format, text_column, data_files"
        },
    )
    validation_dataset: list[str] = field(
        default_factory=list, metadata={"help": "the same, held out; default: a part of `dataset`"}
    )
    validation_fraction: float = _field(0.0, "share of the documents held out, chosen by a hash of their text")
    max_validation_sequences: int | None = _field(None, "evaluate on this many sequences; 512 when streaming")
    max_documents: int | None = _field(None, "use only the first so many rows of each source")
    task: str = _field("pretrain", "pretrain: loss on every token; instruct: loss on answers only")
    text_column: str = _field("text", "column of the text in jsonl, parquet and Hub data")
    text_documents: str = _field("file", "what a document is in text files: file, line or paragraph")
    document_separator: str | None = _field(None, "regular expression of the lines that part documents of a file")
    messages_column: str = _field("messages", "instruct: column of the chat messages (role, content)")
    prompt_column: str | None = _field(None, "instruct: column of the prompt, instead of messages")
    answer_column: str | None = _field(None, "instruct: column of the answer, with `prompt_column`")
    sequence_length: int | None = _field(None, "tokens per sequence; default: the model's max_position_embeddings")
    document_attention: str = _field("across", "across: attention crosses the documents of a sequence; within: not")
    add_bos: bool = _field(False, "begin each document with the tokenizer's BOS; EOS always ends it")
    streaming: bool = _field(False, "read while training instead of tokenizing first; needs a budget")
    shuffle_buffer: int = _field(10_000, "streaming: documents to shuffle among")
    preprocessing_workers: int | None = _field(
        None, "processes that tokenize; default: one, with the tokenizer's own threads"
    )
    data_cache_dir: str | None = _field(None, "where tokenized data is kept; default: the cache of `datasets`")

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        check_choice("text_documents", self.text_documents, TEXT_DOCUMENTS)
        check_choice("document_attention", self.document_attention, DOCUMENT_ATTENTION)
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
    """Budgets, router metrics and resuming."""

    _argument_group_name = "run"

    max_train_tokens: int | None = _field(None, "stop after so many tokens")
    max_train_flops: float | None = _field(None, "stop after so many training FLOPs, as routing makes them")
    flops_convention: str = _field("matmul", "matmul: every product; 6nd: 6 x activated parameters x tokens")
    resume: str = _field("auto", "auto: newest complete checkpoint of OUTPUT_DIR; never; or a checkpoint folder")
    router_metrics: str = _field("brief", "off, brief or per_layer")
    router_heat_maps: bool = _field(False, "load by expert and layer as pictures to TensorBoard")
    metrics_file: str | None = _field("metrics.jsonl", "all logs as jsonl, in OUTPUT_DIR")


SECTIONS = (ModelOptions, TokenizerOptions, DataOptions, LoraOptions, RunOptions)
