"""The Triton kernels against eager and fp64: on a GPU if there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_experts_hmoe import assert_close, layer_rounding, make_experts, output_gradient, run_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.dynamic_module_utils import get_imports

from hmoe import HMoEForCausalLM, expert_sizes, triton_hmoe
from hmoe.experts_hmoe import HMoEExperts, HMoEExpertsInterface
from hmoe.routing_hmoe import route_top_k, route_top_p


SOURCE = Path(triton_hmoe.__file__)
DEVICE = "cuda" if torch.cuda.is_available() and not triton_hmoe.INTERPRETED else "cpu"
SMALL_BLOCKS = triton_hmoe.Launch(rows=16, columns=16, neurons=16, inner=16, num_warps=4, num_stages=2)
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def small_blocks_and_uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch):
    """Small shapes then have several blocks, and reading what was never written shows."""
    monkeypatch.setitem(HMoEExpertsInterface._global_mapping, "triton", triton_hmoe.triton_forward)
    for key in triton_hmoe.LAUNCHES:
        monkeypatch.setitem(triton_hmoe.LAUNCHES, key, SMALL_BLOCKS)
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")  # cuBLAS wants more than this
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """Shapes and routing; `routing`: top_k, first (all tokens on the first expert), repeated, top_p or unused."""

    sizes: list[int]
    tile: int | None = None
    hidden: int = 20  # no multiple of a block
    num_tokens: int = 9
    num_slots: int = 2
    routing: str = "top_k"
    idle: int | None = None  # an expert that no token activates


CASES = {
    "tile8-wider-than-a-block": Case([17 * 8, 8, 40, 24], num_tokens=20),
    "tile16": Case([16, 48, 32], hidden=16),
    "tile24": Case([24, 72, 48], hidden=40, num_tokens=30),
    "tile40": Case([40, 120], hidden=24, num_slots=1),
    "tile1": Case([3, 1, 17, 5, 2], tile=1, hidden=8),
    "tile-smaller-than-gcd": Case([8, 24, 16], tile=4),
    "one-expert": Case([40], num_slots=1),
    "6-experts": Case(expert_sizes("arithmetic", 6, total=96, multiple_of=4), num_tokens=11, num_slots=3),
    "8-slots": Case([8] * 9, num_tokens=5, num_slots=8),
    "empty-first": Case([16, 8, 24], num_slots=1, idle=0),
    "empty-last": Case([16, 8, 24], idle=2),
    "all-tokens-on-one": Case([8, 24, 16], num_tokens=21, num_slots=1, routing="first"),
    "repeated-experts": Case([8, 24], num_slots=3, routing="repeated"),
    "top-p": Case([8, 24, 16, 8], num_slots=4, routing="top_p"),
    "all-slots-unused": Case([8, 24], routing="unused"),
    "one-token": Case([8, 24, 16], num_tokens=1),
    "no-token": Case([8, 24, 16], num_tokens=0),
}


def case_rounding(case: Case) -> float:
    return layer_rounding(case.sizes, case.num_tokens, case.num_slots, case.hidden)


def make_layer(case: Case, act: str = "silu", dtype: torch.dtype = torch.float32) -> tuple[HMoEExperts, Inputs]:
    """An experts module; hidden states [T, H], expert ids [T, K] and weights [T, K]."""
    experts = make_experts(case.sizes, case.tile, act, case.hidden).to(DEVICE, dtype)
    experts.config._experts_implementation = "triton"
    if case.routing == "top_p":
        experts.config.routing = "top_p"
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(case.num_tokens, case.hidden, generator=generator)
    logits = torch.randn(case.num_tokens, len(case.sizes), generator=generator)
    if case.idle is not None:
        logits[:, case.idle] = -torch.inf
    if case.routing == "first":
        logits -= 100 * torch.arange(len(case.sizes))
    weights, index = route_top_k(logits.softmax(-1), min(case.num_slots, len(case.sizes)))
    if case.routing == "top_p":
        weights, index = route_top_p(logits.softmax(-1), 0.6, case.num_slots)
    if case.routing == "repeated":
        weights = torch.rand(case.num_tokens, case.num_slots, generator=generator)
        index = torch.randint(len(case.sizes), weights.shape, generator=generator)
    if case.routing == "unused":
        index = torch.full_like(index, len(case.sizes))
    return experts, (hidden_states.to(DEVICE, dtype), index.to(DEVICE), weights.to(DEVICE))


def run(experts: HMoEExperts, inputs: Inputs, frozen: tuple[str, ...] = ()) -> dict[str, Tensor | None]:
    """Output and the gradients of what is not frozen, on the CPU."""
    leaves = {"hidden_states": inputs[0].detach().clone(), "weights": inputs[2].detach().clone()}
    leaves |= dict(experts.named_parameters())
    for name, leaf in leaves.items():
        leaf.grad = None
        leaf.requires_grad_(name not in frozen)
    output = experts(leaves["hidden_states"], inputs[1], leaves["weights"])
    output.backward(output_gradient(output).to(DEVICE))
    result = {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    return {name: None if value is None else value.cpu() for name, value in result.items()}


def run_with(backend: str, experts: HMoEExperts, inputs: Inputs) -> dict[str, Tensor | None]:
    experts.config._experts_implementation = backend
    return run(experts, inputs)


def reference(experts: HMoEExperts, inputs: Inputs) -> dict[str, Tensor]:
    """fp64, on plain matrices."""
    expected = run_reference(experts.cpu(), tuple(tensor.cpu() for tensor in inputs))
    experts.to(DEVICE)
    return expected


def run_python(code: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**variables, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_equal_eager_and_the_dense_fp64_reference(case: Case):
    experts, inputs = make_layer(case)
    actual = run(experts, inputs)
    assert_close(actual, reference(experts, inputs), case_rounding(case))
    assert_close(actual, run_with("eager", experts, inputs), case_rounding(case))


@pytest.mark.parametrize("case", ["top-p", "tile40"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_stays_near_fp64_and_eager(dtype: torch.dtype, case: str):
    experts, inputs = make_layer(CASES[case], dtype=dtype)
    actual, expected = run(experts, inputs), reference(experts, inputs)
    assert actual["output"].dtype == actual["hidden_states"].dtype == actual["down_proj"].grad_dtype == dtype
    assert actual["weights"].dtype == torch.float32
    assert_close(actual, expected, 2 * torch.finfo(dtype).eps)  # the interpreter cuts bf16 off instead of rounding it
    assert_close(actual, run_with("eager", experts, inputs), 2 * torch.finfo(dtype).eps)


def test_experts_of_a_token_are_added_in_fp32():
    """In fp16, 2048 + 1 + 1 is 2050 only if the sum is not rounded after each slot."""
    case = Case([8, 8, 8], hidden=16, num_tokens=1, num_slots=3)
    experts, (hidden_states, index, _) = make_layer(case, act="relu", dtype=torch.float16)
    with torch.no_grad():
        experts.gate_up_proj.fill_(1 / 16)
        experts.down_proj.fill_(1 / 8)
        output = experts(torch.ones_like(hidden_states), index, torch.tensor([[2048.0, 1.0, 1.0]], device=DEVICE))
    assert output.tolist() == [[2050.0] * 16]


@pytest.mark.parametrize("act", triton_hmoe._ACTIVATIONS)
def test_every_activation_agrees_with_eager(act: str):
    experts, inputs = make_layer(CASES["top-p"], act=act)
    assert triton_hmoe.supports(experts.config)
    assert_close(run(experts, inputs), run_with("eager", experts, inputs), case_rounding(CASES["top-p"]))


def test_other_activations_are_refused_and_reported_as_unsupported():
    experts, inputs = make_layer(CASES["one-token"], act="xielu")
    assert not triton_hmoe.supports(experts.config)
    with pytest.raises(ValueError, match=r"hidden_act='xielu'.*'eager'"):
        experts(*inputs)


@pytest.mark.parametrize("seed", range(6))
def test_any_shapes_agree_with_eager(seed: int):
    """Sizes, tile, hidden size, tokens and slots drawn at random, ids repeated and unused ones among them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    tile, num_experts = draw(1, 12), draw(1, 5)
    case = Case([tile * draw(1, 5) for _ in range(num_experts)], tile, 2 * draw(1, 20), draw(1, 40), draw(1, 4))
    experts, (hidden_states, *_) = make_layer(case)
    weights = torch.rand(case.num_tokens, case.num_slots, generator=generator).to(DEVICE)
    index = torch.randint(num_experts + 2, weights.shape, generator=generator).to(DEVICE)
    inputs = hidden_states, index, weights
    assert_close(run(experts, inputs), run_with("eager", experts, inputs), case_rounding(case))


