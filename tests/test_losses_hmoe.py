"""Router losses against the papers' formulas in plain Python; their masks and gradients; how the model adds them."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral import modeling_mixtral

from hmoe import HMoEConfig, HMoEForCausalLM
from hmoe.routing_hmoe import (
    LayerRouting,
    activation_frequency,
    load_balancing_loss,
    parameter_penalty_loss,
    route_top_k,
    route_top_p,
    router_entropy_loss,
    router_z_loss,
    weighted_router_losses,
)


TERMS = ("load_balancing_loss", "parameter_penalty_loss", "router_entropy_loss", "router_z_loss")
LOAD_BALANCING_COUNTS = ("activated", "top1")
PENALTY_NORMALIZERS = ("mean", "max", "sum", "none")
BATCH, LENGTH = 3, 5
SIZES_BY_LAYER = [[8, 16, 24, 32], [4, 4, 40]]
PADDING = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
ROUTES = {
    "top-k": lambda probability: route_top_k(probability, 2)[1],
    "top-p": lambda probability: route_top_p(probability, 0.5)[1],
}


def literal_losses(
    router_logits: list[list[list[float]]],
    router_index: list[list[list[int]]],
    expert_sizes: list[list[int]],
    mask: list[int],
    counts: str,
    normalizer: str,
) -> dict[str, float]:
    """HMoE Eq. 3-5, MoDSE's loss and ST-MoE's z-loss, token by token in fp64; the mean over layers."""
    sums = dict.fromkeys(TERMS, 0.0)
    for logits, index, sizes in zip(router_logits, router_index, expert_sizes):
        num_experts, num_tokens = len(sizes), sum(mask)
        scale = {"mean": sum(sizes) / num_experts, "max": max(sizes), "sum": sum(sizes), "none": 1}[normalizer]
        activated, first, probability = [0.0] * num_experts, [0.0] * num_experts, [0.0] * num_experts
        for row, experts, counted in zip(logits, index, mask):
            if not counted:
                continue
            partition = math.fsum(map(math.exp, row))
            p = [math.exp(value) / partition for value in row]
            for expert in experts:
                if expert < num_experts:
                    activated[expert] += 1 / num_tokens
            first[p.index(max(p))] += 1 / num_tokens
            for expert in range(num_experts):
                probability[expert] += p[expert] / num_tokens
            sums["router_entropy_loss"] += num_experts * -math.fsum(x * math.log(x) for x in p) / num_tokens
            sums["router_z_loss"] += math.log(partition) ** 2 / num_tokens
        balanced = first if counts == "top1" else activated
        sums["load_balancing_loss"] += num_experts * math.fsum(f * p for f, p in zip(balanced, probability))
        sums["parameter_penalty_loss"] += num_experts * math.fsum(
            f * size / scale * p for f, size, p in zip(activated, sizes, probability)
        )
    return {name: value / len(expert_sizes) for name, value in sums.items()}


def random_layers(route: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Router logits and the experts they activate, for two layers of four and three experts."""
    logits = [torch.randn(BATCH * LENGTH, len(sizes), dtype=dtype) * 2 for sizes in SIZES_BY_LAYER]
    return logits, [ROUTES[route](layer.softmax(dim=-1)) for layer in logits]


@pytest.fixture
def losses_of(tiny_config):
    """The raw losses of layers that route as given: `losses_of(logits, index, mask, **config_fields)`."""

    def compute(logits, index, attention_mask=None, **fields) -> dict[str, Tensor]:
        config = tiny_config(expert_intermediate_sizes=SIZES_BY_LAYER, **fields)
        return weighted_router_losses(logits, index, config, attention_mask)[1]

    return compute


def layer_of(
    *,
    logits: Tensor | None = None,
    frequency: Tensor | None = None,
    probability: Tensor | None = None,
    sizes: list[int] | None = None,
    **fields,
) -> LayerRouting:
    """One layer with the given statistics; what a loss does not read is left out."""
    sizes = sizes or [16] * (frequency if logits is None else logits).shape[-1]
    config = HMoEConfig(expert_intermediate_sizes=sizes, num_experts_per_tok=1, **fields)
    return LayerRouting(config, logits, sizes, None, probability, frequency, count=None)


def random_frequency(num_experts: int) -> Tensor:
    return activation_frequency(torch.randint(num_experts, (20, 2)), num_experts=num_experts)


