"""Placements of experts on ranks: balance, and the simulation of clusters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hmoe_cli
from hmoe import HMoEConfig, expert_sizes
from hmoe.describe import main as describe_main
from hmoe.placement import (
    METHODS,
    Placement,
    describe_placement,
    expected_work,
    max_over_mean,
    place_experts,
    place_layers,
    reorder_config,
    simulate,
    split_experts,
)


LADDER = expert_sizes("arithmetic", 8, total=12288)
MODSE = HMoEConfig.from_preset("modse-300m-x8").layer_expert_sizes[0]
HYBRID = expert_sizes("hybrid", 8, total=12288)


def parameter_balance(sizes: list[int], num_ranks: int, method: str) -> float:
    return max_over_mean(place_experts(sizes, num_ranks, method).totals(sizes))


@pytest.mark.parametrize("method", ["pairs", "balanced"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("sizes", [LADDER, MODSE], ids=["hmoe", "modse"])
def test_both_papers_sizes_balance_exactly_on_two_and_four_ranks(sizes, num_ranks, method):
    assert parameter_balance(sizes, num_ranks, method) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_the_smallest_with_the_largest_in_any_order_of_the_experts(seed):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = [MODSE[expert] for expert in order]
    for experts in place_experts(sizes, 4, "pairs").ranks:
        assert sum(sizes[expert] for expert in experts) == 2 * 3840


def test_balanced_placement_is_exact_where_pairs_are_not():
    assert parameter_balance(HYBRID, 4, "pairs") == pytest.approx(1.25)
    assert parameter_balance(HYBRID, 4, "balanced") == 1.0


def test_contiguous_ladder_is_unbalanced():
    assert parameter_balance(LADDER, 4, "contiguous") == pytest.approx((21 + 23) / 32)
    assert parameter_balance(LADDER, 4, "round_robin") == pytest.approx((15 + 23) / 32)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.data())
def test_longest_first_stays_within_its_bound(sizes, data):
    num_ranks = data.draw(st.integers(1, len(sizes)))
    placement = place_experts(sizes, num_ranks, "balanced")
    assert sorted(placement.order) == list(range(len(sizes)))
    # Graham 1969: at most 4/3 of the optimum, which is at least the mean and the largest.
    slowest = max(placement.totals(sizes))
    assert slowest <= sum(sizes) / num_ranks + max(sizes) * (1 - 1 / num_ranks) + 1e-9


def test_measured_load_moves_experts():
    load = [0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5]
    work = expected_work([64] * 8, load)
    by_load = place_experts([64] * 8, 4, "balanced", load=load)
    assert max(by_load.totals(work)) == pytest.approx(64 * 0.9)  # no placement can do better
    assert max(place_experts([64] * 8, 4, "round_robin").totals(work)) > 64 * 0.9


def test_pairs_with_load_keep_parameters_exact():
    load = [0.5, 0.1, 0.1, 0.5, 0.1, 0.1, 0.3, 0.3]
    placement = place_experts(MODSE, 2, "pairs", load=load)
    assert max_over_mean(placement.totals(MODSE)) == 1.0
    work = expected_work(MODSE, load)
    assert max(placement.totals(work)) <= max(place_experts(MODSE, 2, "contiguous").totals(work))


def test_work_evens_out_over_layers():
    load = [[0.6, 0.6, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]] * 4
    layer_sizes = [MODSE] * 4
    alike = simulate(layer_sizes, [place_experts(MODSE, 4, "pairs", load=load[0])] * 4, [load], 4)
    spread = simulate(layer_sizes, place_layers(layer_sizes, 4, "pairs", load=load), [load], 4)
    assert spread.parameters == alike.parameters == 1.0
    assert spread.per_layer == pytest.approx(alike.per_layer)
    assert spread.over_layers < alike.over_layers


@pytest.mark.parametrize("num_ranks", [4, 64, 1024])
def test_simulated_cluster_at_equal_load_is_balanced_by_pairs_alone(num_ranks):
    layer_sizes, equal = [LADDER] * 3, [[[0.25] * 8] * 3]
    pairs = simulate(layer_sizes, place_layers(layer_sizes, 4, "pairs"), equal, num_ranks)
    assert (pairs.parameters, pairs.per_layer, pairs.over_layers) == pytest.approx((1.0, 1.0, 1.0))
    contiguous = simulate(layer_sizes, place_layers(layer_sizes, 4, "contiguous"), equal, num_ranks)
    assert contiguous.per_layer == contiguous.over_layers == pytest.approx(44 / 32)


def test_groups_that_see_other_batches_wait_for_the_slowest():
    sizes, placement = [[10, 10]], [Placement(((0,), (1,)))]
    balance = simulate(sizes, placement, [[[1.0, 1.0]], [[0.5, 1.5]]], 4)
    assert balance.per_layer == balance.over_layers == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LADDER, 9), r"`num_ranks`=9: 8 experts can be placed on 1 to 8 ranks"),
        ((LADDER, 8), r"`num_ranks`=8: 8 experts do not make the same number of whole pairs"),
        ((LADDER, 3, "contiguous"), r"`num_ranks`=3 does not divide 8 experts"),
        ((LADDER, 2, "random"), r"`method` must be one of .*'random'"),
    ],
)
def test_a_placement_that_cannot_be_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        place_experts(*arguments)


def test_bad_loads_are_refused():
    with pytest.raises(ValueError, match="`load` has 2 experts, the layer has 8"):
        place_experts(LADDER, 2, load=[0.5, 0.5])
    with pytest.raises(ValueError, match="finite and not negative"):
        place_experts(LADDER, 2, load=[float("nan")] * 8)
    with pytest.raises(ValueError, match="`load` has 1 layers, the model has 2"):
        place_layers([LADDER] * 2, 2, load=[[0.25] * 8])


SIZES = [8, 16, 24, 32, 40, 48, 56, 64]


def test_layers_of_one_order_stay_one_list(tiny_config):
    config = tiny_config(expert_intermediate_sizes=SIZES)
    order = place_experts(SIZES, 4, "pairs").order
    assert reorder_config(config, [order] * 2).expert_intermediate_sizes == [SIZES[i] for i in order]
    with pytest.raises(ValueError, match=r"`orders\[0\]`=\[0, 0\] must name each of the experts"):
        reorder_config(config, [[0, 0], order])


def test_pairs_make_whole_experts_of_equal_runs(tiny_config):
    config = tiny_config(expert_intermediate_sizes=SIZES)  # 36 tiles, cut at 9, 18 and 27
    assert split_experts(config, 4) == [(layer, expert) for layer in range(2) for expert in (3, 5, 6)]
    placed = reorder_config(config, [place_experts(SIZES, 4, "pairs").order] * 2)
    assert split_experts(placed, 4) == []
    with pytest.raises(ValueError, match=r"`ep_size`=5 does not divide the 36 tiles"):
        split_experts(config, 5)


def test_description_names_every_method_and_the_sizes_of_each_rank():
    text = describe_placement(HMoEConfig.from_preset("hmoe-0.4b"), 4)
    assert all(method in text for method in METHODS)
    assert "pairs             1.000          1.000             1.000  whole experts on every rank" in text
    assert "1.375  equal runs cut through 36 experts" in text
    assert "layer 0, rank 0: sizes 2208, 864" in text
    assert "8 experts do not make the same number of whole pairs" in describe_placement(
        HMoEConfig.from_preset("hmoe-0.4b"), 8
    )


def test_describe_prints_the_placements(capsys):
    assert describe_main(["modse-300m-x8", "--num_ranks", "4"]) == 0
    assert "pairs             1.000          1.000             1.000  whole experts" in capsys.readouterr().out
    assert hmoe_cli.main(["describe", "modse-300m-x8", "--num_ranks", "9"]) == 2
    assert "8 experts can be placed on 1 to 8 ranks" in capsys.readouterr().err
