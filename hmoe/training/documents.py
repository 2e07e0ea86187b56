"""Documents: which of them are held out, and their token ids."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Split:
    """The documents to train on, or those that are held out: a share `fraction`, by a hash of their text.

    The split depends on the text alone, so copies of a document are all held out or none is.
    """

    fraction: float = 0.0
    held_out: bool = False

    def takes(self, text: str) -> bool:
        if self.fraction == 0:
            return not self.held_out
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return (int.from_bytes(digest, "big") < self.fraction * 2**64) == self.held_out


TRAIN_ON_ALL = Split()


@dataclass(frozen=True)
class TextEncoder:
    """Documents of token ids, each ended by EOS, from the texts in `column` of some rows.

    An empty document gives an empty list, so that it can be counted. `bad` counts characters that the reader put in
    place of bytes that are not UTF-8.
    """

    tokenizer: PreTrainedTokenizerBase
    column: str = "text"
    split: Split = TRAIN_ON_ALL
    separator: re.Pattern[str] | None = None
    add_bos: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, which separates documents: set its `eos_token`")
        if self.add_bos and self.tokenizer.bos_token_id is None:
            raise ValueError("`add_bos` is set, but the tokenizer has no BOS token: leave it out")

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns `input_ids` and `bad`, one entry a document of this split.

        Raises:
            ValueError: for a value that is neither text nor null.
        """
        documents = [
            part
            for value in rows[self.column]
            for part in split_text(self._text(value), self.separator)
            if self.split.takes(part)
        ]
        filled = [text for text in documents if text]
        encoded = iter(self._ids(filled) if filled else [])  # a tokenizer refuses an empty batch
        begin = [self.tokenizer.bos_token_id] if self.add_bos else []
        columns: dict[str, list[Any]] = {"input_ids": [], "bad": []}
        for text in documents:
            tokens = [*begin, *next(encoded), self.tokenizer.eos_token_id] if text else []
            columns["input_ids"].append(np.asarray(tokens, dtype=np.int32))
            columns["bad"].append(text.count("\ufffd"))
        return columns

    def _text(self, value: Any) -> str:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"column {self.column!r} holds {type(value).__name__} ({str(value)[:80]!r}), not text")
        return value or ""

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def split_text(text: str, separator: re.Pattern[str] | None) -> list[str]:
    """The documents of a text; an empty text is one empty document."""
    text = text.removeprefix("\ufeff")
    if separator is None:
        return [text.strip("\n")] if text.strip() else [""]
    # What stands before the first separator is a document only if it holds something.
    parts = [part.strip("\n") for part in separator.split(text)]
    return [part for part in parts if part.strip()]


def compile_separator(pattern: str | None) -> re.Pattern[str] | None:
    """The regular expression of the lines that part documents."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"`document_separator`={pattern!r} is not a regular expression: {error}") from None
