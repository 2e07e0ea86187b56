"""Whether tokens keep their route while a model trains.

MoDSE (arXiv 2409.12210, Tables 7-8) compares tokens per expert at several epochs, but equal counts can come from
different tokens. Here every checkpoint reads the same tokens, and their routes are compared one by one. Only the first
tokens of the text are kept, which bounds the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hmoe.routers import activated_experts

from .observe import Observation


class RouteSample:
    """Routes of the first `max_tokens` tokens, bit-packed: E / 8 + 2 bytes per token and layer."""

    def __init__(self, num_experts: list[int], max_tokens: int):
        self.num_experts = num_experts
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._ids: list[np.ndarray] = []
        self._sets: list[list[np.ndarray]] = [[] for _ in num_experts]
        self._first: list[list[np.ndarray]] = [[] for _ in num_experts]

    def update(self, observation: Observation) -> None:
        room = self.max_tokens - self.num_tokens
        if room <= 0:
            return
        real = observation.mask.reshape(-1).nonzero().squeeze(1)[:room]
        self.num_tokens += len(real)
        self._ids.append(observation.input_ids.reshape(-1)[real].cpu().numpy().astype(np.int32))
        for layer, index in enumerate(observation.index):
            chosen = index[real.to(index.device)].cpu()
            self._sets[layer].append(np.packbits(activated_experts(chosen, self.num_experts[layer]).numpy(), axis=1))
            self._first[layer].append(chosen[:, 0].numpy().astype(np.int16))

    def tokens(self) -> np.ndarray:
        return np.concatenate(self._ids)

    def first_choices(self, layer: int) -> np.ndarray:
        """[tokens], the most probable expert."""
        return np.concatenate(self._first[layer])

    def activated_sets(self, layer: int) -> np.ndarray:
        """[tokens, E], whether the expert is activated."""
        packed = np.concatenate(self._sets[layer])
        return np.unpackbits(packed, axis=1, count=self.num_experts[layer]).astype(bool)


def agreement(earlier: RouteSample, later: RouteSample) -> list[dict[str, float]]:
    """Per layer, how alike two checkpoints route the same tokens.

    | entry | meaning |
    |---|---|
    | `first_choice` | tokens whose most probable expert is the same |
    | `first_choice_chance` | the same, if each token's choice were drawn anew with the two checkpoints' loads |
    | `jaccard` | activated in both / activated in either, mean over tokens |
    | `saturation` | of the experts that a token activates later, those it activated before (OLMoE, arXiv 2409.02060) |

    Raises:
        ValueError: if the samples hold different tokens or experts.
    """
    if earlier.num_experts != later.num_experts:
        raise ValueError(
            f"checkpoints with {earlier.num_experts} and {later.num_experts} experts per layer cannot be compared: "
            "give checkpoints of one training run"
        )
    if not np.array_equal(earlier.tokens(), later.tokens()):
        raise ValueError("the checkpoints have not read the same tokens: use one text, window and tokenizer for all")
    rows = []
    for layer, num_experts in enumerate(later.num_experts):
        first = [sample.first_choices(layer) for sample in (earlier, later)]
        sets = [sample.activated_sets(layer) for sample in (earlier, later)]
        shares = [np.bincount(choice, minlength=num_experts) / len(choice) for choice in first]
        both = (sets[0] & sets[1]).sum(1)
        rows.append(
            {
                "first_choice": float((first[0] == first[1]).mean()),
                "first_choice_chance": float((shares[0] * shares[1]).sum()),
                "jaccard": float((both / (sets[0] | sets[1]).sum(1)).mean()),
                "saturation": float((both / sets[1].sum(1)).mean()),
            }
        )
    return rows


def stability(runs: Sequence[tuple[str, RouteSample]]) -> dict[str, Any]:
    """Agreement of neighbours in time, and of each checkpoint with the last one, from their names and samples."""

    def compare(earlier: tuple[str, RouteSample], later: tuple[str, RouteSample]) -> dict[str, Any]:
        return {"from": earlier[0], "to": later[0], "layers": agreement(earlier[1], later[1])}

    return {
        "tokens": runs[-1][1].num_tokens,
        "neighbours": [compare(earlier, later) for earlier, later in pairwise(runs)],
        "with_last": [compare(earlier, runs[-1]) for earlier in runs[:-1]],
    }
