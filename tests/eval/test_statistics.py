import math
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM

import hmoe
from hmoe.costs import moe_costs
from hmoe.eval.observe import observe
from hmoe.eval.statistics import RoutingStatistics, load_by_size
from hmoe.eval.tokens import TokenRoutes

from .observations import (
    ARCHITECTURE,
    NEURON,
    SIZES,
    VOCABULARY,
    chosen_experts,
    costs_of,
    random_observation,
    tokens_of,
)


@pytest.mark.parametrize("routing", ["top_k", "top_p"])
def test_every_statistic_of_a_layer_equals_a_loop_over_its_tokens(routing):
    statistics = RoutingStatistics(ARCHITECTURE)
    seen = [random_observation(routing, seed=seed) for seed in range(3)]
    for observation in seen:
        statistics.update(observation)
    summary = statistics.summary()
    for number, sizes in enumerate(SIZES):
        choices: dict[tuple[int, int], int] = {}
        histogram: dict[int, int] = {}
        together: dict[tuple[int, int], int] = {}
        entropy = confidence = tokens = width = 0.0
        counts = [0] * len(sizes)
        for observation in seen:
            for place in tokens_of(observation):
                tokens += 1
                probability = observation.logits[number][place].softmax(-1).tolist()
                entropy -= sum(p * math.log(p) for p in probability)
                confidence += max(probability)
                chosen = chosen_experts(observation.index[number], place, len(sizes))
                histogram[len(chosen)] = histogram.get(len(chosen), 0) + 1
                for slot, expert in enumerate(chosen):
                    choices[slot, expert] = choices.get((slot, expert), 0) + 1
                    counts[expert] += 1
                    width += sizes[expert]
                for i, j in combinations(sorted(chosen), 2):
                    together[i, j] = together.get((i, j), 0) + 1
        layer = summary["layers"][number]
        assert layer["load"] == pytest.approx([count / tokens for count in counts])
        assert layer["activation_share"] == pytest.approx([count / sum(counts) for count in counts])
        assert layer["experts_per_token"] == pytest.approx(sum(counts) / tokens)
        assert layer["mean_activated_size"] == pytest.approx(width / sum(counts))
        assert layer["activated_parameters"] == pytest.approx(NEURON * width / tokens)
        assert layer["activated_ratio"] == pytest.approx(width / tokens / sum(sizes))
        assert layer["router_entropy"] == pytest.approx(entropy / tokens, rel=1e-5)
        assert layer["router_confidence"] == pytest.approx(confidence / tokens, rel=1e-5)
        assert layer["max_over_min"] == max(counts) / min(counts)
        for slot, row in enumerate(layer["choices"]):
            assert row == [choices.get((slot, expert), 0) for expert in range(len(sizes))]
            # MoDSE Tables 7-8: tokens of the busiest expert over those of the idlest, first and second choices apart.
            ratio = max(row) / min(row) if min(row) else None
            assert layer["max_over_min_by_choice"][slot] == ratio
        for number_chosen, share in enumerate(layer["num_experts_histogram"]):
            assert share == pytest.approx(histogram.get(number_chosen, 0) / tokens)
        for (i, j), count in together.items():
            assert layer["coactivation"][i][j] == pytest.approx(count / counts[i])
            assert layer["coactivation_lift"][j][i] == pytest.approx(count * tokens / counts[i] / counts[j])


def literal_experts(logits: torch.Tensor, config) -> list[int]:
    """HMoE Eq. 8 and Eq. 9-11 for one token, from its router logits."""
    probability = logits.float().softmax(-1).tolist()
    order = sorted(range(len(probability)), key=lambda expert: -probability[expert])
    if getattr(config, "routing", "top_k") == "top_k":
        return order[: config.num_experts_per_tok]
    chosen, mass = [], 0.0
    for expert in order:
        chosen.append(expert)
        mass += probability[expert]
        if mass >= config.router_top_p:
            break
    return chosen


