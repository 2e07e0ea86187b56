import numpy as np
import pytest
import torch

from hmoe.eval.difficulty import (
    SELECTIONS,
    default_thresholds,
    difficult_types,
    large_and_small,
    loss_reductions,
    size_shares,
)
from hmoe.eval.tokens import PAPER_THRESHOLDS, TokenLosses

from .observations import SIZES, VOCABULARY, filled


# MoDSE Table 6: 180 difficult tokens, expert size over model width, top-1 and top-2 choices together, top-1 alone.
TABLE_6 = [
    (4.5, 2649, 1560),
    (4.0, 3729, 2313),
    (3.0, 4095, 2342),
    (2.5, 2332, 1166),
    (2.5, 2933, 1566),
    (2.0, 2877, 1363),
    (1.0, 2972, 873),
    (0.5, 2477, 849),
]


def test_modse_table_6_large_and_small_sums_come_out():
    sizes = [[int(10 * size) for size, _, _ in TABLE_6]]
    assert large_and_small(sizes, [[both for _, both, _ in TABLE_6]]) == {"large": 10473, "small": 8326}
    assert large_and_small(sizes, [[first for _, _, first in TABLE_6]]) == {"large": 6215, "small": 3085}


def test_default_thresholds_are_the_papers_at_the_papers_baseline_loss():
    assert default_thresholds(1.05) == pytest.approx(PAPER_THRESHOLDS)
    assert default_thresholds(2.05) == pytest.approx([1 + threshold for threshold in PAPER_THRESHOLDS])


def test_loss_reductions_and_shares_equal_a_loop_over_types():
    ours, routes = filled("top_k", 6)
    theirs = TokenLosses(VOCABULARY)
    theirs.count = ours.count.clone()
    theirs.total = ours.total + ours.count * torch.randn(2, VOCABULARY, dtype=torch.float64)
    rows = loss_reductions(ours, theirs, thresholds=[6.0, 7.5], min_count=6)
    assert [row["selection"] for row in rows] == [name for name in SELECTIONS for _ in range(2)]
    for row in rows:
        chosen = []
        for token in range(VOCABULARY):
            counts = ours.count[:, token].tolist()
            if sum(counts) < 6:
                continue
            model, baseline = (float(losses.by_type()[token]) for losses in (ours, theirs))
            judged = {"baseline": baseline, "model": model, "both": (model + baseline) / 2}.get(row["selection"])
            count = sum(counts)
            if row["selection"] == "held_out":
                if min(counts) < 3:
                    continue
                judged = float(theirs.by_type(0)[token])
                model, baseline = (float(losses.by_type(1)[token]) for losses in (ours, theirs))
                count = counts[1]
            if judged > row["threshold"]:
                chosen.append((baseline - model, count))
        assert row["types"] == len(chosen)
        assert row["occurrences"] == sum(count for _, count in chosen)
        if chosen:
            weighted = sum(difference * count for difference, count in chosen) / row["occurrences"]
            assert row["reduction"] == pytest.approx(np.mean([difference for difference, _ in chosen]))
            assert row["reduction_by_occurrence"] == pytest.approx(weighted)
    selected = difficult_types(ours, theirs, 6.0, "baseline", 6)
    shares = size_shares(routes, selected)
    large = small = 0
    for sizes, table in zip(SIZES, routes.first):
        for expert, size in enumerate(sizes):
            count = int(table[selected, expert].sum())
            large += count if size * len(sizes) > sum(sizes) else 0
            small += count if size * len(sizes) < sum(sizes) else 0
    assert (shares["first_choice"]["large"], shares["first_choice"]["small"]) == (large, small)


def test_selection_by_one_side_regresses_to_the_mean_and_the_symmetric_ones_do_not():
    """Two equally good models whose losses by type differ by noise alone."""
    generator = torch.Generator().manual_seed(0)
    number = 4000
    truth = 2 + torch.rand(number, generator=generator, dtype=torch.float64)

    def noisy() -> TokenLosses:
        losses = TokenLosses(number)
        losses.count += 5
        losses.total += 5 * (truth + torch.randn(2, number, generator=generator, dtype=torch.float64))
        return losses

    rows = loss_reductions(noisy(), noisy(), thresholds=[3.0], min_count=10)
    reduction = {row["selection"]: row["reduction"] for row in rows}
    assert reduction["baseline"] > 0.3
    assert reduction["model"] < -0.3
    assert abs(reduction["both"]) < 0.1
    assert abs(reduction["held_out"]) < 0.1
