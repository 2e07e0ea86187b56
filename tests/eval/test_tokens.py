import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, wasserstein_distance

from hmoe.eval.tokens import NUM_LOSS_BINS, example_tokens, kl_divergence, pool_by_size, top_tokens, wasserstein

from .observations import SIZES, VOCABULARY, chosen_experts, filled, observations, tokens_of


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
