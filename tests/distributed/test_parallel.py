"""Tensor, expert and data parallelism on Transformers' engine: two and four ranks compute what one process does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rounding import step_rounding
from ranks import BACKENDS, Case, run_cases, run_ranks
from torch import Tensor

from hmoe import HMoEConfig, HMoEForCausalLM
from hmoe.parallel_hmoe import EP_IMPLEMENTATION, check_tiles_divide


ROUTER_LOSSES = {
    "load_balancing_loss_coef": 0.5,
    "parameter_penalty_loss_coef": 0.4,
    "router_entropy_loss_coef": 0.3,
    "router_z_loss_coef": 0.2,
    "router_loss_scope": "global_batch",
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    # Whole pairs on two and on four ranks.
    "pairs": {"expert_intermediate_sizes": [72, 8, 64, 16, 48, 32, 40, 40]},
    # The third expert lies on both of two ranks, and Top-P leaves slots unused.
    "spanning": {"expert_intermediate_sizes": [8, 16, 24, 32], "routing": "top_p", "router_top_p": 0.5},
    # Routers that choose experts of the first of two ranks for every token.
    "starved": {"expert_intermediate_sizes": [8, 24, 16, 16, 24, 40]},
    # Sizes that differ by layer, MoDSE's router.
    "by_layer": {"expert_intermediate_sizes": [[8, 24], [16, 8, 8, 32]], "router_type": "modse"},
    # Tiles that tensor-parallel ranks cannot halve.
    "odd_tile": {"expert_intermediate_sizes": [3, 9, 15, 21], "expert_tile_size": 3},
}
TWO_RANKS = {
    "tp": {"tp_size": 2},
    "fsdp": {"fsdp_size": 2},
    "ep_on_tp": {"tp_size": 2, "ep_size": 2},
    "ep_on_fsdp": {"fsdp_size": 2, "ep_size": 2},
}
FOUR_RANKS = {
    "tp_fsdp": {"tp_size": 2, "fsdp_size": 2},
    "ep_on_tp_fsdp": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
    "ep_on_part_of_fsdp": {"fsdp_size": 4, "ep_size": 2},
    "ep_4": {"fsdp_size": 4, "ep_size": 4},
}


def make_cases(layouts: Mapping[str, dict[str, int] | None], checkpoints: list[str]) -> dict[str, Case]:
    return {
        f"{layout}-{name}": Case(name, parallel, data_parallel=2 if parallel is None else parallel.get("fsdp_size", 1))
        for layout, parallel in layouts.items()
        for name in checkpoints
    }


CASES = {
    2: {**make_cases(TWO_RANKS, list(CHECKPOINTS)), **make_cases({"ddp": None}, ["pairs", "starved"])},
    4: make_cases(FOUR_RANKS, ["pairs"]),
}
BATCH = torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(0))
PROMPT = BATCH[:2, :4]


def make_model(name: str) -> HMoEForCausalLM:
    torch.manual_seed(0)
    config = HMoEConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=None,
        **ROUTER_LOSSES,
        **CHECKPOINTS[name],
    )
    model = HMoEForCausalLM(config)
    if name == "starved":
        for layer in model.model.layers:
            # Of a direction and its opposite one scores above zero, and zero is what all other experts score.
            weight = layer.mlp.gate.weight.data
            weight[1], weight[3], weight[4:] = -weight[0], -weight[2], 0
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("parallel")
    for name in CHECKPOINTS:
        make_model(name).save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def one_process(folder) -> dict[str, dict[str, Any]]:
    answers = {}
    for name in CHECKPOINTS:
        model = HMoEForCausalLM.from_pretrained(folder / name, experts_implementation="eager").train()
        output = model(input_ids=BATCH, labels=BATCH, output_router_logits=True)
        output.loss.backward()
        answers[name] = {
            "rounding": step_rounding(model.config, BATCH.shape[1], BATCH.numel()),
            "loss": output.loss.item(),
            "gradients": {key: parameter.grad for key, parameter in model.named_parameters()},
            "router_index": [index.view(*BATCH.shape, -1) for index in output.router_index],
            "generated": model.eval().generate(PROMPT, max_new_tokens=5, do_sample=False),
        }
    return answers


@pytest.fixture(scope="module")
def on_ranks(folder) -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = {}
    for world_size, cases in CASES.items():
        answers |= run_ranks(world_size, run_cases, folder, cases, BATCH, PROMPT)
    return answers


ALL = {name: case for cases in CASES.values() for name, case in cases.items()}
DISPATCHED = [name for name in ALL if name.startswith(("ep_on_fsdp", "ep_4"))]
all_cases = pytest.mark.parametrize("name", ALL)


def relative_difference(left: Tensor, right: Tensor) -> float:
    return ((left - right).norm() / right.norm()).item() if right.any() else left.norm().item()


@all_cases
def test_loss_and_gradients_are_those_of_one_process_with_every_backend(on_ranks, one_process, name):
    expected = one_process[ALL[name].checkpoint]
    expected_gradients, rounding = expected["gradients"], expected["rounding"]
    for backend in BACKENDS:
        assert on_ranks[name]["loss"][backend] == pytest.approx(expected["loss"], rel=rounding)
        found = on_ranks[name]["gradients"][backend]
        assert found.keys() == expected_gradients.keys()
        different = {key: relative_difference(found[key], expected_gradients[key]) for key in found}
        both = [torch.cat([gradients[key].flatten() for key in found]) for gradients in (found, expected_gradients)]
        assert relative_difference(*both) < rounding, backend
        # A single parameter may have a small gradient that is left of larger terms, and sees more of the rounding.
        assert max(different.values()) < 4 * rounding, (backend, different)


@all_cases
def test_generation_is_that_of_one_process(on_ranks, one_process, name):
    assert torch.equal(on_ranks[name]["generated"], one_process[ALL[name].checkpoint]["generated"])


@all_cases
def test_saved_folder_equals_that_of_one_process_bit_for_bit(folder, on_ranks, name):
    original, saved = folder / ALL[name].checkpoint, folder / name
    files = sorted(path.name for path in original.iterdir())
    assert sorted(path.name for path in saved.iterdir()) == files
    for file in files:
        assert (saved / file).read_bytes() == (original / file).read_bytes(), file


@pytest.mark.parametrize("name", DISPATCHED)
def test_bytes_sent_are_one_row_there_and_back_per_token_and_rank(folder, on_ranks, one_process, name):
    config = HMoEConfig.from_pretrained(folder / ALL[name].checkpoint)
    num_ranks = ALL[name].data_parallel
    sent = on_ranks[name]["bytes_sent"]  # [R, L]
    for layer, index in enumerate(one_process[ALL[name].checkpoint]["router_index"]):
        ranks_of_expert = find_ranks(config, layer, num_ranks)
        expected = [0] * num_ranks
        for source in range(num_ranks):
            for slots in index[source::num_ranks].flatten(0, 1).tolist():
                for target in set().union(*(ranks_of_expert[expert] for expert in slots)) - {source}:
                    routing = len(slots) * (4 + 4)  # fp32 weights, int32 ids
                    expected[source] += config.hidden_size * 4 + routing
                    expected[target] += config.hidden_size * 4
        assert sent[:, layer].tolist() == expected


def find_ranks(config: HMoEConfig, layer: int, num_ranks: int) -> list[set[int]]:
    """The ranks that hold tiles of each expert; of nobody for the id of unused slots."""
    owners = [
        expert
        for expert, size in enumerate(config.layer_expert_sizes[layer])
        for _ in range(size // config.expert_tile_size)
    ]
    per_rank = len(owners) // num_ranks
    holders: list[set[int]] = [set() for _ in range(len(config.layer_expert_sizes[layer]) + 1)]
    for tile, expert in enumerate(owners):
        holders[expert].add(tile // per_rank)
    return holders


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if "ep_size" in (case.parallel or {})])
def test_auto_is_dispatch_by_expert_and_ranks_hold_equal_runs_of_tiles(folder, on_ranks, name):
    config = HMoEConfig.from_pretrained(folder / ALL[name].checkpoint)
    assert on_ranks[name]["ep_implementation"] == EP_IMPLEMENTATION
    num_tiles = sum(config.layer_expert_sizes[0]) // config.expert_tile_size
    assert on_ranks[name]["local_tiles"] == num_tiles // ALL[name].parallel["ep_size"]
    assert on_ranks[name]["num_experts"] == len(config.layer_expert_sizes[0])


def test_the_cases_hold_what_they_are_for(on_ranks):
    # Without these the comparisons above could hold for want of trouble.
    spanning = on_ranks["ep_on_fsdp-spanning"]["tokens"][0]  # [R, E]
    assert (spanning.sum() < 2 * BATCH.numel() * 4) and (spanning.sum() > BATCH.numel())
    starved = on_ranks["ep_on_fsdp-starved"]["tokens"]
    assert all(tokens[:, 4:].sum() == 0 for tokens in starved)  # the second rank gets no token at all
    by_rank = torch.stack(on_ranks["ep_4-pairs"]["tokens"])  # [L, R, E]
    assert ((by_rank == 0) & (by_rank.sum(dim=1, keepdim=True) > 0)).any()  # an expert without tokens on one rank


def test_a_folder_saved_by_ranks_loads_in_one_process(folder, on_ranks):
    for name in ("ep_on_tp-pairs", "ep_on_tp_fsdp-pairs"):
        saved = HMoEForCausalLM.from_pretrained(folder / name).eval()
        original = HMoEForCausalLM.from_pretrained(folder / "pairs").eval()
        assert torch.equal(saved(BATCH).logits, original(BATCH).logits)


def test_ep_size_that_does_not_divide_the_tiles_names_layer_tiles_and_divisors(folder):
    config = HMoEConfig.from_pretrained(folder / "by_layer")
    check_tiles_divide(config, 4)
    with pytest.raises(ValueError, match=r"`ep_size`=8 does not divide the 4 tiles of 8 neurons in layer 0"):
        check_tiles_divide(config, 8)
