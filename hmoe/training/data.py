"""Training and validation data of a run: read, split by document, tokenized with a cache, packed, mixed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from torch.utils.data import Dataset, Subset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, default_data_collator
from transformers.utils import logging

from hmoe import __version__
from hmoe.sources import Source, check_columns, compile_separator, load_source

from .arguments import DataOptions
from .chat import ChatEncoder
from .documents import Split, TextEncoder
from .packing import IGNORE, MixedDataset, PackedDataset, PackedStream, flatten_batch


logger = logging.get_logger(__name__)

STREAM_VALIDATION_SEQUENCES = 512


@dataclass
class DataPart:
    """What is read from one source for training or for validation; counts are None where they are not known."""

    source: Source
    held_out: bool
    documents: int | None = None
    tokens: int | None = None

    def sentence(self) -> str:
        name = Path(self.source.path).name if Path(self.source.path).exists() else self.source.path
        counts = ((self.documents, "documents"), (self.tokens, "tokens"))
        words = [name, *(f"{number:,} {what}" for number, what in counts if number is not None)]
        if self.source.weight is not None and not self.held_out:
            words.append(f"weight {self.source.weight:g}")
        return f"{'validation' if self.held_out else 'training'}: {', '.join(words)}"


@dataclass
class TrainingData:
    """What the trainer reads.

    Attributes:
        train: a mapped data set, or an endless stream.
        collate: makes a batch of a list of its items.
        parts: what was read, for the model card.
    """

    train: Any
    validation: Any | None
    collate: Callable[[list[Any]], dict[str, Any]]
    parts: list[DataPart]


def build_data(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, length: int, *, seed: int = 0, flatten: bool = False
) -> TrainingData:
    """Training and validation data as `options` ask for.

    Args:
        length: tokens per sequence; conversations are cut to it.
        seed: of the order of a stream. The order of mapped data is the trainer's.
        flatten: batches of packed documents become one long row, as FlashAttention needs.

    Raises:
        ValueError: if data are missing, empty, unreadable, or too few for one sequence; see the message.
    """
    sources = [Source.parse(entry) for entry in options.dataset]
    weights = mixture_weights(sources, streaming=options.streaming)
    request = _Request(options, tokenizer, length, sources, weights, seed)
    if options.task == "instruct":
        return _build_instruct(request)
    data = _build_stream(request) if options.streaming else _build_packed(request)
    if flatten and request.within:
        data.collate = flatten_batch
    return data


@dataclass(frozen=True)
class _Request:
    """The arguments of [`build_data`], read."""

    options: DataOptions
    tokenizer: PreTrainedTokenizerBase
    length: int
    sources: list[Source]
    weights: list[float] | None
    seed: int

    @property
    def within(self) -> bool:
        return self.options.document_attention == "within"

    @property
    def train_split(self) -> Split:
        return Split(self.options.validation_fraction)

    @property
    def validation(self) -> tuple[list[Source], Split]:
        """Where validation documents come from: sources of their own, whole, or a part of the training sources."""
        if self.options.validation_dataset:
            return [Source.parse(entry) for entry in self.options.validation_dataset], Split(1.0, held_out=True)
        fraction = self.options.validation_fraction
        return (self.sources if fraction else []), Split(fraction, held_out=True)

    def text_encoder(self, split: Split) -> TextEncoder:
        options = self.options
        return TextEncoder(self.tokenizer, split, compile_separator(options.document_separator), options.add_bos)


def mixture_weights(sources: list[Source], *, streaming: bool) -> list[float] | None:
    """The weights of all sources, or None for their natural sizes.

    Raises:
        ValueError: if some have a weight and others have none, or a stream of several has none.
    """
    given = [source.weight for source in sources if source.weight is not None]
    if len(given) == len(sources):
        return given
    if given:
        without = next(source.path for source in sources if source.weight is None)
        raise ValueError(f"`dataset`: {without!r} has no `weight` but others have: give all of them one, or none")
    if streaming and len(sources) > 1:
        raise ValueError(
            "`streaming` of several sources needs their `weight`s, as their sizes are not known: give entries such "
            f'as {{"path": "{sources[0].path}", "weight": 0.5}}'
        )
    return [1.0] if streaming else None


def _build_packed(request: _Request) -> TrainingData:
    parts: list[DataPart] = []

    def packed(source: Source, split: Split) -> PackedDataset:
        tokenized = _tokenize(source, request, split)
        data = PackedDataset(tokenized, request.length, within=request.within)
        documents = int((_document_lengths(tokenized) > 0).sum())
        parts.append(DataPart(source, split.held_out, documents, data.num_tokens))
        return data

    train = [packed(source, request.train_split) for source in request.sources]
    for part, source in zip(train, request.sources):
        if not len(part):
            raise ValueError(
                f"{source.path!r} holds {part.num_tokens} tokens to train on, fewer than one sequence of "
                f"{request.length}: add text, or lower `sequence_length`"
            )
    chosen, split = request.validation
    validation = [packed(source, split) for source in chosen]
    if validation and not sum(map(len, validation)):
        tokens = sum(part.num_tokens for part in validation)
        raise ValueError(
            f"the validation data hold {tokens} tokens, fewer than one sequence of {request.length}: raise "
            f"`validation_fraction` (now {request.options.validation_fraction}), name a larger `validation_dataset`, "
            "or lower `sequence_length`. A file is one document unless `text_documents` or `document_separator` say "
            "otherwise"
        )
    train_data = train[0] if len(train) == 1 else MixedDataset(train, request.weights)
    held_out = _first(validation, request.options.max_validation_sequences)
    return TrainingData(train_data, held_out, default_data_collator, parts)


def _first(parts: list[PackedDataset], limit: int | None) -> Dataset | None:
    if not parts:
        return None
    whole = parts[0] if len(parts) == 1 else MixedDataset([part for part in parts if len(part)])
    if limit is None or len(whole) <= limit:
        return whole
    # Evenly spread, so that a mixture is represented by all of its sources.
    return Subset(whole, np.linspace(0, len(whole) - 1, limit).astype(int).tolist())


def _raw(source: Source, options: DataOptions) -> tuple[Any, str]:
    """The rows of a source, limited to `max_documents`, and the name of its text column."""
    dataset = load_source(source, options)
    column = source.text_column or options.text_column
    check_columns(dataset, [column], source, "text_column")
    if options.max_documents is not None:
        if options.streaming:
            dataset = dataset.take(options.max_documents)
        else:
            dataset = dataset.select(range(min(options.max_documents, len(dataset))))
    return dataset, column


def _tokenize(source: Source, request: _Request, split: Split) -> Any:
    options = request.options
    dataset, column = _raw(source, options)
    # Known beforehand, so that a split without documents is an empty data set and not an error.
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "bad": datasets.Value("int64")})
    tokenized = _cached_map(
        dataset,
        partial(_encode_column, request.text_encoder(split), column),
        ("text", column, split, options.document_separator, options.add_bos),
        request,
        features,
    )
    _warn_of_documents(tokenized, source)
    return tokenized


def _encode_column(encoder: TextEncoder, column: str, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return encoder([text if isinstance(text, str) else _refuse_value(column, text) for text in rows[column]])


def _refuse_value(column: str, value: Any) -> str:
    if value is None:
        return ""
    raise ValueError(f"column {column!r} holds {type(value).__name__} ({str(value)[:80]!r}), not text")


def _cached_map(
    dataset: Any, function: Callable, identity: tuple, request: _Request, features: datasets.Features | None = None
) -> Any:
    # The fingerprint that `datasets` would take from a tokenizer changes once it has been used.
    known = (dataset._fingerprint, __version__, *identity, _tokenizer_identity(request.tokenizer))
    return dataset.map(
        function,
        batched=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=request.options.preprocessing_workers,
        new_fingerprint=Hasher.hash(known),
        desc="Tokenizing",
    )


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    # Truncation and padding are switched by use, and change nothing here.
    text = re.sub(r'"(truncation|padding)": *(null|\{[^{}]*(\{[^{}]*\}[^{}]*)?\})', "", text)
    return (text, str(tokenizer.special_tokens_map), str(tokenizer.chat_template))


def _column(tokenized: Any, name: str) -> NDArray:
    return tokenized.with_format("numpy")[name][:] if len(tokenized) else np.zeros(0, dtype=np.int64)


def _warn_of_documents(tokenized: Any, source: Source) -> None:
    lengths = _document_lengths(tokenized)
    bad = _column(tokenized, "bad")
    if empty := int((lengths == 0).sum()):
        logger.warning(f"{source.path}: left out {empty} of {len(lengths)} documents that are empty")
    if affected := int((bad > 0).sum()):
        logger.warning(
            f"{source.path}: {affected} of {len(lengths)} documents hold bytes that are not UTF-8, replaced by U+FFFD "
            f"at {int(bad.sum())} places; convert the files to UTF-8 if these are many"
        )


def _document_lengths(tokenized: Any) -> NDArray:
    chunks = tokenized.with_format("arrow").data.column("input_ids").chunks
    return np.concatenate([np.zeros(0, dtype=np.int64), *(np.diff(chunk.offsets.to_numpy()) for chunk in chunks)])


def _build_stream(request: _Request) -> TrainingData:
    def stream(sources: list[Source], split: Split, weights: list[float]) -> PackedStream:
        raw = [_raw(source, request.options) for source in sources]
        rows = [dataset.select_columns([column]) for dataset, column in raw]
        if not split.held_out:
            buffer = request.options.shuffle_buffer
            rows = [dataset.shuffle(seed=request.seed, buffer_size=buffer) for dataset in rows]
        encode = _StreamEncoder(request.text_encoder(split), sources, [column for _, column in raw])
        return PackedStream(rows, weights, encode, request.length, within=request.within, seed=request.seed)

    assert request.weights is not None
    train = stream(request.sources, request.train_split, request.weights)
    parts = [DataPart(source, held_out=False) for source in request.sources]
    chosen, split = request.validation
    if not chosen:
        return TrainingData(train, None, default_data_collator, parts)
    limit = request.options.max_validation_sequences or STREAM_VALIDATION_SEQUENCES
    validation = list(islice(stream(chosen, split, [1.0] * len(chosen)).first_pass(), limit))
    if not validation:
        raise ValueError(
            f"the validation documents of the stream fill no sequence of {request.length}: raise "
            f"`validation_fraction` (now {request.options.validation_fraction}), or lower `sequence_length`"
        )
    parts += [DataPart(source, held_out=True) for source in chosen]
    return TrainingData(train, validation, default_data_collator, parts)


@dataclass
class _StreamEncoder:
    """Documents of streamed rows; says once for each source if bytes are not UTF-8."""

    encoder: TextEncoder
    sources: list[Source]
    columns: list[str]
    warned: set[int] = field(default_factory=set)

    def __call__(self, index: int, rows: list[dict[str, Any]]) -> list[NDArray]:
        encoded = self.encoder([_text_of(row, self.columns[index]) for row in rows])
        if index not in self.warned and any(encoded["bad"]):
            self.warned.add(index)
            logger.warning(
                f"{self.sources[index].path}: documents hold bytes that are not UTF-8, replaced by U+FFFD (said once)"
            )
        return [ids for ids in encoded["input_ids"] if len(ids)]


def _text_of(row: dict[str, Any], column: str) -> str:
    value = row[column]
    return value if isinstance(value, str) else _refuse_value(column, value)


def _build_instruct(request: _Request) -> TrainingData:
    options = request.options
    if options.streaming:
        raise ValueError("`streaming` is for `task`='pretrain': instruction data are small, leave it out")
    parts: list[DataPart] = []

    def encoded(source: Source, split: Split) -> Any:
        rows = _encode_source(source, request, split)
        parts.append(DataPart(source, split.held_out, len(rows)))
        return rows

    train = [encoded(source, request.train_split) for source in request.sources]
    for part, source in zip(train, request.sources):
        if not len(part):
            raise ValueError(f"{source.path!r} holds no conversation with an answer within {request.length} tokens")
    chosen, split = request.validation
    validation = [part for part in (encoded(source, split) for source in chosen) if len(part)]
    if chosen and not validation:
        raise ValueError(
            f"`validation_fraction`={options.validation_fraction} holds out no conversation: raise it, or name a "
            "`validation_dataset`"
        )
    held_out = datasets.concatenate_datasets(validation) if validation else None
    if held_out is not None and options.max_validation_sequences is not None:
        held_out = held_out.select(range(min(options.max_validation_sequences, len(held_out))))
    train_data = train[0] if len(train) == 1 else MixedDataset(train, request.weights)
    collate = DataCollatorForSeq2Seq(with_padding(request.tokenizer), padding=True, label_pad_token_id=IGNORE)
    return TrainingData(train_data, held_out, collate, parts)


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy that pads with EOS where it has no padding token."""
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _encode_source(source: Source, request: _Request, split: Split) -> Any:
    options = request.options
    encoder = ChatEncoder(
        request.tokenizer, request.length, options.messages_column, options.prompt_column, options.answer_column, split
    )
    dataset = load_source(source, options)
    option = "messages_column" if options.prompt_column is None else "prompt_column, answer_column"
    check_columns(dataset, encoder.columns, source, option)
    if options.max_documents is not None:
        dataset = dataset.select(range(min(options.max_documents, len(dataset))))
    identity = ("chat", encoder.columns, split, request.length)
    rows = _cached_map(dataset, partial(_encode_chats, encoder), identity, request)
    return _keep_answers(rows, source, request.length)


def _encode_chats(encoder: ChatEncoder, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return encoder(rows)


def _keep_answers(rows: Any, source: Source, length: int) -> Any:
    if not len(rows):
        return rows
    kept = rows.filter(
        lambda labels: any(label != IGNORE for label in labels), input_columns="labels", desc="Checking"
    )
    if dropped := len(rows) - len(kept):
        logger.warning(f"{source.path}: left out {dropped} of {len(rows)} conversations without an answer to learn")
    if cut := sum(kept["cut"]):
        logger.warning(f"{source.path}: cut {cut} of {len(kept)} conversations to `sequence_length`={length}")
    return kept.remove_columns("cut")
