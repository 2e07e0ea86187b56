"""Every expert backend against plain matrices in fp64: outputs and all gradients, over sizes, routings and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.rounding import rounding
from torch import Tensor
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hmoe import HMoEConfig, expert_sizes, grouped_hmoe, plan_hmoe
from hmoe.experts_hmoe import EXPERTS_IMPLEMENTATIONS, HMoEExperts
from hmoe.grouped_hmoe import ACTIVATIONS, _gated_experts
from hmoe.modeling_hmoe import HMoESparseMoeBlock
from hmoe.plan_hmoe import make_plan
from hmoe.routing_hmoe import route_top_k, route_top_p


HIDDEN = 16
BACKENDS = [name for name in EXPERTS_IMPLEMENTATIONS if name != "triton"]  # tested in a file of its own


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Fills every fresh torch.empty with NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """Shapes and routing of a layer; `routing`: random, first (all tokens on the first experts), top_p or one_slot."""

    sizes: list[int]
    tile: int | None = None
    num_tokens: int = 12
    num_slots: int = 2
    routing: str = "random"
    idle: int | None = None  # an expert that no token activates


CASES = {
    "arithmetic": Case(expert_sizes("arithmetic", 8, total=128)),
    "hybrid": Case(expert_sizes("hybrid", 8, total=32), num_slots=3),
    "pairs": Case(expert_sizes("pairs", 8, total=80)),
    "geometric-tile1": Case(expert_sizes("geometric", 5, total=31), tile=1),
    "uniform-one-tile-each": Case([24] * 4),
    "uniform-many-tiles": Case([24] * 4, tile=4),
    "tile-smaller-than-gcd": Case([8, 16, 24], tile=2),
    "tile1": Case([3, 1, 5], tile=1),
    "one-expert": Case([24], tile=8, num_slots=1),
    "64-experts": Case(expert_sizes("arithmetic", 64, total=1024, multiple_of=4), num_tokens=40, num_slots=4),
    "top1": Case([8, 16, 24], num_slots=1),
    "all-experts-active": Case([8, 16, 24], num_slots=3),
    "empty-first": Case([8, 16, 24, 8], idle=0),
    "empty-last": Case([8, 16, 24, 8], idle=3),
    "all-tokens-on-one": Case([8, 16, 24], num_slots=1, routing="first"),
    "all-tokens-on-two-of-five": Case([8, 16, 24, 8, 8], routing="first"),
    "top-p": Case([8, 16, 24, 8], num_slots=4, routing="top_p"),
    "top-p-capped": Case([8, 16, 24, 8], num_slots=2, routing="top_p"),
    "top-p-one-slot-used": Case([8, 16, 24, 8], num_slots=4, routing="one_slot"),
    "no-token": Case([8, 16, 24], num_tokens=0),
    "no-token-top-p": Case([8, 16, 24], num_tokens=0, num_slots=3, routing="top_p"),
    "one-token": Case([8, 16, 24], num_tokens=1),
    "wide": Case([1280, 64, 192], num_tokens=6),
    "runs-of-equal-sizes": Case([8] * 6 + [16] * 5 + [8] * 3, num_tokens=20),
    "runs-of-equal-sizes-idle-within": Case([8] * 6 + [16] * 5, num_tokens=20, idle=2),
    "runs-of-equal-sizes-top-p": Case([8] * 6 + [24] * 6, num_tokens=9, num_slots=4, routing="top_p"),
}


def make_experts(sizes: list[int], tile: int | None = None, act: str = "silu", hidden: int = HIDDEN) -> HMoEExperts:
    config = HMoEConfig(
        hidden_size=hidden,
        num_attention_heads=1,
        num_hidden_layers=1,
        expert_intermediate_sizes=sizes,
        expert_tile_size=tile,
        num_experts_per_tok=1,
        hidden_act=act,
    )
    experts = HMoEExperts(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        experts.gate_up_proj.normal_(std=hidden**-0.5, generator=generator)
        experts.down_proj.normal_(std=(sum(sizes) / len(sizes)) ** -0.5, generator=generator)
    return experts


def make_inputs(case: Case, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, H], expert ids [T, K] and weights [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = len(case.sizes)
    hidden_states = torch.randn(case.num_tokens, HIDDEN, generator=generator)
    logits = torch.randn(case.num_tokens, num_experts, generator=generator)
    if case.idle is not None:
        logits[:, case.idle] = -torch.inf
    if case.routing == "first":
        logits -= 100 * torch.arange(num_experts)
    probability = logits.softmax(-1)
    if case.routing in ("top_p", "one_slot"):
        weights, index = route_top_p(probability, 0.6 if case.routing == "top_p" else 1e-6, case.num_slots)
    else:
        weights, index = route_top_k(probability, case.num_slots)
    return hidden_states, index, weights


def run(experts: HMoEExperts, backend: str, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor | None]:
    """Output and all gradients of one forward and backward with a fixed random output gradient."""
    experts.config._experts_implementation = backend
    experts.zero_grad()
    hidden_states, index, weights = inputs
    hidden_states, weights = hidden_states.detach().requires_grad_(), weights.detach().requires_grad_()
    output = experts(hidden_states, index, weights)
    output.backward(output_gradient(output))
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": output.detach(), "hidden_states": hidden_states.grad, "weights": weights.grad, **gradients}


def output_gradient(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)


def run_reference(experts: HMoEExperts, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The same in fp64, token by token, on one gate, one up and one down matrix per expert cut out of the bank."""
    hidden_states, index, weights = inputs
    leaves = {"hidden_states": hidden_states, "weights": weights, **dict(experts.named_parameters())}
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    gate_up, down = leaves["gate_up_proj"], leaves["down_proj"]
    tile = down.shape[1]
    matrices = []
    for start, end in zip(experts.tile_offsets, experts.tile_offsets[1:]):
        gate = torch.cat([gate_up[i, :tile] for i in range(start, end)])  # [I, H]
        up = torch.cat([gate_up[i, tile:] for i in range(start, end)])  # [I, H]
        matrices.append((gate, up, torch.cat([down[i] for i in range(start, end)])))
    output = 0 * leaves["hidden_states"]
    for token, ids in enumerate(index.tolist()):
        for slot, expert in enumerate(ids):
            if expert < len(matrices):
                gate, up, down_rows = matrices[expert]
                x = leaves["hidden_states"][token]
                neurons = experts.act_fn(gate @ x) * (up @ x)  # [I]
                contribution = leaves["weights"][token, slot] * (neurons @ down_rows)
                output = output.index_add(0, torch.tensor([token]), contribution[None])
    values = torch.autograd.grad(output, leaves.values(), output_gradient(output), materialize_grads=True)
    return {"output": output.detach(), **dict(zip(leaves, values))}


