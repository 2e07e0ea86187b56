"""The tokenizer of a run: given, the checkpoint's own, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from hmoe.sources import Source, check_columns, load_checkpoint

from .arguments import DataOptions, ModelOptions, TokenizerOptions
from .data import read_rows
from .documents import Split, compile_separator, split_text


logger = logging.get_logger(__name__)

END = "<|endoftext|>"
PAD = "<|pad|>"
# ChatML, with answers marked for the loss.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(
    options: TokenizerOptions, model: ModelOptions, data: DataOptions, output_dir: str | Path, *, resuming: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer that `options` ask for.

    A trained one is kept in `output_dir/tokenizer` and read from there by every other process and by a resumed run.

    Raises:
        ValueError: if none is named, or the one of a run that is to be resumed was trained otherwise.
    """
    if options.train_tokenizer is not None:
        folder = Path(output_dir) / "tokenizer"
        if not _is_trained(folder, options, data, resuming):
            _save_trained(folder, options, data)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    else:
        name = options.tokenizer or model.model_name_or_path
        if name is None:
            raise ValueError(
                "no tokenizer: give `tokenizer` (a folder or a Hub name), or `train_tokenizer` (a number of tokens) "
                "to train one on the corpus"
            )
        tokenizer = load_checkpoint(
            AutoTokenizer.from_pretrained, name, "tokenizer", trust_remote_code=model.trust_remote_code
        )
    if options.chat_template is not None:
        tokenizer.chat_template = Path(options.chat_template).expanduser().read_text(encoding="utf-8")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens with END, padding and ChatML turns as special tokens.

    It is the same for the same texts. Every byte has a token, so nothing is unknown and decoding gives back the text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def corpus_texts(data: DataOptions, max_bytes: int) -> Iterator[str]:
    """Training documents of all sources, about the same share of `max_bytes` from each."""
    options = replace(data, streaming=True)
    split = Split(data.validation_fraction)
    separator = compile_separator(data.document_separator)
    for source in (Source.parse(entry) for entry in data.dataset):
        rows = read_rows(source, options)
        column = source.text_column or data.text_column
        if data.task == "pretrain":
            check_columns(rows, [column], source, "text_column")
        left = max_bytes // len(data.dataset)
        for row in rows:
            for text in split_text(_row_text(row, column, data), separator):
                if split.takes(text):
                    yield text
                    left -= len(text.encode("utf-8", "replace"))
            if left <= 0:
                break


def _row_text(row: dict[str, Any], column: str, data: DataOptions) -> str:
    if data.task == "pretrain":
        return row[column] or ""
    if data.prompt_column:
        return f"{row[data.prompt_column]}\n{row[str(data.answer_column)]}"
    return "\n".join(str(message["content"]) for message in row[data.messages_column])


def _identity(options: TokenizerOptions, data: DataOptions) -> dict[str, Any]:
    return {
        "train_tokenizer": options.train_tokenizer,
        "train_tokenizer_bytes": options.train_tokenizer_bytes,
        "dataset": data.dataset,
        "validation_fraction": data.validation_fraction,
        "document_separator": data.document_separator,
    }


def _is_trained(folder: Path, options: TokenizerOptions, data: DataOptions, resuming: bool) -> bool:
    record = folder / "trained_on.json"
    trained = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    if resuming and trained is None:
        raise ValueError(f"cannot resume: the tokenizer of this run is missing from {folder}")
    is_same = trained == _identity(options, data)
    if resuming and not is_same:
        raise ValueError(
            f"cannot resume: the tokenizer in {folder} was trained with {trained}, this run says otherwise"
        )
    return is_same


def _save_trained(folder: Path, options: TokenizerOptions, data: DataOptions) -> None:
    assert options.train_tokenizer is not None
    tokenizer = train_tokenizer(corpus_texts(data, options.train_tokenizer_bytes), options.train_tokenizer)
    if len(tokenizer) < options.train_tokenizer:
        logger.warning(
            f"the corpus gives a tokenizer of {len(tokenizer)} tokens, fewer than `train_tokenizer`="
            f"{options.train_tokenizer}"
        )
    tokenizer.save_pretrained(folder)
    # Written last: a killed run leaves no tokenizer that looks whole.
    record = json.dumps(_identity(options, data), indent=2) + "\n"
    (folder / "trained_on.json").write_text(record, encoding="utf-8")