@pytest.mark.parametrize("size_class", ["small", "medium", "large"])
def test_the_shipped_launch_configurations_give_the_same(size_class: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setitem(HMoEExpertsInterface._global_mapping, "triton", triton_hmoe.triton_forward)
    monkeypatch.setattr(triton_hmoe, "_launch_for", lambda dtype, *_: triton_hmoe.LAUNCHES[dtype.itemsize, size_class])
    case = CASES["tile8-wider-than-a-block"]
    experts, inputs = make_layer(case)
    assert_close(run(experts, inputs), run_with("eager", experts, inputs), case_rounding(case))
    experts, inputs = make_layer(CASES["top-p"], dtype=torch.float16)
    assert_close(run(experts, inputs), run_with("eager", experts, inputs), 2 * torch.finfo(torch.float16).eps)


def test_launch_configurations_follow_the_pairs_per_expert(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    rows = [triton_hmoe._launch_for(torch.bfloat16, 8 * pairs, 8).rows for pairs in (0, 1, 16, 17, 128, 129, 10**6)]
    assert rows == [16, 16, 16, 64, 64, 128, 128]


@pytest.mark.parametrize(
    "frozen",
    [
        ("gate_up_proj", "down_proj"),
        ("gate_up_proj",),
        ("down_proj",),
        ("hidden_states",),
        ("weights",),
        ("hidden_states", "weights"),
        ("hidden_states", "weights", "gate_up_proj"),
    ],
    ids="-".join,
)
def test_only_the_gradients_needed_are_computed(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    experts, inputs = make_layer(Case([8, 24], num_tokens=5))
    expected = run(experts, inputs)
    products = []
    project_and_sum, bank_gradient = triton_hmoe._Layer.project_and_sum, triton_hmoe._Layer.bank_gradient

    def count(function):
        def counted(*args):
            products.append(function.__name__)
            return function(*args)

        return counted

    monkeypatch.setattr(triton_hmoe._Layer, "project_and_sum", count(project_and_sum))
    monkeypatch.setattr(triton_hmoe._Layer, "bank_gradient", count(bank_gradient))
    assert_close(run(experts, inputs, frozen), {**expected, **dict.fromkeys(frozen)}, 0.0)
    assert products.count("bank_gradient") == 2 - len({"gate_up_proj", "down_proj"} & {*frozen})
    assert products.count("project_and_sum") == 2 - ("hidden_states" in frozen)


def test_two_runs_are_bit_identical_and_inference_gives_the_output_of_training():
    experts, inputs = make_layer(CASES["top-p"])
    triton_hmoe._device_offsets.cache_clear()  # the offsets made here must be usable in training
    with torch.inference_mode():
        output = experts(*inputs).cpu()
    first, second = run(experts, inputs), run(experts, inputs)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert torch.equal(output, first["output"])


@pytest.mark.parametrize("idle", [0, 2])
def test_weights_of_an_idle_expert_are_never_read(idle: int):
    experts, inputs = make_layer(Case([16, 8, 8], num_slots=1, idle=idle))
    expected = run(experts, inputs)
    tiles = slice(experts.tile_offsets[idle], experts.tile_offsets[idle + 1])
    with torch.no_grad():
        experts.gate_up_proj[tiles] = torch.nan
        experts.down_proj[tiles] = torch.nan
    assert_close(run(experts, inputs), expected, 0.0)
    assert not expected["gate_up_proj"][tiles].any()
    assert not expected["down_proj"][tiles].any()


def test_weights_of_unused_slots_are_never_read():
    experts, (hidden_states, index, weights) = make_layer(CASES["top-p"])
    expected = run(experts, (hidden_states, index, weights))
    assert (index == 4).any()
    garbage = weights.masked_fill(index == 4, torch.nan)
    assert_close(run(experts, (hidden_states, index, garbage)), expected, 0.0)


def test_non_contiguous_inputs_give_the_same():
    experts, (hidden_states, index, weights) = make_layer(CASES["top-p"])
    strided = hidden_states.t().contiguous().t(), index.repeat_interleave(2, 1)[:, ::2], weights.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_close(run(experts, strided), run(experts, (hidden_states, index, weights)), 0.0)


def test_autocast_computes_in_half_precision_and_returns_the_dtype_given():
    experts, inputs = make_layer(CASES["tile40"])
    full = run(experts, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = run(experts, inputs)
    assert {name: value.dtype for name, value in actual.items()} == dict.fromkeys(actual, torch.float32)
    assert_close(actual, full, 2 * torch.finfo(torch.bfloat16).eps)
    assert not torch.equal(actual["output"], full["output"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same(reentrant: bool, monkeypatch: pytest.MonkeyPatch):
    experts, inputs = make_layer(CASES["top-p"])
    expected = run(experts, inputs)
    forward = triton_hmoe.triton_forward
    monkeypatch.setitem(
        HMoEExpertsInterface._global_mapping,
        "triton",
        lambda *args: checkpoint(forward, *args, use_reentrant=reentrant),
    )
    assert_close(run(experts, inputs), expected, 0.0)


def test_fullgraph_compile_gives_the_same():
    experts, inputs = make_layer(CASES["top-p"])
    expected = run(experts, inputs)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True, dynamic=True)
    actual = run(compiled, inputs)
    actual = {name.removeprefix("_orig_mod."): value for name, value in actual.items()}
    assert_close(actual, expected, case_rounding(CASES["top-p"]))


@pytest.mark.parametrize("kept", ["exact", "bounded", "nothing"])
def test_opcheck_of_the_ops(kept: str):
    """Schema, fake kernels and autograd registration, as torch.compile and torch.export rely on them."""
    case = Case([8, 8], tile=4, num_tokens=3)  # fills the bound: what lies behind is not written, so not compared
    experts, (hidden_states, index, weights) = make_layer(case)
    banks = experts.gate_up_proj, experts.down_proj
    tensors = [tensor.detach().requires_grad_(kept != "nothing") for tensor in (hidden_states, weights, *banks)]
    hidden_states, weights, *banks = tensors
    num_neurons = -1 if kept == "exact" else 8 * index.numel()
    settings = experts.tile_offsets, "silu"
    forward = hidden_states, index, weights, *banks, *settings, num_neurons, kept != "nothing"
    results = [torch.library.opcheck(triton_hmoe._triton_experts, forward)]
    if kept == "bounded":
        inputs = [hidden_states.detach(), index, *(tensor.detach() for tensor in (weights, *banks))]
        output, *saved = triton_hmoe._triton_experts(*forward)
        for needed in ([True] * 4, [False, True, False, False]):
            backward = torch.ones_like(output), *inputs, *saved, *settings, needed
            results.append(torch.library.opcheck(triton_hmoe._triton_experts_backward, backward))
    assert {outcome for result in results for outcome in result.values()} == {"SUCCESS"}, results


def test_top_p_keeps_for_backward_what_its_used_slots_need():
    experts, (hidden_states, index, weights) = make_layer(CASES["top-p"])
    sizes = torch.tensor([*CASES["top-p"].sizes, 0])
    output = experts(hidden_states.requires_grad_(), index, weights)
    (projected,) = (t for t in output.grad_fn.saved_tensors if t.dim() == 1 and t.is_floating_point())
    assert len(projected) == 2 * sizes[index.cpu()].sum() < 2 * index.numel() * sizes.max()


def test_fp64_and_cpu_tensors_outside_the_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch):
    experts, (hidden_states, index, weights) = make_layer(CASES["one-token"])
    with pytest.raises(RuntimeError, match=r"got torch\.float64.*'grouped_mm'"):
        experts.double()(hidden_states.double(), index, weights)
    monkeypatch.setattr(triton_hmoe, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        experts.float().cpu()(hidden_states.cpu(), index.cpu(), weights.cpu())


def test_the_module_imports_without_triton_and_says_what_to_install():
    code = """
import sys
sys.modules["triton"] = None
import torch
from types import SimpleNamespace
from hmoe.triton_hmoe import triton_forward
bank = torch.empty(1, 2, 2)
experts = SimpleNamespace(gate_up_proj=bank, down_proj=bank, config=SimpleNamespace(hidden_act="silu"))
try:
    triton_forward(experts, bank[0], bank[0].long(), bank[0])
except RuntimeError as error:
    print(error)
"""
    assert "pip install triton" in run_python(code)
    for file in (SOURCE, SOURCE.with_name("triton_kernels_hmoe.py")):  # else a checkpoint would not load without it
        assert "triton" not in get_imports(file)


def test_a_gpu_that_it_was_tuned_on_gets_it_by_default(tiny_config, monkeypatch: pytest.MonkeyPatch):
    def backend() -> str:
        return HMoEForCausalLM(tiny_config()).config._experts_implementation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backend() == "grouped_mm", "nothing was tuned yet"
    monkeypatch.setattr(triton_hmoe, "TUNED_DEVICES", frozenset({(9, 0)}))
    assert backend() == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert backend() == "grouped_mm"


def test_a_checkpoints_copy_of_the_file_defines_ops_of_its_own():
    experts, inputs = make_layer(CASES["tile16"])
    expected = experts(*inputs)
    spec = importlib.util.spec_from_file_location("hmoe.copied_triton_hmoe", SOURCE)
    copied = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copied  # custom ops look their module up
    try:
        spec.loader.exec_module(copied)
        torch.testing.assert_close(copied.triton_forward(experts, *inputs), expected)
    finally:
        del sys.modules[spec.name]


def test_every_kernel_compiles_for_an_h100():
    """Needs no GPU. The interpreter sees neither types nor shared memory, of which a program may use 227 KiB."""
    code = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from hmoe import triton_hmoe as th

integers = "order_ptr", "pair_offsets_ptr", "tile_offsets_ptr", "index_ptr"
kernels = th.up_kernel, th.project_kernel, th.sum_slots_kernel, th.grad_neurons_kernel, th.bank_gradient_kernel
shapes = dict(COLUMN_BLOCKS=35, SLOTS=2, HIDDEN=768, TILE=96, NUM_EXPERTS=6, EXPERTS=8)
flags = dict.fromkeys(["SAVE", "WEIGHTED", "GRAD_PROJECTED", "WEIGHTED_NEURONS", "GRAD_WEIGHTS"], True)
activations = iter(["silu", "gelu", "gelu_pytorch_tanh", "relu"])
for itemsize, size_class in [(2, "small"), (2, "medium"), (2, "large"), (4, "large")]:
    launch = th.LAUNCHES[itemsize, size_class]
    blocks = dict(ROWS=launch.rows, NEURONS=launch.neurons, COLUMNS=launch.columns, INNER=launch.inner)
    floats = "*bf16" if itemsize == 2 else "*fp32"
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    others = {"ACTIVATION": next(activations), "PRECISION": "ieee", "UPCAST": False}
    all_constants = {**shapes, **flags, **blocks, **others}
    for kernel in kernels:
        names = kernel.arg_names
        types = {n: "*i64" if n in integers else "*fp32" if n.startswith("weight") else floats for n in names}
        types |= {n: "constexpr" for n in names if not n.endswith("_ptr")}
        types |= {n: floats for n in names if n == "weighted_neurons_ptr"}
        constants = {n: all_constants[n] for n in names if types[n] == "constexpr"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
        source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= 227 * 1024, (kernel, itemsize, size_class, compiled.metadata.shared)
        print(kernel, itemsize, size_class)
"""
    assert len(run_python(code).splitlines()) == 20
