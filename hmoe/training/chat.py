"""From rows of text or chats to token ids, on one side of the split between training and validation."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .packing import IGNORE


@dataclass(frozen=True)
class Side:
    """The documents of a split: those whose hash lies below `fraction` (`held_out`), or the others.

    The hash is of the text, so the split depends on nothing else, and copies of a text are on the same side.
    """

    fraction: float = 0.0
    held_out: bool = False

    def takes(self, text: str) -> bool:
        if self.fraction == 0:
            return not self.held_out
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return (int.from_bytes(digest, "big") < self.fraction * 2**64) == self.held_out


@dataclass(frozen=True)
class TextEncoder:
    """Documents of token ids, each ended by EOS, from texts.

    An empty document gives an empty list, so that it can be counted. `bad` counts characters that the reader put in
    place of bytes that are not UTF-8.
    """

    tokenizer: PreTrainedTokenizerBase
    side: Side = Side()
    separator: re.Pattern[str] | None = None
    add_bos: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, which separates documents: set its `eos_token`")
        if self.add_bos and self.tokenizer.bos_token_id is None:
            raise ValueError("`add_bos` is set, but the tokenizer has no BOS token: leave it out")

    def __call__(self, texts: list[str | None]) -> dict[str, list[Any]]:
        """Columns `input_ids` and `bad`, one entry a document of this side."""
        documents = [
            part for text in texts for part in self.split(text or "", self.separator) if self.side.takes(part)
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

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    @staticmethod
    def split(text: str, separator: re.Pattern[str] | None) -> list[str]:
        """The documents of a text; an empty text is one empty document."""
        text = text.removeprefix("\ufeff")
        if separator is None:
            return [text.strip("\n")] if text.strip() else [""]
        # What stands before the first separator is a document only if it holds something.
        parts = [part.strip("\n") for part in separator.split(text)]
        return [part for part in parts if part.strip()]


@dataclass(frozen=True)
class ChatEncoder:
    """Token ids and labels of conversations; labels are set on answers only, and on what ends them.

    Answers are what a chat template marks with `{% generation %}`. In a template without these marks they are what
    each assistant message adds to the rendered text after its generation prompt.

    Attributes:
        prompt, answer: columns of plain pairs, which need no template; else `messages` holds lists of role, content.
        max_length: longer conversations are cut.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    messages: str = "messages"
    prompt: str | None = None
    answer: str | None = None
    side: Side = Side()

    def __post_init__(self) -> None:
        if self.prompt is None and not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: give a file as `chat_template`, or use `prompt_column` and "
                "`answer_column` for plain pairs"
            )

    @property
    def columns(self) -> list[str]:
        return [self.messages] if self.prompt is None else [self.prompt, str(self.answer)]

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns `input_ids`, `labels`, `cut`; `labels` are all -100 where no answer is left."""
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "cut": []}
        for values in zip(*(rows[name] for name in self.columns)):
            if not self.side.takes(json.dumps(values, sort_keys=True, default=str)):
                continue
            ids, is_answer = self._pair(*values) if self.prompt else self._conversation(values[0])
            labels = [token if answer else IGNORE for token, answer in zip(ids, is_answer)]
            columns["input_ids"].append(ids[: self.max_length])
            columns["labels"].append(labels[: self.max_length])
            columns["cut"].append(len(ids) > self.max_length)
        return columns

    def _pair(self, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
        before = self.tokenizer(prompt or "", verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if before and before[-1] == eos:
            before = before[:-1]
        after = self.tokenizer(answer or "", add_special_tokens=False, verbose=False)["input_ids"]
        if after:
            after = [*after, eos]
        return before + after, [False] * len(before) + [True] * len(after)

    def _conversation(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        if "generation" in str(self.tokenizer.chat_template) and "endgeneration" in str(self.tokenizer.chat_template):
            encoded = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
        text = self._render(messages)
        spans = self._answer_spans(messages, text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        inside = [any(a <= begin < b for a, b in spans) for begin, _ in encoded["offset_mapping"]]
        return encoded["input_ids"], inside

    def _render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    def _answer_spans(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:number], prompt=True) if number else ""
            after = self._render(messages[: number + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "the chat template renders a conversation differently once more messages follow, so the answers "
                    "cannot be told from the rest: mark them in the template with {% generation %}, and give the "
                    "file as `chat_template`"
                )
            spans.append((len(before), len(after)))
        return spans
