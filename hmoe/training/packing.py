"""Documents packed end to end into sequences of one length: from tokenized data on disk, or from a stream."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, count
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.data.data_collator import default_data_collator


IGNORE = -100


def make_sequence(ids: NDArray, starts: NDArray | None = None) -> dict[str, Tensor]:
    """Model inputs of one sequence.

    Args:
        ids: [S].
        starts: where documents start in it, ascending. If given, positions count from each start, from which
            Transformers derives attention that does not cross documents, and a first token is not predicted.

    Returns:
        `input_ids` and `labels` [S], and with `starts` `position_ids` [S].
    """
    tokens = torch.from_numpy(ids.astype(np.int64))
    if starts is None:
        return {"input_ids": tokens, "labels": tokens.clone()}
    first = np.zeros(len(ids), dtype=np.int64)
    first[starts] = starts
    positions = torch.arange(len(ids)) - torch.from_numpy(np.maximum.accumulate(first))
    return {"input_ids": tokens, "labels": tokens.masked_fill(positions == 0, IGNORE), "position_ids": positions}


class PackedDataset(Dataset):
    """Sequence i is tokens i * length .. (i + 1) * length of all documents one after another.

    Reads slices of the memory-mapped Arrow column `input_ids`, so nothing is copied or kept in memory. The tokens
    after the last whole sequence are left out.

    Args:
        tokenized: a `datasets.Dataset` with a column `input_ids` of lists of integers.
        within: mark the documents, so that attention stays within them.
    """

    def __init__(self, tokenized: datasets.Dataset, length: int, *, within: bool = False):
        self.tokenized = tokenized
        self.length = length
        self.within = within
        self.num_tokens = len(self._tokens)

    @cached_property
    def _tokens(self) -> pa.ChunkedArray:
        """All documents as one array, whose chunks lie in the file."""
        column = self.tokenized.data.column("input_ids")
        return pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)

    @property
    def document_lengths(self) -> NDArray:
        return pc.list_value_length(self.tokenized.data.column("input_ids")).to_numpy()

    @cached_property
    def _starts(self) -> NDArray:
        """Where each document starts among all tokens."""
        lengths = self.document_lengths
        return np.cumsum(lengths, dtype=np.int64) - lengths

    def __getstate__(self) -> dict[str, Any]:
        # Arrow would copy the tokens into a pickle; a process that gets this opens the file.
        return {name: value for name, value in self.__dict__.items() if name not in ("_tokens", "_starts")}

    def __len__(self) -> int:
        return self.num_tokens // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        begin = (index % len(self)) * self.length
        ids = self._tokens.slice(begin, self.length).to_numpy()
        return make_sequence(ids, _starts_within(self._starts, begin, self.length) if self.within else None)


def _starts_within(starts: NDArray, begin: int, length: int) -> NDArray:
    """Where the documents of a sequence start in it, from ascending `starts` in all tokens; the first is its own."""
    first, last = np.searchsorted(starts, [begin, begin + length])
    return np.union1d(starts[first:last] - begin, [0])


class MixedDataset(Dataset):
    """Data sets one after another, each repeated until it has its share.

    Without weights every item comes once. With weights the data set that is largest relative to its weight comes once,
    and the others are repeated.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float] | None = None):
        self.parts = list(parts)
        sizes = [len(part) for part in self.parts]  # type: ignore[arg-type]
        if weights is not None:
            total = max(size * sum(weights) / weight for size, weight in zip(sizes, weights))
            sizes = [round(total * weight / sum(weights)) for weight in weights]
        self.ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        part = bisect_right(self.ends, index)
        offset = index - (self.ends[part - 1] if part else 0)
        return self.parts[part][offset % len(self.parts[part])]  # type: ignore[arg-type]


class PackedStream(IterableDataset):
    """Sequences from streamed documents, without end: each pass over a source shuffles it anew.

    The order depends on `seed` alone, so that a resumed run finds its place by skipping what it has read.

    Args:
        sources: `datasets.IterableDataset`s with a column `input_ids` of documents, already shuffled with a seed.
        weights: how often a sequence comes from each source.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        weights: Sequence[float],
        length: int,
        *,
        within: bool = False,
        seed: int = 0,
    ):
        self.sources = list(sources)
        self.weights = np.asarray(weights, dtype=np.float64) / sum(weights)
        self.length = length
        self.within = within
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        choose = np.random.default_rng([self.seed, worker.id if worker else 0])
        streams = [self._sequences(self._documents(source, count())) for source in self.sources]
        while True:
            sequence = next(streams[choose.choice(len(streams), p=self.weights)], None)
            if sequence is None:
                return
            yield sequence

    def first_pass(self) -> Iterator[dict[str, Tensor]]:
        """The sequences of one pass over the sources, one source after another."""
        for source in self.sources:
            yield from self._sequences(self._documents(source, range(1)))

    def _documents(self, source: Any, epochs: Iterable[int]) -> Iterator[NDArray]:
        for epoch in epochs:
            source.set_epoch(epoch)
            found = False
            for row in source:
                if len(row["input_ids"]):
                    found = True
                    yield row["input_ids"]
            if not found:
                if get_worker_info() is None:
                    raise ValueError("a streamed source holds no document: all are empty or held out")
                return  # more loader workers than shards

    def _sequences(self, documents: Iterable[NDArray]) -> Iterator[dict[str, Tensor]]:
        waiting: list[NDArray] = []
        size = 0
        for document in documents:
            waiting.append(document)
            size += len(document)
            if size < self.length:
                continue
            tokens = np.concatenate(waiting)
            starts = np.cumsum([0, *map(len, waiting)])
            begin = 0
            while size - begin >= self.length:
                marks = _starts_within(starts, begin, self.length) if self.within else None
                yield make_sequence(tokens[begin : begin + self.length], marks)
                begin += self.length
            waiting, size = [tokens[begin:]], size - begin


def flatten_batch(sequences: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One row [1, B * S] from B sequences with `position_ids`: the form from which FlashAttention tells documents."""
    batch = default_data_collator(sequences)
    return {name: values.reshape(1, -1) for name, values in batch.items()}
