"""Difficult tokens: MoDSE (arXiv 2409.12210), section 4.3, Tables 5, 6 and 9, and the bias of their selection.

MoDSE selects token types by the *baseline's* loss and finds that the other model lowers it. Losses of types are noisy,
and a selection by one model's loss also selects that model's noise, which the other model does not share: selected by
the other model's loss, the same reduction is smaller or negative. So four selections are reported: by the baseline, as
in the paper; by the model; by the mean of both (symmetric); and by the baseline on one half of the text, measured on
the other half (held out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tokens import PAPER_THRESHOLDS, TokenLosses, TokenRoutes, pool_by_size


SELECTIONS = ("baseline", "model", "both", "held_out")


def default_thresholds(baseline_mean: float) -> list[float]:
    """As far above the baseline's mean loss, in nats, as the paper's are above its baseline's 1.05."""
    return [baseline_mean + threshold - PAPER_THRESHOLDS[0] for threshold in PAPER_THRESHOLDS]


def difficult_types(
    model: TokenLosses, baseline: TokenLosses, threshold: float, selection: str, min_count: int
) -> Tensor:
    """[V], whether a type's mean loss exceeds `threshold`, for types that occur at least `min_count` times."""
    frequent = model.count.sum(0) >= min_count
    ours, theirs = model.by_type(), baseline.by_type()
    if selection == "held_out":
        frequent &= (model.count >= max(1, min_count // 2)).all(0)
        loss = baseline.by_type(half=0)
    else:
        loss = {"baseline": theirs, "model": ours, "both": (ours + theirs) / 2}[selection]
    return frequent & (loss > threshold)


def loss_reductions(
    model: TokenLosses, baseline: TokenLosses, thresholds: Sequence[float], min_count: int = 10
) -> list[dict[str, Any]]:
    """Baseline minus model, in nats, over difficult types (MoDSE Table 5), for every selection of `SELECTIONS`.

    `reduction` weighs types equally, `reduction_by_occurrence` by how often they occur.
    """
    rows = []
    for selection in SELECTIONS:
        half = 1 if selection == "held_out" else None
        difference = baseline.by_type(half) - model.by_type(half)
        count = model.count.sum(0) if half is None else model.count[half]
        for threshold in thresholds:
            chosen = difficult_types(model, baseline, threshold, selection, min_count)
            types, tokens = int(chosen.sum()), int(count[chosen].sum())
            rows.append(
                {
                    "selection": selection,
                    "threshold": threshold,
                    "types": types,
                    "occurrences": tokens,
                    "reduction": float(difference[chosen].mean()) if types else None,
                    "reduction_by_occurrence": float((difference * count)[chosen].sum() / tokens) if tokens else None,
                }
            )
    return rows


def large_and_small(sizes: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]) -> dict[str, int]:
    """Sums of `counts` over experts wider and narrower than their layer's mean; experts of just the mean are left out
    of both (MoDSE Table 6).

    Args:
        sizes, counts: per layer, per expert.
    """
    large = small = 0
    for row, row_counts in zip(sizes, counts, strict=True):
        mean = sum(row) / len(row)
        large += sum(count for size, count in zip(row, row_counts) if size > mean)
        small += sum(count for size, count in zip(row, row_counts) if size < mean)
    return {"large": large, "small": small}


def size_shares(routes: TokenRoutes, chosen: Tensor) -> dict[str, Any]:
    """Where the token types `chosen` [V] go: activations and first choices by size, as in MoDSE Table 6, and layer by
    layer, as in Table 9; `large_share` is large / (large + small), None where all experts have one size."""
    result: dict[str, Any] = {"types": int(chosen.sum()), "occurrences": int(routes.occurrences[chosen].sum())}
    for name, tables in (("all_choices", routes.activations), ("first_choice", routes.first)):
        counts = [table[chosen].sum(0) for table in tables]  # [E] of each layer
        pooled, sizes = pool_by_size([row[None] for row in counts], routes.kept_sizes)
        layers = [row.tolist() for row in counts]
        sums = large_and_small(routes.kept_sizes, layers)
        total = sum(sums.values())
        result[name] = {
            "sizes": sizes,
            "counts": pooled[0].long().tolist(),
            **sums,
            "large_share": sums["large"] / total if total else None,
            "layers": layers,
        }
    return result


def difficulty(
    model: TokenLosses,
    baseline: TokenLosses | None,
    routes: TokenRoutes,
    thresholds: Sequence[float] | None = None,
    min_count: int = 10,
) -> dict[str, Any]:
    """All of the above. Without a baseline there are no reductions, and the model's own losses select."""
    reference = model if baseline is None else baseline
    limits = default_thresholds(reference.mean) if thresholds is None else sorted(thresholds)
    selections = ("model",) if baseline is None else ("baseline", "model", "both")
    frequent = model.count.sum(0) >= min_count
    shares = [
        {
            "selection": selection,
            "threshold": limit,
            **size_shares(routes, difficult_types(model, reference, limit, selection, min_count)),
        }
        for selection in selections
        for limit in limits
    ]
    return {
        "model_loss": model.mean,
        "baseline_loss": None if baseline is None else baseline.mean,
        "min_count": min_count,
        "frequent_types": int(frequent.sum()),
        "thresholds": list(limits),
        "reductions": [] if baseline is None else loss_reductions(model, baseline, limits, min_count),
        "shares": shares,
        "all_types": size_shares(routes, torch.ones_like(frequent)),
    }