@pytest.mark.parametrize("mask", [None, PADDING], ids=["unpadded", "padded"])
@pytest.mark.parametrize("normalizer", PENALTY_NORMALIZERS)
@pytest.mark.parametrize("counts", LOAD_BALANCING_COUNTS)
@pytest.mark.parametrize("route", ROUTES)
def test_losses_are_the_papers_formulas(losses_of, route, counts, normalizer, mask):
    logits, index = random_layers(route)
    actual = losses_of(logits, index, mask, load_balancing_counts=counts, parameter_penalty_normalizer=normalizer)
    expected = literal_losses(
        [layer.double().tolist() for layer in logits],
        [layer.tolist() for layer in index],
        SIZES_BY_LAYER,
        [1] * (BATCH * LENGTH) if mask is None else mask.reshape(-1).tolist(),
        counts,
        normalizer,
    )
    assert {name: value.item() for name, value in actual.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_equal_sizes_make_the_penalty_the_load_balancing_loss(normalizer):
    """Stated in HMoE section 3.3."""
    frequency, probability = random_frequency(8), torch.rand(8).softmax(dim=-1)
    layer = layer_of(
        frequency=frequency, probability=probability, sizes=[4096] * 8, parameter_penalty_normalizer=normalizer
    )
    balance, penalty = load_balancing_loss(layer), parameter_penalty_loss(layer)
    torch.testing.assert_close(penalty, balance, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [("mean", 2.0), ("none", 8192.0), ("max", 2 * 4096 / 5888), ("sum", 0.25)],
    ids=["mean", "none", "max", "sum"],
)
def test_penalty_at_uniform_top_2_routing_has_the_derived_scale(normalizer, expected):
    """k * mean(size) / normalizer for the widths of HMoE-3B: raw sizes make it 8192, beside an LM loss of about 3."""
    sizes = HMoEConfig.from_preset("hmoe-3b").expert_intermediate_sizes
    layer = layer_of(
        frequency=torch.full((8,), 2 / 8),
        probability=torch.full((8,), 1 / 8),
        sizes=sizes,
        parameter_penalty_normalizer=normalizer,
    )
    penalty = parameter_penalty_loss(layer)
    assert penalty.item() == pytest.approx(expected)


def test_load_balancing_at_uniform_routing_is_the_number_of_experts_per_token():
    uniform = torch.full((8,), 1 / 8)
    assert load_balancing_loss(layer_of(frequency=3 * uniform, probability=uniform)).item() == pytest.approx(3)


def test_penalty_step_moves_probability_from_large_to_small_experts():
    logits = torch.zeros(1, 4, requires_grad=True)
    probability = logits.softmax(dim=-1).mean(dim=0)
    layer = layer_of(frequency=torch.full((4,), 0.5), probability=probability, sizes=[8, 16, 24, 32])
    parameter_penalty_loss(layer).backward()
    step = -logits.grad[0]
    assert step.tolist() == sorted(step.tolist(), reverse=True)
    assert step[0] > 0 > step[-1]


def test_entropy_is_largest_for_uniform_probabilities():
    uniform = router_entropy_loss(layer_of(logits=torch.zeros(1, 8))).item()
    assert uniform == pytest.approx(8 * math.log(8))
    assert all(router_entropy_loss(layer_of(logits=torch.randn(1, 8))).item() < uniform for _ in range(20))


def test_minimising_the_entropy_loss_lowers_the_entropy():
    """The sign printed in HMoE Eq. 5 would raise it."""
    logits = torch.randn(16, 8, requires_grad=True)
    before = router_entropy_loss(layer_of(logits=logits))
    before.backward()
    after = router_entropy_loss(layer_of(logits=logits.detach() - 0.1 * logits.grad))
    assert after < before.detach()


def test_z_loss_sees_the_shift_that_softmax_does_not():
    logits = torch.randn(16, 8) + torch.tensor([[0.0], [30.0]]).repeat(8, 1)
    expected = sum(math.log(math.fsum(map(math.exp, row))) ** 2 for row in logits.double().tolist()) / 16
    assert router_z_loss(layer_of(logits=logits)).item() == pytest.approx(expected, rel=1e-5)


def test_counts_carry_no_gradient():
    logits = torch.randn(20, 4, requires_grad=True)
    frequency = activation_frequency(ROUTES["top-k"](logits.softmax(dim=-1)), num_experts=4)
    assert not frequency.requires_grad
    probability = torch.rand(4, requires_grad=True)
    load_balancing_loss(layer_of(frequency=frequency, probability=probability)).backward()
    torch.testing.assert_close(probability.grad, 4 * frequency)


def test_activation_frequency_sums_to_the_experts_per_token():
    index = ROUTES["top-p"](torch.randn(50, 4).softmax(dim=-1))
    frequency = activation_frequency(index, num_experts=4)
    assert frequency.sum().item() == pytest.approx((index < 4).sum().item() / 50)


def test_global_batch_counts_are_those_of_all_ranks_together(monkeypatch):
    index = [torch.tensor([[0, 1], [0, 3], [0, 2]]), torch.tensor([[2, 3], [2, 3]])]  # 3 marks an unused slot
    mask = [torch.tensor([1, 1, 0]), torch.tensor([1, 1])]
    sent = []  # what the other rank puts into the sum
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.clone()))
    activation_frequency(index[1], num_experts=3, token_mask=mask[1], reduce=True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(sent[0]))
    frequency = activation_frequency(index[0], num_experts=3, token_mask=mask[0], reduce=True)
    together = activation_frequency(torch.cat(index), num_experts=3, token_mask=torch.cat(mask))
    torch.testing.assert_close(frequency, together)