@pytest.mark.parametrize("name", ["hmoe", "top_p", "mixtral", "olmoe"])
def test_padded_batches_of_a_real_model_count_as_its_unpadded_rows(name, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder(name)).eval()
    lengths = [9, 14, 5]
    rows = [torch.randint(3, 512, (length,)) for length in lengths]
    ids = torch.full((3, 14), 2)
    mask = torch.zeros(3, 14, dtype=torch.long)
    for number, row in enumerate(rows):
        places = slice(14 - len(row), 14) if number == 0 else slice(0, len(row))  # left padding in the first row
        ids[number, places], mask[number, places] = row, 1
    shape = moe_costs(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    statistics, losses = RoutingStatistics(shape), []
    for observation in observe(model, [{"input_ids": ids, "attention_mask": mask}]):
        statistics.update(observation)
        losses = observation.loss

    counts = [[0] * len(sizes) for sizes in shape.sizes]
    for number, row in enumerate(rows):
        with torch.no_grad():
            outputs = model(input_ids=row[None], output_router_logits=True)
        for layer, logits in enumerate(outputs.router_logits):
            for token_logits in logits:
                for expert in literal_experts(token_logits, model.config):
                    counts[layer][expert] += 1
        expected = -outputs.logits[0, :-1].log_softmax(-1).gather(1, row[1:, None]).squeeze(1)
        found = losses[number][~losses[number].isnan()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [layer.counts.tolist() for layer in statistics.layers] == counts
    load = [[count / sum(lengths) for count in row] for row in counts]
    used = sum(x * n for row, sizes in zip(load, shape.expert_parameters) for x, n in zip(row, sizes))
    everything = sum(map(sum, shape.expert_parameters))
    assert statistics.summary()["activated_parameters"] == pytest.approx(shape.parameters - everything + used)
    assert statistics.summary()["activated_ratio"] == pytest.approx(used / everything)


def test_activated_parameters_are_those_of_the_config(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("top_p"))
    load = [[0.5, 0.25, 1.0, 0.125], [0.75, 0.5, 0.25]]
    counted = hmoe.count_parameters(model.config, load=load)
    shape = moe_costs(model)
    assert shape.sizes == model.config.layer_expert_sizes
    assert shape.expert_parameters == counted.experts
    assert shape.activated_parameters(load) == pytest.approx(counted.activated)
    assert shape.activated_ratio(load) == pytest.approx(counted.activated_ratio)


def test_a_dense_model_is_refused_by_name(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    with pytest.raises(ValueError, match=r"'llama'.*not a mixture of experts.*baseline"):
        moe_costs(model)


def test_load_by_size_pools_equal_sizes_of_all_layers():
    rows = load_by_size([[8, 16], [16, 16, 32]], [[1, 2], [3, 4, 10]])
    assert [row["size"] for row in rows] == [8, 16, 32]
    assert [row["activations"] for row in rows] == [1, 9, 10]
    assert [row["share"] for row in rows] == [0.05, 0.45, 0.5]
    assert [row["share_if_even"] for row in rows] == [0.2, 0.6, 0.2]
    assert sum(row["neuron_share"] for row in rows) == pytest.approx(1)


def test_memory_does_not_grow_with_the_text_and_large_tables_keep_fewer_layers():
    routes, statistics = TokenRoutes(ARCHITECTURE, VOCABULARY), RoutingStatistics(ARCHITECTURE)

    def size() -> int:
        tensors = [*routes.activations, *routes.first, routes.occurrences, routes.bins]
        tensors += [
            tensor for layer in statistics.layers for tensor in vars(layer).values() if torch.is_tensor(tensor)
        ]
        return sum(tensor.numel() for tensor in tensors)

    sizes = []
    for seed in range(4):
        observation = random_observation("top_p", rows=2 + seed, seed=seed)
        routes.update(observation)
        statistics.update(observation)
        sizes.append(size())
    assert len(set(sizes)) == 1
    deep = costs_of([[8, 8]] * 9)
    kept = TokenRoutes(deep, VOCABULARY, max_entries=3 * 2 * VOCABULARY * 2)
    assert kept.layers == [0, 4, 8]
