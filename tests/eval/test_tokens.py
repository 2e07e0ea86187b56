import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, wasserstein_distance

from hmoe.eval.difficulty import (
    SELECTIONS,
    default_thresholds,
    difficult_types,
    large_and_small,
    loss_reductions,
    size_shares,
)
from hmoe.eval.tokens import (
    NUM_LOSS_BINS,
    PAPER_THRESHOLDS,
    TokenLosses,
    TokenRoutes,
    example_tokens,
    kl_divergence,
    pool_by_size,
    top_tokens,
    wasserstein,
)

from .observations import ARCHITECTURE, SIZES, VOCABULARY, chosen_experts, random_observation, tokens_of


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


def observations(routing: str, number: int = 3):
    return [random_observation(routing, seed=seed) for seed in range(number)]


def filled(routing: str, number: int = 3) -> tuple[TokenLosses, TokenRoutes]:
    losses, routes = TokenLosses(VOCABULARY), TokenRoutes(ARCHITECTURE, VOCABULARY)
    for observation in observations(routing, number):
        losses.update(observation)
        routes.update(observation)
    return losses, routes


@pytest.mark.parametrize("routing", ["top_k", "top_p"])
def test_token_tables_equal_a_loop_over_tokens(routing):
    _, routes = filled(routing)
    for number, sizes in enumerate(SIZES):
        activations = [[0] * len(sizes) for _ in range(VOCABULARY)]
        first = [[0] * len(sizes) for _ in range(VOCABULARY)]
        for observation in observations(routing):
            ids = observation.input_ids.flatten().tolist()
            for place in tokens_of(observation):
                chosen = chosen_experts(observation.index[number], place, len(sizes))
                first[ids[place]][chosen[0]] += 1
                for expert in chosen:
                    activations[ids[place]][expert] += 1
        assert routes.activations[number].tolist() == activations
        assert routes.first[number].tolist() == first


def test_losses_by_type_and_half_equal_a_loop_over_tokens():
    losses, _ = filled("top_k")
    values: dict[tuple[int, int], list[float]] = {}
    row_number = 0
    for observation in observations("top_k"):
        for ids, row in zip(observation.input_ids.tolist(), observation.loss.tolist()):
            for token, loss in zip(ids, row):
                if not math.isnan(loss):
                    values.setdefault((row_number % 2, token), []).append(loss)
            row_number += 1
    everything = [loss for part in values.values() for loss in part]
    assert losses.mean == pytest.approx(sum(everything) / len(everything))
    for half in (0, 1):
        for token in range(VOCABULARY):
            part = values.get((half, token), [])
            assert int(losses.count[half, token]) == len(part)
            if part:
                assert float(losses.by_type(half)[token]) == pytest.approx(sum(part) / len(part))


@pytest.mark.parametrize("routing", ["top_k", "top_p"])
def test_sizes_by_loss_at_both_positions_equal_a_loop_over_tokens(routing):
    _, routes = filled(routing)
    result = routes.loss_and_size()
    for name, shift in (("predicting", -1), ("reading", 0)):
        points = []
        for observation in observations(routing):
            length = observation.loss.shape[1]
            for row, losses in enumerate(observation.loss.tolist()):
                for place, loss in enumerate(losses):
                    if math.isnan(loss):
                        continue
                    relative, share = [], []
                    for sizes, index in zip(SIZES, observation.index):
                        chosen = chosen_experts(index, row * length + place + shift, len(sizes))
                        width = sum(sizes[expert] for expert in chosen)
                        relative.append(width / len(chosen) * len(sizes) / sum(sizes))
                        share.append(width / sum(sizes))
                    points.append((loss, np.mean(relative), np.mean(share)))
        expected = np.corrcoef([loss for loss, _, _ in points], [size for _, size, _ in points])[0, 1]
        assert result[name]["correlation"] == pytest.approx(expected, abs=1e-6)
        assert sum(row["tokens"] for row in result[name]["bins"]) == len(points)
        for row in result[name]["bins"]:
            high = math.inf if row["loss_to"] is None else row["loss_to"]
            inside = [point for point in points if row["loss_from"] <= point[0] < high]
            assert row["tokens"] == len(inside)
            assert row["mean_loss"] == pytest.approx(np.mean([point[0] for point in inside]))
            assert row["relative_size"] == pytest.approx(np.mean([point[1] for point in inside]))
            assert row["activated_share"] == pytest.approx(np.mean([point[2] for point in inside]))
    assert result["reading"]["bins"][-1]["loss_from"] == (NUM_LOSS_BINS - 1) * 0.5  # losses above 12 share a bin


def test_top_tokens_have_the_largest_share_and_rare_ones_are_left_out():
    _, routes = filled("top_k")
    table, sizes = pool_by_size(routes.activations, routes.kept_sizes)
    assert sizes == [8, 16, 24, 32, 40]
    for column, row in enumerate(top_tokens(routes, num_tokens=3, min_count=4)):
        shares = {
            token: float(table[token, column] / table[token].sum())
            for token in range(VOCABULARY)
            if routes.occurrences[token] >= 4
        }
        expected = sorted(shares.values(), reverse=True)[:3]
        assert row["size"] == sizes[column]
        assert row["shares"] == pytest.approx([share for share in expected if share > 0])
        assert [shares[token] for token in row["ids"]] == pytest.approx(row["shares"])
        examples = example_tokens(routes, min_count=4, num_each=VOCABULARY)
        shares_by_size = dict(zip(examples["ids"], examples["shares"]))
        assert shares_by_size[row["ids"][0]][column] == pytest.approx(row["shares"][0])


def test_wasserstein_distance_with_unit_and_with_embedding_ground_metric():
    table = torch.randint(0, 5, (12, 3))
    table[0] = 0  # a type that no expert sees
    distributions = table.double() / table.sum(0)
    distance = wasserstein(table)
    for i in range(3):
        for j in range(3):
            # The least mass to move, if every move costs 1: what exceeds the other distribution.
            surplus = sum(max(float(p - q), 0) for p, q in zip(distributions[:, i], distributions[:, j]))
            assert float(distance[i, j]) == pytest.approx(surplus, abs=1e-12)
    line = torch.randn(12, 1, dtype=torch.float64)
    seen = table.sum(1) > 0
    places = line[seen] - line[seen].mean()
    places = (places / places.abs().mean()).flatten().numpy()
    on_line = wasserstein(table, line, num_projections=3)
    for i in range(3):
        for j in range(3):
            p, q = distributions[seen, i].numpy(), distributions[seen, j].numpy()
            assert float(on_line[i, j]) == pytest.approx(wasserstein_distance(places, places, p, q), abs=1e-9)


def test_kl_divergence_equals_scipy_on_smoothed_distributions_and_is_finite():
    table = torch.randint(0, 5, (12, 3))
    table[3] = torch.tensor([4, 0, 0])  # infinite without smoothing
    found = kl_divergence(table, smoothing=0.01)
    counts = table.double().numpy()
    counts = counts[counts.sum(1) > 0]
    smoothed = 0.99 * counts / counts.sum(0) + 0.01 * counts.sum(1, keepdims=True) / counts.sum()
    for i in range(3):
        for j in range(3):
            assert float(found[i, j]) == pytest.approx(entropy(smoothed[:, i], smoothed[:, j]), abs=1e-9)
    dead = torch.cat([table, torch.zeros(12, 1, dtype=torch.long)], dim=1)
    assert torch.isnan(wasserstein(dead)[0, 3]) and torch.isnan(kl_divergence(dead)[0, 3])


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