def assert_close(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    """Every value within `tolerance` of the expected tensor's norm (per element on average) and all there."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            assert actual[name].shape == value.shape, name
            error = (actual[name].double() - value.double()).norm()
            assert error <= tolerance * max(value.double().norm().item(), 1e-3), f"{name}: {error}"


def layer_rounding(
    sizes: list[int], num_tokens: int, num_slots: int, hidden: int = HIDDEN, dtype=torch.float32
) -> float:
    """Of outputs and gradients of a layer: forward over the hidden size, an expert's neurons and a token's experts;
    back over the hidden size, the neurons of gate and up, and the experts, or over all tokens for a weight."""
    return rounding(dtype, *[hidden, max(sizes), num_slots], *[hidden, 2 * max(sizes), num_slots, num_tokens])


def case_rounding(case: Case, dtype: torch.dtype = torch.float32) -> float:
    return layer_rounding(case.sizes, case.num_tokens, case.num_slots, dtype=dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_equal_the_dense_fp64_reference(backend: str, case: Case):
    experts, inputs = make_experts(case.sizes, case.tile), make_inputs(case)
    assert_close(run(experts, backend, inputs), run_reference(experts, inputs), case_rounding(case))


@pytest.mark.parametrize("preset", ["hmoe-0.4b", "modse-300m-x8"])
def test_a_layer_of_the_papers_models(preset: str):
    config = HMoEConfig.from_preset(preset)
    sizes, hidden = config.layer_expert_sizes[0], config.hidden_size
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(5, hidden, generator=generator)
    weights, index = route_top_k(torch.rand(5, len(sizes), generator=generator).softmax(-1), 2)
    in_fp64 = make_experts(sizes, hidden=hidden).double()
    expected = run(in_fp64, "eager", (hidden_states.double(), index, weights.double()))
    actual = run(make_experts(sizes, hidden=hidden), "grouped_mm", (hidden_states, index, weights))
    assert_close(actual, expected, layer_rounding(sizes, 5, 2, hidden))


def test_thousands_of_tokens_on_one_expert():
    """More than one part holds, so that the parts of its gradient are added."""
    case = Case([1536, 64], num_tokens=1500, num_slots=1, routing="first")
    assert case.num_tokens * max(case.sizes) > plan_hmoe._LONGEST_PART
    hidden_states, index, weights = make_inputs(case)
    expected = run(make_experts(case.sizes).double(), "eager", (hidden_states.double(), index, weights.double()))
    actual = run(make_experts(case.sizes), "grouped_mm", (hidden_states, index, weights))
    assert_close(actual, expected, case_rounding(case))


@pytest.mark.parametrize("case", ["top-p", "empty-last", "64-experts"])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_fp64_is_computed_in_fp64(backend: str, case: str):
    experts = make_experts(CASES[case].sizes, CASES[case].tile).double()
    hidden_states, index, weights = make_inputs(CASES[case])
    inputs = hidden_states.double(), index, weights.double()
    assert_close(
        run(experts, backend, inputs), run_reference(experts, inputs), case_rounding(CASES[case], torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("router_dtype", ["fp32-router", "half-router"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_stays_near_fp64(backend: str, router_dtype: str, dtype: torch.dtype):
    experts = make_experts([8, 16, 24, 8]).to(dtype)
    hidden_states, index, weights = make_inputs(CASES["top-p"])
    inputs = hidden_states.to(dtype), index, weights if router_dtype == "fp32-router" else weights.to(dtype)
    actual = run(experts, backend, inputs)
    assert actual["output"].dtype == actual["hidden_states"].dtype == dtype
    assert actual["weights"].dtype == inputs[2].dtype
    assert_close(actual, run_reference(experts, inputs), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_autocast_keeps_the_router_in_fp32_and_the_experts_near_fp32(backend: str):
    torch.manual_seed(0)
    config = make_experts([8, 16, 24, 8]).config
    config._experts_implementation = backend
    block = HMoESparseMoeBlock(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    tokens = torch.randn(2, 6, HIDDEN)
    results = []
    for enabled in (False, True):
        hidden_states = tokens.clone().requires_grad_()
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, router_logits, _ = block(hidden_states)
        output.backward(output_gradient(output))
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        results.append({"output": output.detach(), "hidden_states": hidden_states.grad, **gradients})
        results[-1]["router_logits"] = router_logits.detach()
    full, autocast = results
    assert torch.equal(autocast.pop("router_logits"), full.pop("router_logits"))
    assert {name: value.dtype for name, value in autocast.items()} == dict.fromkeys(autocast, torch.float32)
    assert_close(autocast, full, 2 * torch.finfo(torch.bfloat16).eps)
    if backend != "tiled_grouped_mm":  # torch's grouped_mm knows no autocast: it stays in fp32
        assert not torch.equal(autocast["output"], full["output"]), "autocast had no effect"


@pytest.mark.parametrize("act", sorted(ACT2FN))
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_every_activation_agrees_with_eager(backend: str, act: str):
    """Learnable activations (prelu, xielu) included: their parameters are among the gradients compared."""
    experts, inputs = make_experts([8, 16, 24, 8], act=act), make_inputs(CASES["top-p"])
    expected = run(experts, "eager", inputs)
    learnable = torch.finfo(torch.bfloat16).eps if act == "xielu" else 0  # its parameters are bf16
    assert_close(run(experts, backend, inputs), expected, max(learnable, case_rounding(CASES["top-p"])))


@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_gradcheck_of_the_fused_op(act: str):
    experts = make_experts([2, 4, 6], act=act, hidden=4).double()
    experts.config._experts_implementation = "grouped_mm"
    index = torch.tensor([[0, 2], [2, 1], [0, 3]])  # expert 1 once, one unused slot
    weights = torch.tensor([[0.7, 0.3], [0.4, 0.6], [1.0, 0.0]], dtype=torch.float64)
    hidden_states = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def forward(hidden_states: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        bank = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return torch.func.functional_call(experts, bank, (hidden_states, index, weights))

    leaves = [hidden_states, weights, experts.gate_up_proj.detach(), experts.down_proj.detach()]
    assert torch.autograd.gradcheck(forward, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("saved", ["exact", "bounded", "nothing"])
def test_opcheck_of_the_fused_op(saved: str):
    """Schema, fake kernel and autograd registration, as torch.compile and torch.export rely on them."""
    case = CASES["all-experts-active"]  # fills the bound: what lies behind is not written, so it cannot be compared
    experts, (hidden_states, index, weights) = make_experts(case.sizes), make_inputs(case)
    bound = 2 * sum(case.sizes) * case.num_tokens
    tensors = [hidden_states, weights, experts.gate_up_proj, experts.down_proj]
    hidden_states, weights, *bank = (tensor.detach().requires_grad_(saved != "nothing") for tensor in tensors)
    numel = {"exact": -1, "bounded": bound, "nothing": 0}[saved]
    inputs = hidden_states, index, weights, *bank, experts.tile_offsets, "silu", numel
    results = torch.library.opcheck(_gated_experts, inputs)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_give_the_same(backend: str):
    case = CASES["top-p"]
    experts, (hidden_states, index, weights) = make_experts(case.sizes), make_inputs(case)
    strided = hidden_states.t().contiguous().t(), index.repeat_interleave(2, 1)[:, ::2], weights.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in strided)
    expected = run(experts, backend, (hidden_states, index, weights))
    assert_close(run(experts, backend, strided), expected, case_rounding(case))


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_an_expanded_output_gradient_is_accepted(backend: str):
    experts, inputs = make_experts([8, 16, 24]), make_inputs(CASES["top1"])
    experts.config._experts_implementation = backend
    gradients = []
    for weight in (torch.ones(1).expand(12, HIDDEN), torch.ones(12, HIDDEN)):
        output = experts(*inputs)
        gradients.append(torch.autograd.grad(output, experts.down_proj, weight)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "frozen",
    [
        ("gate_up_proj", "down_proj"),
        ("gate_up_proj",),
        ("down_proj",),
        ("hidden_states",),
        ("weights",),
        ("hidden_states", "weights"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_tensors_get_no_gradient_and_the_others_theirs(backend: str, frozen: tuple[str, ...]):
    experts, inputs = make_experts([8, 16, 24, 8]), make_inputs(CASES["top-p"])
    expected = run(experts, backend, inputs)
    experts.zero_grad()
    leaves = {"hidden_states": inputs[0].clone(), "weights": inputs[2].clone(), **dict(experts.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    output = experts(leaves["hidden_states"], inputs[1], leaves["weights"])
    output.backward(output_gradient(output))
    actual = {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    assert_close(actual, {**expected, **dict.fromkeys(frozen)}, case_rounding(CASES["top-p"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bit_identical(backend: str):
    experts, inputs = make_experts(CASES["64-experts"].sizes), make_inputs(CASES["64-experts"])
    first, second = (run(experts, backend, inputs) for _ in range(2))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_gives_the_output_of_training(backend: str):
    experts, inputs = make_experts([8, 16, 24, 8]), make_inputs(CASES["top-p"])
    trained = run(experts, backend, inputs)["output"]
    with torch.no_grad():
        assert_close({"output": experts(*inputs)}, {"output": trained}, case_rounding(CASES["top-p"]))


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("num_tokens", [1, 2, 40, 100])  # decoding, decoding of long batches, and beyond
@pytest.mark.parametrize("routing", ["random", "first", "top_p", "one_slot"])
def test_inference_agrees_with_eager(routing: str, num_tokens: int, dtype: torch.dtype, act: str):
    case = Case([8, 16, 24, 72], num_tokens=num_tokens, num_slots=3, routing=routing)
    experts, (hidden_states, index, weights) = make_experts(case.sizes, act=act).to(dtype), make_inputs(case)
    inputs = hidden_states.to(dtype), index, weights
    outputs = {}
    with torch.no_grad():
        for backend in ("grouped_mm", "eager"):
            experts.config._experts_implementation = backend
            outputs[backend] = experts(*inputs)
    assert not outputs["grouped_mm"].is_inference(), "autograd could not use it afterwards"
    # In bf16 sums are in fp32: projections, neurons, an expert's output and the sum of all are what is rounded.
    tolerance = rounding(dtype, 4) if dtype == torch.bfloat16 else case_rounding(case, dtype)
    assert_close({"output": outputs["grouped_mm"]}, {"output": outputs["eager"]}, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 6, 7, 15, 16, 17])
@pytest.mark.parametrize("size", [16, 1152, 1100], ids=["small", "large", "large, not of whole pieces"])
def test_the_ways_of_multiplying_a_few_rows_agree(size: int, num_rows: int, dtype: torch.dtype):
    rows, neurons = torch.randn(num_rows, 256).to(dtype), torch.randn(num_rows, size).to(dtype)
    matrix = torch.randn(size, 256).to(dtype)
    assert grouped_hmoe._is_large(matrix) == (size > 16)
    actual = {
        "up": grouped_hmoe._project_up(rows, matrix).view(num_rows, size),
        "down": grouped_hmoe._project_down(neurons, matrix),
    }
    expected = {"up": rows.double() @ matrix.double().t(), "down": neurons.double() @ matrix.double()}
    terms = {"up": 256, "down": size}
    for name in actual:
        tolerance = rounding(dtype, 16 if dtype == torch.bfloat16 else terms[name])  # bf16 sums are in fp32
        assert_close({name: actual[name]}, {name: expected[name]}, tolerance)


def test_experts_of_one_size_with_few_rows_are_multiplied_together():
    def experts_and_rows(rows: list[int], sizes: list[int]) -> list[tuple[int, int, int]]:
        groups = make_plan(rows, sizes, torch.empty(sum(rows), 512), training=True).groups
        return [(group.first, group.num_experts, group.num_rows) for group in groups]

    assert experts_and_rows([2, 1, 3, 2], [32] * 4) == [(0, 4, 3)]
    assert experts_and_rows([2, 1, 3, 2], [32, 32, 64, 64]) == [(0, 2, 2), (2, 2, 3)]
    assert experts_and_rows([2, 1, 3], [32, 64, 32]) == [(0, 1, 2), (1, 1, 1), (2, 1, 3)]
    # One without rows is carried along where that is cheaper than another call, never at an end.
    assert experts_and_rows([0, 2, 0, 3, 0], [32] * 5) == [(1, 3, 3)]
    assert experts_and_rows([2, 0, 3], [4096] * 3) == [(0, 1, 2), (2, 1, 3)]
    assert experts_and_rows([2, 0, 3], [32, 64, 32]) == [(0, 1, 2), (2, 1, 3)]
    # Rows of zeros would cost more than a call.
    assert experts_and_rows([2, 900], [1024] * 2) == [(0, 1, 2), (1, 1, 900)]
    assert experts_and_rows([0, 0], [32] * 2) == []


@pytest.mark.parametrize("room", [0, 1], ids=["for no row of zeros", "for all"])
def test_a_bound_on_what_is_saved_holds(room: int):
    """The compiler's bound counts no rows of zeros: where they do not fit, experts are multiplied one by one."""
    case = Case([8] * 4, num_tokens=9, num_slots=1)
    experts, (hidden_states, _, weights) = make_experts(case.sizes), make_inputs(case)
    index = torch.tensor([0] * 6 + [1, 2, 3]).unsqueeze(1)
    leaves = [hidden_states, weights, experts.gate_up_proj, experts.down_proj]
    hidden_states, weights, *bank = (leaf.detach().requires_grad_() for leaf in leaves)
    needed = 2 * 8 * 9
    output, saved, *_ = _gated_experts(
        hidden_states, index, weights, *bank, experts.tile_offsets, "silu", needed + room * 2 * 8 * 15
    )
    values = torch.autograd.grad(output, [hidden_states, weights, *bank], output_gradient(output))
    names = ["hidden_states", "weights", "gate_up_proj", "down_proj"]
    actual = {"output": output.detach(), **dict(zip(names, values))}
    assert_close(actual, run_reference(experts, (hidden_states, index, weights)), case_rounding(case))
    assert not saved.isnan().any(), "more was reserved than written"


@pytest.mark.parametrize(("segment", "part"), [(1, 1), (100, 60), (300, 1 << 20), (1 << 20, 150)])
@pytest.mark.parametrize("case", ["arithmetic", "64-experts", "top-p", "empty-first", "all-tokens-on-one"])
def test_where_segments_end_changes_nothing(case: str, segment: int, part: int, monkeypatch: pytest.MonkeyPatch):
    """Segments of one expert, of several, and experts cut into parts that add to the same gradient."""
    experts, inputs = make_experts(CASES[case].sizes), make_inputs(CASES[case])
    monkeypatch.setattr(plan_hmoe, "_SEGMENT", segment)
    monkeypatch.setattr(plan_hmoe, "_LONGEST_PART", part)
    assert_close(run(experts, "grouped_mm", inputs), run_reference(experts, inputs), case_rounding(CASES[case]))


@pytest.mark.parametrize(
    ("sizes", "idle"),
    [([8, 16, 24, 8], 0), ([8, 16, 24, 8], 3), ([8] * 6, 2)],
    ids=["first", "last", "among experts of its size"],
)
@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_weights_of_an_idle_expert_count_for_nothing(backend: str, sizes: list[int], idle: int):
    experts, inputs = make_experts(sizes), make_inputs(Case(sizes, idle=idle))
    expected = run(experts, backend, inputs)
    tiles = slice(experts.tile_offsets[idle], experts.tile_offsets[idle + 1])
    with torch.no_grad():
        experts.gate_up_proj[tiles] = torch.nan
        experts.down_proj[tiles] = torch.nan
    assert_close(run(experts, backend, inputs), expected, 0.0)
    assert not experts.gate_up_proj.grad[tiles].any()
    assert not experts.down_proj.grad[tiles].any()


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_weights_of_unused_slots_are_never_read(backend: str):
    experts, (hidden_states, index, weights) = make_experts([8, 16, 24, 8]), make_inputs(CASES["top-p"])
    expected = run(experts, backend, (hidden_states, index, weights))
    assert (index == 4).any()
    garbage = weights.masked_fill(index == 4, torch.nan)
    assert_close(run(experts, backend, (hidden_states, index, garbage)), expected, 0.0)


def test_grouped_mm_saves_less_for_backward_than_mixtral_and_no_gathered_tokens():
    num_tokens, num_slots, sizes = 24, 2, [16, 32, 48, 64]
    experts = make_experts(sizes)
    experts.config._experts_implementation = "grouped_mm"
    mixtral_config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=40, num_local_experts=4)
    mixtral_config._experts_implementation = "grouped_mm"
    mixtral = MixtralExperts(mixtral_config)
    for parameter in mixtral.parameters():
        torch.nn.init.normal_(parameter)
    hidden_states = torch.randn(num_tokens, HIDDEN, requires_grad=True)
    # Each expert gets as many tokens, so both activate as many neurons.
    index = torch.arange(num_tokens * num_slots).view(num_tokens, num_slots) % len(sizes)
    weights = torch.full(index.shape, 0.5, requires_grad=True)

    def saved_tensors(module: torch.nn.Module) -> list[Tensor]:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(hidden_states, index, weights)
        banks = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        return [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in banks]

    def num_bytes(tensors: list[Tensor]) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    saved, saved_by_mixtral = saved_tensors(experts), saved_tensors(mixtral)
    assert num_bytes(saved) < num_bytes(saved_by_mixtral)
    gathered = num_tokens * num_slots, HIDDEN
    assert gathered in [tuple(tensor.shape) for tensor in saved_by_mixtral]
    assert gathered not in [tuple(tensor.shape) for tensor in saved]


def test_second_derivatives_of_the_fused_op_are_refused_rather_than_wrong():
    experts, (hidden_states, index, weights) = make_experts([8, 16, 24, 8]), make_inputs(CASES["top-p"])
    experts.config._experts_implementation = "grouped_mm"
    output = experts(hidden_states.requires_grad_(), index, weights)
    (gradient,) = torch.autograd.grad(output.square().sum(), hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.square().sum(), experts.down_proj)
