from dataclasses import replace

import pytest
import torch

from hmoe.eval.observe import Observation
from hmoe.eval.stability import RouteSample, agreement, stability

from .observations import SIZES, chosen_experts, random_observation, tokens_of


NUM_EXPERTS = [len(sizes) for sizes in SIZES]


def rerouted(observation: Observation, seed: int, routing: str) -> Observation:
    """The same tokens, other routes for about half of them."""
    other = random_observation(routing, seed=seed)
    keep = torch.rand(observation.index[0].shape[0], 1) < 0.5
    index = [torch.where(keep, ours, theirs) for ours, theirs in zip(observation.index, other.index)]
    return replace(observation, index=index)


def sample(*observations: Observation, max_tokens: int = 1000) -> RouteSample:
    routes = RouteSample(NUM_EXPERTS, max_tokens)
    for observation in observations:
        routes.update(observation)
    return routes


@pytest.mark.parametrize("routing", ["top_k", "top_p"])
def test_agreement_equals_a_loop_over_tokens(routing):
    before = [random_observation(routing, seed=seed) for seed in (0, 1)]
    after = [rerouted(observation, seed, routing) for observation, seed in zip(before, (8, 9))]
    found = agreement(sample(*before), sample(*after))
    for number, num_experts in enumerate(NUM_EXPERTS):
        same, jaccard, saturation, firsts = [], [], [], ([], [])
        for old, new in zip(before, after):
            for place in tokens_of(old):
                a = chosen_experts(old.index[number], place, num_experts)
                b = chosen_experts(new.index[number], place, num_experts)
                same.append(a[0] == b[0])
                firsts[0].append(a[0])
                firsts[1].append(b[0])
                jaccard.append(len(set(a) & set(b)) / len(set(a) | set(b)))
                saturation.append(len(set(a) & set(b)) / len(b))
        chance = sum(
            firsts[0].count(expert) * firsts[1].count(expert) / len(same) ** 2 for expert in range(num_experts)
        )
        assert found[number]["first_choice"] == pytest.approx(sum(same) / len(same))
        assert found[number]["jaccard"] == pytest.approx(sum(jaccard) / len(jaccard))
        assert found[number]["saturation"] == pytest.approx(sum(saturation) / len(saturation))
        assert found[number]["first_choice_chance"] == pytest.approx(chance)


def test_equal_counts_can_hide_that_every_token_moved():
    """What tokens per expert (MoDSE Tables 7-8) cannot show."""
    ids, mask = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    routes = [torch.tensor([[0], [0], [1], [1]]), torch.tensor([[1], [1], [0], [0]])]
    samples = []
    for index in routes:
        routes_seen = RouteSample([2], max_tokens=4)
        routes_seen.update(Observation(ids, mask, ids, torch.full((1, 4), torch.nan), [], [index]))
        samples.append(routes_seen)
    (layer,) = agreement(*samples)
    assert layer["first_choice"] == 0.0
    assert layer["first_choice_chance"] == 0.5


def test_samples_are_bounded_and_stability_compares_neighbours_and_the_last():
    observations = [random_observation("top_k", seed=seed) for seed in range(3)]
    short = sample(*observations, max_tokens=40)
    assert short.num_tokens == 40 == len(short.tokens()) == len(short.activated_sets(1))
    samples = [sample(observations[0]), sample(rerouted(observations[0], 5, "top_k")), sample(observations[0])]
    result = stability(list(zip("123", samples)))
    assert [(row["from"], row["to"]) for row in result["neighbours"]] == [("1", "2"), ("2", "3")]
    assert [(row["from"], row["to"]) for row in result["with_last"]] == [("1", "3"), ("2", "3")]
    assert [layer["saturation"] for layer in result["with_last"][0]["layers"]] == [1.0, 1.0]


def test_other_tokens_or_other_experts_are_refused():
    with pytest.raises(ValueError, match="not read the same tokens"):
        agreement(sample(random_observation("top_k", seed=0)), sample(random_observation("top_k", seed=1)))
    with pytest.raises(ValueError, match="one training run"):
        agreement(RouteSample([4], max_tokens=1), RouteSample([8], max_tokens=1))
