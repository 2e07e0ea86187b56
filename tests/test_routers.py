import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hmoe import HMoEForCausalLM
from hmoe.routers import RouterTap, activated_experts, balance, max_over_min, routed_layers, tokens_per_expert


E = 5
INDEX = torch.tensor([[0, 3, 5], [3, 5, 5], [1, 0, 3], [2, 5, 5]])  # 5 marks an unused slot


@pytest.mark.parametrize("mask", [None, [True, False, True, True], [False] * 4])
def test_tokens_per_expert_leave_out_unused_slots_and_masked_tokens(mask):
    counts = [0] * E
    for place, row in enumerate(INDEX.tolist()):
        for expert in row:
            if expert < E and (mask is None or mask[place]):
                counts[expert] += 1
    found = tokens_per_expert(INDEX, E, None if mask is None else torch.tensor(mask).view(2, 2))
    assert found.dtype == torch.int64 and found.tolist() == counts
    if mask is None:
        assert activated_experts(INDEX, E).sum(0).tolist() == counts


def test_a_tap_reads_every_layer_until_it_is_closed(tiny_config):
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for model in (
        HMoEForCausalLM(tiny_config()),
        MixtralForCausalLM(MixtralConfig(**fields, **heads, num_local_experts=4)),
    ):
        seen = []
        ids = torch.randint(3, 60, (2, 6))
        with RouterTap(model, lambda layer, logits, index, seen=seen: seen.append((layer, logits.shape, len(index)))):
            model(input_ids=ids)
        model(input_ids=ids)
        sizes = [layer.sizes for layer in routed_layers(model)]
        assert seen == [(layer, (12, len(row)), 12) for layer, row in enumerate(sizes)]


def test_balance_of_even_skewed_and_dead_experts():
    even = balance([5, 5, 5, 5])
    assert (even["max_over_min"], even["load_imbalance"], even["load_variation"]) == (1, 1, 0)
    assert even["load_entropy_ratio"] == pytest.approx(1)
    skewed = balance([97, 1, 2, 0])
    assert skewed["max_over_min"] is None
    assert skewed["load_imbalance"] == pytest.approx(97 / 25)
    assert (skewed["dead_experts"], skewed["starved_experts"]) == (1, 3)
    assert max_over_min([6, 3, 2]) == 3  # MoDSE Tables 7-8: max over min tokens per expert
    assert balance([0, 0])["load_imbalance"] == 1  # no token at all
