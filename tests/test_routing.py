"""The router: Top-K and Top-P against the papers' equations, precision, gradients, and what happens to NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from hmoe import HMoEConfig
from hmoe.routing_hmoe import ROUTERS, HMoERouter, route_top_k, route_top_p


def literal_top_p(probability: list[float], p: float, cap: int | None = None) -> dict[int, float]:
    """HMoE Eq. 9-11: sort, the smallest t with sum >= p (here at most `cap`), renormalise; expert id -> weight."""
    order = sorted(range(len(probability)), key=lambda i: -probability[i])  # stable: of equals the lower id first
    t = next((t for t in range(1, len(order) + 1) if math.fsum(probability[i] for i in order[:t]) >= p), len(order))
    chosen = order[: min(t, cap or t)]
    return {i: probability[i] / math.fsum(probability[j] for j in chosen) for i in chosen}


def chosen(weights: Tensor, index: Tensor, num_experts: int) -> list[dict[int, float]]:
    """Per token, expert id -> weight, without the unused slots."""
    pairs = [zip(ids, values) for ids, values in zip(index.tolist(), weights.tolist())]
    return [{i: value for i, value in token if i < num_experts} for token in pairs]


@st.composite
def distributions(draw) -> list[float]:
    """Probabilities that are multiples of 1/64, so that their sums are exact and ties with `p` are real ties."""
    cuts = sorted(draw(st.lists(st.integers(0, 64), max_size=7)))
    return [(end - start) / 64 for start, end in zip([0, *cuts], [*cuts, 64])]


THRESHOLDS = st.integers(1, 64).map(lambda n: n / 64) | st.floats(1e-12, 1.0)


@given(probability=distributions(), p=THRESHOLDS, cap=st.none() | st.integers(1, 8))
@example(probability=[0.25] * 4, p=0.5, cap=None).via("ties: the sum reaches p exactly")
@example(probability=[0.0, 0.0, 1.0], p=0.6, cap=None).via("one expert dominates")
@example(probability=[0.5, 0.25, 0.25], p=1.0, cap=None).via("p = 1 takes all")
@example(probability=[0.25, 0.5, 0.25], p=1e-12, cap=None).via("a tiny p takes one")
@example(probability=[1.0], p=0.6, cap=None).via("one expert only")
@example(probability=[0.25] * 4, p=1.0, cap=3).via("the cap binds")
def test_top_p_is_eq_9_to_11(probability, p, cap):
    weights, index = route_top_p(torch.tensor([probability], dtype=torch.float64), p, cap)
    [actual] = chosen(weights, index, len(probability))
    expected = literal_top_p(probability, p, cap)
    assert actual.keys() == expected.keys()
    assert actual == pytest.approx(expected, abs=1e-12)


@given(probability=distributions(), p=THRESHOLDS, cap=st.none() | st.integers(1, 8))
def test_top_p_has_fixed_shapes_and_unused_slots_hold_the_sentinel_with_weight_zero(probability, p, cap):
    num_experts = len(probability)
    weights, index = route_top_p(torch.tensor([probability] * 3), p, cap)
    assert weights.shape == index.shape == (3, min(cap or num_experts, num_experts))
    assert (weights[index == num_experts] == 0).all()
    assert ((index >= 0) & (index <= num_experts)).all()
    assert (index[:, 0] < num_experts).all()  # at least one expert
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3))


@given(probability=distributions(), thresholds=st.tuples(THRESHOLDS, THRESHOLDS))
def test_top_p_of_a_larger_threshold_activates_a_superset(probability, thresholds):
    fewer, more = (
        set(chosen(*route_top_p(torch.tensor([probability]), p), len(probability))[0]) for p in sorted(thresholds)
    )
    assert fewer <= more


@pytest.mark.parametrize("normalize", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("k", [1, 2, 5], ids=["k1", "k2", "k-all"])
def test_top_k_is_eq_8(k, normalize):
    probability = torch.rand(20, 5, dtype=torch.float64).softmax(dim=-1)
    actual = chosen(*route_top_k(probability, k, normalize=normalize), num_experts=5)
    for row, weights in zip(probability.tolist(), actual):
        best = sorted(range(5), key=lambda i: -row[i])[:k]
        total = sum(row[i] for i in best) if normalize else 1
        assert weights == pytest.approx({i: row[i] / total for i in best})


ROUTINGS = {
    "top-k": {"routing": "top_k"},
    "top-k-raw": {"routing": "top_k", "norm_topk_prob": False},
    "top-p": {"routing": "top_p", "router_top_p": 0.9},
    "top-p-capped": {"routing": "top_p", "router_top_p": 0.9, "max_experts_per_tok": 3},
    "modse": {"router_type": "modse"},
}
EVERY_ROUTING = pytest.mark.parametrize("overrides", ROUTINGS.values(), ids=ROUTINGS)


def make_router(config: HMoEConfig, dtype: torch.dtype = torch.float32) -> HMoERouter:
    router = ROUTERS[config.router_type](config, layer_idx=0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return router.to(dtype)


def test_modse_gate_is_eq_1_to_5(tiny_config):
    """H = x W_g + RMSNorm(softplus(x W_n)), then the softmax over the K largest entries of H."""
    config = tiny_config(router_type="modse")
    router = make_router(config)
    hidden_states = torch.randn(6, config.hidden_size)
    logits, weights, index = router(hidden_states)
    gate, noise, gamma = (parameter.double().tolist() for parameter in router.parameters())

    def dot(row, x):
        return math.fsum(a * b for a, b in zip(row, x))

    for x, token_logits, token_weights in zip(hidden_states.tolist(), logits.tolist(), chosen(weights, index, 4)):
        softplus = [math.log1p(math.exp(dot(row, x))) for row in noise]
        rms = math.sqrt(math.fsum(value**2 for value in softplus) / 4 + config.rms_norm_eps)
        expected = [dot(row, x) + g * value / rms for row, g, value in zip(gate, gamma, softplus)]
        assert token_logits == pytest.approx(expected, abs=1e-5)
        kept = sorted(range(4), key=lambda i: -expected[i])[: config.num_experts_per_tok]
        total = math.fsum(math.exp(expected[i]) for i in kept)
        assert token_weights == pytest.approx({i: math.exp(expected[i]) / total for i in kept}, abs=1e-5)


def test_modse_gate_draws_nothing_at_random(tiny_config):
    router = make_router(tiny_config(router_type="modse")).train()
    hidden_states = torch.randn(6, 32)
    torch.testing.assert_close(router(hidden_states), router(hidden_states), rtol=0, atol=0)


@EVERY_ROUTING
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_router_computes_in_fp32_from_rounded_weights(tiny_config, overrides, dtype, autocast):
    router = make_router(tiny_config(**overrides), dtype)
    hidden_states = torch.randn(16, 32, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        actual = router(hidden_states)
    expected = router.float()(hidden_states.float())
    assert actual[0].dtype == actual[1].dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_router_keeps_fp32_weights_from_autocast(tiny_config):
    router = make_router(tiny_config())
    hidden_states = torch.randn(16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _, _ = router(hidden_states)
    torch.testing.assert_close(logits, F.linear(hidden_states, router.weight), rtol=0, atol=0)


@EVERY_ROUTING
def test_router_accepts_an_empty_batch(tiny_config, overrides):
    router = make_router(tiny_config(**overrides))
    slots = router(torch.randn(3, 32))[2].shape[1]
    logits, weights, index = router(torch.empty(0, 32))
    assert (logits.shape, weights.shape, index.shape) == ((0, 4), (0, slots), (0, slots))


@EVERY_ROUTING
def test_nan_of_a_token_reaches_its_weights_and_no_other_tokens(tiny_config, overrides):
    router = make_router(tiny_config(**overrides))
    hidden_states = torch.randn(5, 32)
    clean = router(hidden_states)
    hidden_states[2, 7] = math.nan
    _, weights, index = broken = router(hidden_states)
    assert weights[2].isnan().any()
    assert ((index >= 0) & (index <= 4)).all()
    others = torch.tensor([0, 1, 3, 4])
    for before, after in zip(clean, broken):
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)


@EVERY_ROUTING
def test_gradients_reach_every_router_parameter_through_the_weights(tiny_config, overrides):
    router = make_router(tiny_config(**overrides))
    _, weights, _ = router(torch.randn(16, 32))
    # Any function but their sum, which renormalisation makes constant.
    (weights * torch.randn_like(weights)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad.norm(dim=-1) > 0).all(), name