@pytest.mark.parametrize("counts", LOAD_BALANCING_COUNTS)
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_are_those_of_finite_differences(losses_of, route, counts):
    logits, index = random_layers(route, torch.float64)

    def losses(*layers: Tensor) -> tuple[Tensor, ...]:
        return tuple(losses_of(layers, index, PADDING, load_balancing_counts=counts).values())

    assert torch.autograd.gradcheck(losses, [layer.requires_grad_() for layer in logits], fast_mode=True)


@pytest.mark.parametrize("counts", LOAD_BALANCING_COUNTS)
@pytest.mark.parametrize("route", ROUTES)
def test_padding_changes_neither_losses_nor_gradients(losses_of, route, counts):
    logits, _ = random_layers(route)
    padded = PADDING.reshape(-1) == 0
    results = []
    for noise in (0.0, 50.0):
        layers = [torch.where(padded[:, None], layer + noise * torch.randn_like(layer), layer) for layer in logits]
        layers = [layer.requires_grad_() for layer in layers]
        index = [ROUTES[route](layer.softmax(dim=-1)) for layer in layers]
        terms = losses_of(layers, index, PADDING, load_balancing_counts=counts)
        gradients = torch.autograd.grad(sum(terms.values()), layers)
        assert all((gradient[padded] == 0).all() for gradient in gradients)
        results.append([*terms.values(), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.fixture
def losses_with(losses_of):
    """The raw losses of always the same layers under a mask."""

    def compute(mask: Tensor | None) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return losses_of(*random_layers("top-p"), mask)

    return compute


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=["bool", "int", "float"])
def test_mask_of_any_type_counts_the_same(losses_with, dtype):
    torch.testing.assert_close(losses_with(PADDING.to(dtype)), losses_with(PADDING), rtol=0, atol=0)


def test_full_mask_is_no_mask(losses_with):
    torch.testing.assert_close(losses_with(torch.ones(BATCH, LENGTH)), losses_with(None))


def test_mask_longer_than_the_sequence_counts_by_its_last_positions(losses_with):
    """With a cache the mask covers the past too."""
    past = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 1]])
    with_past = torch.cat([past, PADDING], dim=1)
    torch.testing.assert_close(losses_with(with_past), losses_with(PADDING), rtol=0, atol=0)


def test_mask_of_token_pairs_is_ignored(losses_with):
    pairs = torch.ones(BATCH, 1, LENGTH, LENGTH).tril()
    torch.testing.assert_close(losses_with(pairs), losses_with(None), rtol=0, atol=0)


def test_batch_of_padding_alone_gives_zero_losses_and_gradients(losses_of):
    logits, index = random_layers("top-p")
    layers = [layer.requires_grad_() for layer in logits]
    terms = losses_of(layers, index, torch.zeros(BATCH, LENGTH))
    assert [value.item() for value in terms.values()] == [0] * len(TERMS)
    gradients = torch.autograd.grad(sum(terms.values()), layers)
    assert all((gradient == 0).all() for gradient in gradients)


