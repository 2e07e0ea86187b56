"""Runs a model over a text once and yields each batch with its losses and routes.

Letters in shapes: B batch, S sequence, T = B * S tokens, E experts, K expert slots per token, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmoe.metrics import IGNORED_LABEL, score_tokens
from hmoe.routers import RouterTap


@dataclass(frozen=True)
class Observation:
    """One batch.

    Attributes:
        input_ids: [B, S].
        mask: [B, S], False at padding.
        predictions: [B, S], the most probable id of each token given those before it.
        loss: [B, S], cross-entropy in nats of each token given those before it; NaN for the first token of a row and
            for padding.
        logits: per MoE layer, router logits [T, E]; none for a dense model.
        index: per MoE layer, ids of the activated experts [T, K], most probable first; E marks an unused slot.
    """

    input_ids: Tensor
    mask: Tensor
    predictions: Tensor
    loss: Tensor
    logits: list[Tensor]
    index: list[Tensor]

    def scored(self) -> dict[str, Tensor]:
        """Inputs of [`hmoe.metrics.held_out_metrics`]: predicted and true ids and losses, [B, S] each."""
        references = self.input_ids.masked_fill(self.loss.isnan(), IGNORED_LABEL)
        return {"predictions": self.predictions, "references": references, "losses": self.loss}


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Iterator[Observation]:
    """Runs `model` over batches of `input_ids` and, where rows are padded, `attention_mask`; one at a time."""
    device = next(model.parameters()).device
    routes: list[tuple[Tensor, Tensor]] = []  # of the batch at hand, by layer
    model.eval()
    with RouterTap(model, lambda _, logits, index: routes.append((logits, index))):
        for batch in batches:
            routes.clear()
            input_ids = batch["input_ids"].to(device)
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(device)
            outputs = model(input_ids=input_ids, attention_mask=mask, use_cache=False)
            predictions, loss = score_tokens(outputs.logits, input_ids)
            # A token is predicted by the one before it in its row.
            predicted = F.pad(mask[:, 1:] * mask[:, :-1], (1, 0)).bool()
            loss = loss.masked_fill(~predicted, torch.nan)
            logits, index = [layer[0] for layer in routes], [layer[1] for layer in routes]
            yield Observation(input_ids, mask.bool(), predictions, loss, logits, index)


def windows(
    documents: Iterable[str], tokenizer: Any, length: int, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Rows of `length` tokens, cut from all documents in one stream; the last part row is dropped.

    A document ends with the tokenizer's end-of-sequence token where it has one.

    Raises:
        ValueError: if there is not one whole row.
    """
    stream: list[int] = []
    num_rows = num_tokens = 0
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        num_tokens += len(ids)
        stream += ids
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            stream.append(tokenizer.eos_token_id)
        while len(stream) >= length:
            if max_tokens is not None and num_rows and (num_rows + 1) * length > max_tokens:
                return
            yield stream[:length]
            num_rows += 1
            del stream[:length]
    if not num_rows:
        raise ValueError(
            f"the text has {num_tokens} tokens, fewer than one window of {length}: lower --window or give more text"
        )


def batches(rows: Iterable[list[int]], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Rows in batches; the last one may be smaller."""
    remaining = iter(rows)
    while batch := list(islice(remaining, batch_size)):
        yield {"input_ids": torch.tensor(batch)}
