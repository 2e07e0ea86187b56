"""Training and validation data of a run: read, split by document, tokenized with a cache, packed, mixed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from torch.utils.data import Subset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, default_data_collator
from transformers.utils import logging

from hmoe import __version__
from hmoe.sources import Source, check_columns, load_source

from .arguments import DataOptions
from .chat import ChatEncoder
from .documents import Split, TextEncoder, compile_separator
from .packing import IGNORE, MixedDataset, PackedDataset, PackedStream, flatten_batch


logger = logging.get_logger(__name__)

STREAM_VALIDATION_SEQUENCES = 512
STREAM_BATCH = 64


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
    if options.streaming and options.task == "instruct":
        raise ValueError("`streaming` is for `task`='pretrain': instruction data are small, leave it out")
    data = _build_stream(request) if options.streaming else _build_mapped(request)
    if flatten and request.within and options.task == "pretrain":
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

    def text_encoder(self, source: Source, split: Split) -> TextEncoder:
        options = self.options
        separator = compile_separator(options.document_separator)
        column = source.text_column or options.text_column
        return TextEncoder(self.tokenizer, column, split, separator, options.add_bos)

    def chat_encoder(self, split: Split) -> ChatEncoder:
        options = self.options
        columns = (options.messages_column, options.prompt_column, options.answer_column)
        return ChatEncoder(self.tokenizer, self.length, *columns, split)

    def rows(self, source: Source, columns: list[str], option: str) -> Any:
        """The first `max_documents` rows of a source, which must have `columns`; `option` sets their names."""
        dataset = read_rows(source, self.options)
        check_columns(dataset, columns, source, option)
        limit = self.options.max_documents
        if limit is None:
            return dataset
        return dataset.take(limit) if self.options.streaming else dataset.select(range(min(limit, len(dataset))))

    def tokenize(self, dataset: Any, encoder: Callable, identity: tuple, features: datasets.Features | None) -> Any:
        """The rows as token ids, from the cache of `datasets` if it has them; `identity` is what they depend on."""
        # The fingerprint that `datasets` would take from a tokenizer changes once it has been used.
        known = (dataset._fingerprint, __version__, *identity, _tokenizer_identity(self.tokenizer))
        return dataset.map(
            encoder,
            batched=True,
            remove_columns=dataset.column_names,
            features=features,
            num_proc=self.options.preprocessing_workers,
            new_fingerprint=Hasher.hash(known),
            desc="Tokenizing",
        )


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


def read_rows(source: Source, options: DataOptions) -> Any:
    """The raw rows of a source, text files parted as `options` ask for."""
    whole = options.document_separator is not None or options.text_documents == "file"
    sample_by = "document" if whole else options.text_documents
    return load_source(source, streaming=options.streaming, sample_by=sample_by, cache_dir=options.data_cache_dir)


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    # Truncation and padding are switched by use, and change nothing here.
    text = re.sub(r'"(truncation|padding)": *(null|\{[^{}]*(\{[^{}]*\}[^{}]*)?\})', "", text)
    return (text, str(tokenizer.special_tokens_map), str(tokenizer.chat_template))


def _build_mapped(request: _Request) -> TrainingData:
    """Data that are tokenized before training: documents, packed, or conversations."""
    options, are_chats = request.options, request.options.task == "instruct"
    read = _read_conversations if are_chats else _read_documents
    train = [read(request, source, request.train_split) for source in request.sources]
    chosen, split = request.validation
    validation = [read(request, source, split) for source in chosen]
    filled = [data for data, _ in validation if len(data)]
    if validation and not filled:
        found = (
            f"{sum(part.tokens or 0 for _, part in validation)} tokens, fewer than one sequence of {request.length}"
        )
        if are_chats:
            found = f"no conversation with an answer within {request.length} tokens"
        if not are_chats:
            num_tokens = sum(data.num_tokens for data, _ in validation)
            found = (
                f"{num_tokens} tokens, fewer than one sequence of {request.length} (a text file is one document, "
                "unless `text_documents` or `document_separator` say otherwise)"
            )
        raise ValueError(
            f"the validation data hold {found}: raise `validation_fraction` (now {options.validation_fraction}), name "
            f"a larger `validation_dataset`, or {'raise' if are_chats else 'lower'} `sequence_length`"
        )
    held_out = _mix(filled)
    limit = options.max_validation_sequences
    if held_out is not None and limit is not None and limit < len(held_out):
        # Sequences are evenly spread, so that a mixture is represented by all of its sources.
        spread = np.linspace(0, len(held_out) - 1, limit).astype(int).tolist()
        held_out = Subset(held_out, range(limit) if are_chats else spread)
    collate = default_data_collator
    if are_chats:
        collate = DataCollatorForSeq2Seq(with_padding(request.tokenizer), padding=True, label_pad_token_id=IGNORE)
    parts = [part for _, part in [*train, *validation]]
    return TrainingData(_mix([data for data, _ in train], request.weights), held_out, collate, parts)


def _mix(data: list[Any], weights: list[float] | None = None) -> Any:
    if len(data) > 1:
        return MixedDataset(data, weights)
    return data[0] if data else None


def _read_documents(request: _Request, source: Source, split: Split) -> tuple[PackedDataset, DataPart]:
    options, encoder = request.options, request.text_encoder(source, split)
    rows = request.rows(source, [encoder.column], "text_column")
    # Known beforehand, so that a split without documents is an empty data set and not an error.
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "bad": datasets.Value("int64")})
    identity = ("text", encoder.column, split, options.document_separator, options.add_bos)
    tokenized = request.tokenize(rows, encoder, identity, features)
    data = PackedDataset(tokenized, request.length, within=request.within)
    lengths, bad = data.document_lengths, tokenized.data.column("bad").to_numpy()
    if empty := int((lengths == 0).sum()):
        logger.warning(f"{source.path}: left out {empty} of {len(lengths)} documents that are empty")
    if affected := int((bad > 0).sum()):
        logger.warning(
            f"{source.path}: {affected} of {len(lengths)} documents hold bytes that are not UTF-8, replaced by U+FFFD "
            f"at {int(bad.sum())} places; convert the files to UTF-8 if these are many"
        )
    if not (len(data) or split.held_out):
        raise ValueError(
            f"{source.path!r} holds {data.num_tokens} tokens to train on, fewer than one sequence of "
            f"{request.length}: add text, or lower `sequence_length`"
        )
    return data, DataPart(source, split.held_out, len(lengths) - empty, data.num_tokens)


def _read_conversations(request: _Request, source: Source, split: Split) -> tuple[datasets.Dataset, DataPart]:
    encoder = request.chat_encoder(split)
    option = "messages_column" if encoder.prompt is None else "prompt_column, answer_column"
    rows = request.rows(source, encoder.columns, option)
    encoded = request.tokenize(rows, encoder, ("chat", encoder.columns, split, request.length), None)
    data = _keep_answers(encoded, source, request.length)
    if not (len(data) or split.held_out):
        raise ValueError(f"{source.path!r} holds no conversation with an answer within {request.length} tokens")
    return data, DataPart(source, split.held_out, len(data))


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


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy that pads with EOS where it has no padding token."""
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _build_stream(request: _Request) -> TrainingData:
    def stream(sources: list[Source], split: Split, weights: list[float]) -> PackedStream:
        documents = [_stream_documents(request, source, split) for source in sources]
        return PackedStream(documents, weights, request.length, within=request.within, seed=request.seed)

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


def _stream_documents(request: _Request, source: Source, split: Split) -> datasets.IterableDataset:
    """Documents of token ids, encoded as they are read; training documents are shuffled."""
    encoder = request.text_encoder(source, split)
    rows = request.rows(source, [encoder.column], "text_column").select_columns([encoder.column])
    if not split.held_out:
        rows = rows.shuffle(seed=request.seed, buffer_size=request.options.shuffle_buffer)
    encode = _StreamEncoder(encoder, source.path)
    return rows.map(encode, batched=True, batch_size=STREAM_BATCH, remove_columns=[encoder.column])


@dataclass
class _StreamEncoder:
    """Encodes streamed rows; says once if bytes are not UTF-8."""

    encoder: TextEncoder
    path: str
    warned: bool = False

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = self.encoder(rows)
        if not self.warned and any(encoded["bad"]):
            self.warned = True
            logger.warning(f"{self.path}: documents hold bytes that are not UTF-8, replaced by U+FFFD (said once)")
        return encoded
