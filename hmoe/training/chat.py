"""Conversations as token ids, with labels on the answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .documents import TRAIN_ON_ALL, Split
from .packing import IGNORE


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
    split: Split = TRAIN_ON_ALL

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
            if not self.split.takes(json.dumps(values, sort_keys=True, default=str)):
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
        if "endgeneration" in str(self.tokenizer.chat_template):
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
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._render(messages[:index], prompt=True) if index else ""
            after = self._render(messages[: index + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "the chat template renders a conversation differently once more messages follow, so the answers "
                    "cannot be told from the rest: mark them in the template with {% generation %}, and give the "
                    "file as `chat_template`"
                )
            spans.append((len(before), len(after)))
        return spans