ALL_COEFS = {
    "load_balancing_loss_coef": 0.01,
    "parameter_penalty_loss_coef": 0.1,
    "router_entropy_loss_coef": 0.03,
    "router_z_loss_coef": 0.001,
}
MODELS = {
    "top-k": {},
    "top-p": {"routing": "top_p", "parameter_penalty_normalizer": "max"},
    "modse-top1": {"router_type": "modse", "load_balancing_counts": "top1"},
    "sizes-by-layer": {"expert_intermediate_sizes": SIZES_BY_LAYER},
}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    input_ids = torch.randint(64, (BATCH, LENGTH))
    return {"input_ids": input_ids, "attention_mask": PADDING, "labels": input_ids.where(PADDING == 1, -100)}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_model_reports_the_losses_of_its_router_outputs(tiny_config, batch, overrides):
    config = tiny_config(**ALL_COEFS, **overrides)
    output = HMoEForCausalLM(config).train()(**batch, output_router_logits=True)
    _, expected = weighted_router_losses(output.router_logits, output.router_index, config, PADDING)
    torch.testing.assert_close({name: output[name] for name in TERMS}, expected)
    weighted = sum(ALL_COEFS[f"{name}_coef"] * expected[name] for name in TERMS)
    torch.testing.assert_close(output.aux_loss, weighted)


@pytest.mark.parametrize("aux_coef", [0.5, 1.0, 2], ids="aux{}".format)
@pytest.mark.parametrize("output_router_logits", [False, True], ids=["logits-hidden", "logits-returned"])
def test_training_adds_the_aux_loss_whatever_is_returned(tiny_config, batch, aux_coef, output_router_logits):
    model = HMoEForCausalLM(tiny_config(**ALL_COEFS, router_aux_loss_coef=aux_coef)).train()
    output = model(**batch, output_router_logits=output_router_logits)
    assert output.aux_loss > 0
    torch.testing.assert_close(output.loss, output.lm_loss + aux_coef * output.aux_loss)
    assert (output.router_logits is not None) == output_router_logits


@pytest.mark.parametrize("output_router_logits", [False, True], ids=["logits-hidden", "logits-returned"])
def test_evaluation_loss_is_the_pure_lm_loss(tiny_config, batch, output_router_logits):
    model = HMoEForCausalLM(tiny_config(**ALL_COEFS)).eval()
    output = model(**batch, output_router_logits=output_router_logits)
    pure = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, pure)
    torch.testing.assert_close(output.lm_loss, pure)


@pytest.mark.parametrize(
    "coefs", [{"parameter_penalty_loss_coef": 0.0}, {"router_aux_loss_coef": 0.0}], ids=["no-term", "no-factor"]
)
def test_training_without_coefficients_adds_nothing(tiny_config, batch, coefs):
    output = HMoEForCausalLM(tiny_config(**coefs)).train()(**batch)
    assert output.aux_loss is None
    torch.testing.assert_close(output.loss, output.lm_loss, rtol=0, atol=0)


def test_aux_gradient_ignores_how_many_micro_batches_make_the_batch(tiny_config, batch):
    """Two equal micro-batches, each with the label count of both, add up to the gradient of one."""
    num_labels = (batch["labels"][:, 1:] != -100).sum()
    gradients = []
    for num_micro_batches in (1, 2):
        torch.manual_seed(0)
        model = HMoEForCausalLM(tiny_config(**ALL_COEFS)).train()
        for _ in range(num_micro_batches):
            model(**batch, num_items_in_batch=num_micro_batches * num_labels).loss.backward()
        gradients.append([layer.mlp.gate.weight.grad for layer in model.model.layers])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", TERMS)
def test_each_aux_term_alone_trains_the_routers(tiny_config, batch, name):
    coefs = dict.fromkeys(ALL_COEFS, 0.0) | {f"{name}_coef": 1.0}
    model = HMoEForCausalLM(tiny_config(**coefs)).train()
    output = model(**batch)
    (output.loss - output.lm_loss).backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_a_model_that_trl_tags_answers_mixtrals_function_with_its_own_loss_and_others_do_not(
    monkeypatch, tiny_config, batch
):
    stock = getattr(
        modeling_mixtral.load_balancing_loss_func, "__wrapped__", modeling_mixtral.load_balancing_loss_func
    )
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", stock)
    model = HMoEForCausalLM(tiny_config(**ALL_COEFS)).train()
    model.add_model_tags(["finance"])
    assert modeling_mixtral.load_balancing_loss_func is stock
    model.add_model_tags(["trl", "sft"])
    replaced = modeling_mixtral.load_balancing_loss_func
    model.add_model_tags("trl")
    assert modeling_mixtral.load_balancing_loss_func is replaced is not stock
    output = model(**batch, output_router_logits=True)
    torch.testing.assert_close(replaced(output.router_logits, 4, 2, PADDING), output.aux_loss, rtol=0, atol=0)
    others = tuple(output.router_logits)
    torch.testing.assert_close(replaced(others, 4, 2, PADDING), stock(others, 4, 2, PADDING), rtol=0, atol=0)
    assert replaced(None) == 0
