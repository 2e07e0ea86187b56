"""The models: equal to Mixtral and Qwen3-MoE where they must be, whole under what Transformers does to models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.rounding import assert_close_to_largest, logits_rounding, rounding
from safetensors import safe_open
from torch import Tensor
from torch.export import Dim
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CompileConfig,
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StaticCache,
    set_seed,
)

from hmoe import HMoEConfig, HMoEForCausalLM
from hmoe.experts_hmoe import EXPERTS_IMPLEMENTATIONS


ALL_LOSSES = {
    "load_balancing_loss_coef": 0.3,
    "parameter_penalty_loss_coef": 0.4,
    "router_entropy_loss_coef": 0.05,
    "router_z_loss_coef": 0.2,
}
DIMENSIONS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide enough for logits and routes that differ
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROUTINGS = {
    "top_k": {"routing": "top_k"},
    "top_p": {"routing": "top_p", "router_top_p": 0.6},
}
PER_LAYER = {"expert_intermediate_sizes": [[8, 16, 24, 32], [16, 8, 40]]}  # the number of experts differs as well

parametrize_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
parametrize_backend = pytest.mark.parametrize("backend", EXPERTS_IMPLEMENTATIONS)


def tiny_model(**overrides) -> HMoEForCausalLM:
    set_seed(0)
    config = {"expert_intermediate_sizes": [8, 16, 24, 32], **DIMENSIONS, **overrides}
    return HMoEForCausalLM(HMoEConfig(**config)).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random ids without the pad token."""
    return torch.randint(1, DIMENSIONS["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def left_padded(input_ids: Tensor) -> dict[str, Tensor]:
    """Model inputs whose rows begin with 0, 1, 2 ... pads."""
    positions = torch.arange(input_ids.shape[1]) - torch.arange(input_ids.shape[0])[:, None]
    mask = (positions >= 0).long()
    return {"input_ids": input_ids * mask, "attention_mask": mask, "position_ids": positions.clamp(min=0)}


def logits_of(model: PreTrainedModel, **inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def train_step(model: PreTrainedModel, forward: Callable | None = None, **inputs) -> dict[str, Tensor]:
    """Loss and the gradient of every parameter of one training step."""
    model.train()
    model.zero_grad()
    loss = (model if forward is None else forward)(**inputs)["loss"]
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def assert_same_step(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm()
        assert error <= tolerance * max(value.norm().item(), 1e-2), f"{name}: {error} of {value.norm()}"


def twin_of(stock: MixtralForCausalLM | Qwen3MoeForCausalLM, **overrides) -> HMoEForCausalLM:
    """The homogeneous HMoE with the weights of `stock`; only the layout of `down_proj` differs."""
    size, count = stock.model.layers[0].mlp.experts.down_proj.shape[2], stock.config.num_experts
    model = tiny_model(
        **{name: getattr(stock.config, name) for name in (*DIMENSIONS, "head_dim", "rms_norm_eps", "rope_parameters")},
        sliding_window=stock.config.sliding_window,
        tie_word_embeddings=stock.config.tie_word_embeddings,
        expert_intermediate_sizes=[size] * count,
        **{"parameter_penalty_loss_coef": 0.0, **overrides},
    )
    weights = stock.state_dict()
    model.load_state_dict(
        {name: w.transpose(1, 2) if name.endswith("down_proj") else w for name, w in weights.items()}
    )
    for one in (stock, model):
        one.eval()
        one.set_experts_implementation("eager")
    return model


def mixtral(**overrides) -> MixtralForCausalLM:
    set_seed(0)
    config = {"num_local_experts": 4, "intermediate_size": 16, **DIMENSIONS, **overrides}
    return MixtralForCausalLM(MixtralConfig(**config))


def rope(rope_type: str, **parameters: float) -> dict:
    values = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0, **parameters}
    return {"rope_parameters": values, "head_dim": 8}  # Mixtral's dynamic and yarn cannot work without head_dim


MIXTRAL_VARIANTS = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "all-heads": {"num_key_value_heads": 4},
    "head-dim": {"head_dim": 16},
    "sliding-window": {"sliding_window": 3},
    "tied": {"tie_word_embeddings": True},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope-linear": rope("linear"),
    "rope-dynamic": {**rope("dynamic"), "max_position_embeddings": 6},
    "rope-yarn": rope("yarn", original_max_position_embeddings=8),
    "rope-llama3": rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8),
}


def assert_same_logits(model: HMoEForCausalLM, stock: PreTrainedModel, dtype: torch.dtype, **inputs) -> None:
    """With every backend: of all sums only the down products, over neurons in another layout, may be others."""
    tolerance = rounding(dtype, *(stock.model.layers[0].mlp.experts.down_proj.shape[2] for _ in stock.model.layers))
    expected = logits_of(stock, **inputs)
    for backend in EXPERTS_IMPLEMENTATIONS:
        if backend not in ("triton", *(["tiled_grouped_mm"] if dtype == torch.float64 else [])):
            model.set_experts_implementation(backend)
            assert_close_to_largest(logits_of(model, **inputs), expected, tolerance)
    model.set_experts_implementation("eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", MIXTRAL_VARIANTS.values(), ids=MIXTRAL_VARIANTS.keys())
def test_equal_sizes_give_the_logits_of_mixtral(variant: dict, dtype: torch.dtype):
    """To rounding: a few units in the last place of the largest logit in fp32, 1e-14 of it in fp64."""
    stock = mixtral(**variant)
    model, inputs = twin_of(stock).to(dtype), left_padded(tokens(2, 10))
    if dtype == torch.float64:
        share_routers(model, stock.double())
    assert_same_logits(model, stock, dtype, **inputs)


def share_routers(model: HMoEForCausalLM, stock: PreTrainedModel) -> None:
    """A router of HMoE computes in fp32 in any model, a stock one in the model's dtype."""
    for ours, theirs in zip(model.model.layers, stock.model.layers):
        theirs.mlp.gate = ours.mlp.gate


@pytest.mark.parametrize("variant", ["gqa", "sliding-window", "tied", "rope-yarn"])
def test_equal_sizes_give_the_loss_and_gradients_of_mixtral(variant: str):
    stock = mixtral(**MIXTRAL_VARIANTS[variant])
    model, input_ids = twin_of(stock), tokens(2, 10)
    expected = train_step(stock, input_ids=input_ids, labels=input_ids)
    expected = {name: v.transpose(1, 2) if name.endswith("down_proj") else v for name, v in expected.items()}
    assert_same_step(train_step(model, input_ids=input_ids, labels=input_ids), expected)


def test_one_layer_balances_its_load_as_mixtral_does():
    """With more layers Mixtral pools counts and probabilities of all layers; here each layer is balanced by itself."""
    stock = mixtral(num_hidden_layers=1, output_router_logits=True, router_aux_loss_coef=0.3)
    model = twin_of(stock, load_balancing_loss_coef=0.3)
    inputs = left_padded(tokens(3, 10))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = train_step(stock, **inputs, labels=labels)
    expected = {name: v.transpose(1, 2) if name.endswith("down_proj") else v for name, v in expected.items()}
    assert_same_step(train_step(model, **inputs, labels=labels), expected)
    without = train_step(twin_of(stock), **inputs, labels=labels)
    assert not torch.allclose(without["model.layers.0.mlp.gate.weight"], expected["model.layers.0.mlp.gate.weight"])


@pytest.mark.parametrize("attention_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["raw-weights", "normalised-weights"])
def test_equal_sizes_with_qk_norm_give_qwen3_moe(norm_topk_prob: bool, attention_bias: bool):
    set_seed(0)
    own = {"norm_topk_prob": norm_topk_prob, "attention_bias": attention_bias, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**DIMENSIONS, **own, num_experts=4, moe_intermediate_size=16, head_dim=16)
    stock = Qwen3MoeForCausalLM(config)
    for name, parameter in stock.named_parameters():
        if name.endswith(("_norm.weight", "bias")):
            torch.nn.init.normal_(parameter, mean=1.0)
    model, input_ids = twin_of(stock, qk_norm=True, **own), tokens(2, 10)
    assert_same_logits(model, stock, torch.float32, input_ids=input_ids)
    expected = train_step(stock, input_ids=input_ids, labels=input_ids)
    expected = {name: v.transpose(1, 2) if name.endswith("down_proj") else v for name, v in expected.items()}
    assert_same_step(train_step(model, input_ids=input_ids, labels=input_ids), expected)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("variant", [{}, {"sliding_window": 3}, {"qk_norm": True}], ids=["full", "sliding", "qk-norm"])
def test_attention_implementations_agree(attention: str, variant: dict):
    model, inputs = tiny_model(**variant, attn_implementation="eager"), left_padded(tokens(3, 8))
    expected = logits_of(model, **inputs)
    model.set_attn_implementation(attention)
    with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes half a minute
        actual = logits_of(model, **inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


def test_flash_attention_that_is_not_installed_is_refused():
    with pytest.raises(ImportError, match=r"FlashAttention2 .*installed"):
        tiny_model(attn_implementation="flash_attention_2")


@parametrize_backend
@parametrize_routing
@pytest.mark.parametrize("cache", ["dynamic", "static", "dynamic-sliding"])
def test_cached_steps_equal_the_full_forward_with_left_padding(backend: str, routing: dict, cache: str):
    model = tiny_model(**routing, sliding_window=4 if cache == "dynamic-sliding" else None)
    model.set_experts_implementation(backend)
    inputs = left_padded(tokens(3, 9))
    expected = logits_of(model, **inputs)
    past = StaticCache(model.config, max_cache_len=16) if cache == "static" else DynamicCache(config=model.config)
    for start, end in [(0, 5), (5, 6), (6, 7), (7, 9)]:  # the prompt, single tokens, a chunk
        step = logits_of(
            model,
            input_ids=inputs["input_ids"][:, start:end],
            attention_mask=inputs["attention_mask"][:, :end],
            position_ids=inputs["position_ids"][:, start:end],
            past_key_values=past,
            use_cache=True,
        )
        real = inputs["attention_mask"][:, start:end].bool()
        torch.testing.assert_close(step[real], expected[:, start:end][real], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=ROUTINGS.values(), ids=ROUTINGS.keys())
def generator_model(request) -> HMoEForCausalLM:
    return tiny_model(**request.param)


NEW = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def greedy(generator_model: HMoEForCausalLM) -> Tensor:
    """Greedy continuation of one prompt by full forwards, without generate and without a cache."""
    ids = tokens(1, 5)
    for _ in range(NEW["max_new_tokens"]):
        logits = logits_of(generator_model, input_ids=ids)[:, -1]
        best, second = logits.topk(2).values.unbind(-1)
        assert best - second > logits_rounding(generator_model.config, 11) * logits.abs().max(), "rounding may choose"
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["dynamic-cache", "no-cache", "static-cache", "prompt-lookup"],
)
def test_generate_is_greedy_argmax(generator_model: HMoEForCausalLM, greedy: Tensor, options: dict):
    generated = generator_model.generate(greedy[:, :5], do_sample=False, **NEW, **options)
    assert torch.equal(generated, greedy)


def test_assisted_generation_by_a_smaller_hmoe_is_greedy(generator_model: HMoEForCausalLM, greedy: Tensor):
    assistant = tiny_model(num_hidden_layers=1, expert_intermediate_sizes=[8, 4])
    generated = generator_model.generate(greedy[:, :5], assistant_model=assistant, do_sample=False, **NEW)
    assert torch.equal(generated, greedy)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}],
    ids=["sampling", "beam", "beam-sampling"],
)
def test_generate_with_a_cache_gives_what_it_gives_without(generator_model: HMoEForCausalLM, options: dict):
    inputs = left_padded(tokens(3, 5))
    del inputs["position_ids"]
    sequences = []
    for use_cache in (True, False):
        set_seed(1)
        sequences.append(generator_model.generate(**inputs, **NEW, **options, use_cache=use_cache))
    assert sequences[0].shape == (3, 11)
    assert torch.equal(*sequences)


@parametrize_backend
def test_left_padding_does_not_change_what_is_generated(
    backend: str, generator_model: HMoEForCausalLM, greedy: Tensor
):
    generator_model.set_experts_implementation(backend)
    padded = torch.nn.functional.pad(greedy[:, :5], (3, 0))
    generated = generator_model.generate(padded, attention_mask=(padded > 0).long(), do_sample=False, **NEW)
    generator_model.set_experts_implementation("grouped_mm")
    assert torch.equal(generated[:, 3:], greedy)


def test_compiled_generation_is_one_graph_and_greedy(generator_model: HMoEForCausalLM, greedy: Tensor):
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generated = generator_model.generate(
        greedy[:, :5], cache_implementation="static", compile_config=compile_config, do_sample=False, **NEW
    )
    assert torch.equal(generated, greedy)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_tied_embeddings_are_saved_once_and_loaded_tied(tmp_path: Path):
    model, input_ids = tiny_model(tie_word_embeddings=True), tokens(2, 6)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = HMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded, input_ids=input_ids), logits_of(model, input_ids=input_ids))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resized_embeddings_keep_the_old_tokens(tied: bool):
    model, input_ids = tiny_model(tie_word_embeddings=tied), tokens(2, 6)
    before = logits_of(model, input_ids=input_ids)
    model.resize_token_embeddings(70)
    after = model(input_ids=input_ids, labels=input_ids)
    assert model.config.vocab_size == after.logits.shape[-1] == 70
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(after.logits[..., :64], before)
    assert after.loss.isfinite()


def test_inputs_embeds_equal_input_ids():
    model, input_ids = tiny_model(), tokens(2, 6)
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(logits_of(model, inputs_embeds=embeds), logits_of(model, input_ids=input_ids))


@pytest.mark.parametrize("given", [{}, {"input_ids": tokens(1, 2), "inputs_embeds": torch.ones(1, 2, 32)}])
def test_not_exactly_one_kind_of_input_is_refused(given: dict):
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        tiny_model()(**given)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])], ids=["last", "last-three", "chosen"])
def test_logits_to_keep_selects_positions(kept: int | Tensor):
    model, input_ids = tiny_model(), tokens(2, 6)
    positions = kept if torch.is_tensor(kept) else torch.arange(6 - kept, 6)
    full = logits_of(model, input_ids=input_ids)
    torch.testing.assert_close(logits_of(model, input_ids=input_ids, logits_to_keep=kept), full[:, positions])


def test_hidden_states_are_of_every_layer():
    model, input_ids = tiny_model(), tokens(2, 6)
    hidden_states = model(input_ids=input_ids, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in hidden_states] == [(2, 6, 32)] * 3
    assert torch.equal(hidden_states[0], model.model.embed_tokens(input_ids))
    assert torch.equal(hidden_states[-1], model.model(input_ids=input_ids).last_hidden_state)


def test_attentions_are_of_every_layer_and_sum_to_one():
    model = tiny_model(attn_implementation="eager")
    attentions = model(input_ids=tokens(2, 6), output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(2, 4, 6, 6)] * 2
    torch.testing.assert_close(attentions[1].sum(-1), torch.ones(2, 4, 6))


@parametrize_routing
def test_router_outputs_are_of_every_layer_with_its_own_number_of_experts(routing: dict):
    model, input_ids = tiny_model(**PER_LAYER, **routing), tokens(2, 6)
    outputs = model(input_ids=input_ids, output_router_logits=True)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(12, 4), (12, 3)]
    slots = [2, 2] if routing["routing"] == "top_k" else [4, 3]
    assert [index.shape[1] for index in outputs.router_index] == slots
    for logits, index in zip(outputs.router_logits, outputs.router_index):
        ranked = logits.argsort(-1, descending=True)[:, : index.shape[1]]
        assert torch.equal(torch.where(index == logits.shape[1], index, ranked), index)
        assert (index[:, 0] < logits.shape[1]).all(), "every token has an expert"
    assert model(input_ids=input_ids).router_logits is None
    model.config.output_router_logits = True
    assert len(model(input_ids=input_ids).router_logits) == 2
    assert len(model.model(input_ids=input_ids).router_logits) == 2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_return_dict_false_gives_the_same_values_and_no_none(training: bool):
    model, input_ids = tiny_model(**ALL_LOSSES).train(training), tokens(2, 6)
    options = {"input_ids": input_ids, "labels": input_ids, "output_router_logits": True, "use_cache": False}
    values, named = model(**options, return_dict=False), model(**options)
    assert isinstance(values, tuple)
    assert len(values) == len(named)
    for value, expected in zip(values, named.values()):
        torch.testing.assert_close(value, expected)


HEADS = {
    "sequence": (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2])}),
    "token": (AutoModelForTokenClassification, {"labels": tokens(2, 6) % 3}),
    "question": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
}


@pytest.mark.parametrize(("auto_class", "labels"), HEADS.values(), ids=HEADS.keys())
def test_task_heads_train_save_and_load(auto_class: type, labels: dict, tmp_path: Path):
    model = auto_class.from_config(HMoEConfig(**{**tiny_model().config.to_dict(), "num_labels": 3}))
    step = train_step(model, input_ids=tokens(2, 6), **labels)
    assert [name for name, gradient in step.items() if gradient is None or not gradient.isfinite().all()] == []
    model.eval().save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    with torch.no_grad():
        options = {"input_ids": tokens(2, 6), "use_cache": False, **labels}
        expected, actual = (one(**options).to_tuple() for one in (model, loaded))
    assert all(map(torch.equal, actual, expected))


def test_a_task_head_starts_from_a_language_model(tmp_path: Path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier.score.weight.shape == (3, 32)
    body = classifier.model.state_dict()
    assert [name for name, weight in model.model.state_dict().items() if not torch.equal(weight, body[name])] == []


@parametrize_routing
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_keeps_loss_and_gradients_router_losses_included(reentrant: bool, routing: dict):
    model, input_ids = tiny_model(**routing, **PER_LAYER, **ALL_LOSSES), tokens(2, 8)
    expected = train_step(model, input_ids=input_ids, labels=input_ids)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    actual = train_step(model, input_ids=input_ids, labels=input_ids)
    assert_same_step(actual, expected, 1e-6)
    model.config.router_aux_loss_coef = 0.0
    without = train_step(model, input_ids=input_ids, labels=input_ids)
    assert not torch.allclose(without["model.layers.0.mlp.gate.weight"], actual["model.layers.0.mlp.gate.weight"])


@parametrize_routing
@pytest.mark.parametrize("backend", [name for name in EXPERTS_IMPLEMENTATIONS if name != "eager"])
def test_fullgraph_compile_gives_the_logits_and_the_training_step_of_eager(backend: str, routing: dict):
    model, input_ids = tiny_model(num_hidden_layers=1, **routing, **ALL_LOSSES), tokens(2, 8)
    model.set_experts_implementation(backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input_ids=input_ids, use_cache=False).logits, model(input_ids=input_ids).logits
        )
    inputs = {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    expected = train_step(model, **inputs)
    assert_same_step(train_step(model, forward=compiled, **inputs), expected)


@pytest.mark.slow
def test_compiled_training_takes_other_lengths_and_batches():
    model = tiny_model(num_hidden_layers=1, **ROUTINGS["top_p"], **ALL_LOSSES)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(2, 8), (3, 5)]:
        inputs = {"input_ids": tokens(*shape), "labels": tokens(*shape), "use_cache": False}
        expected = train_step(model, **inputs)
        assert_same_step(train_step(model, forward=compiled, **inputs), expected)


@pytest.mark.slow
def test_inductor_gives_the_training_step_of_eager():
    model, input_ids = tiny_model(num_hidden_layers=1, **ALL_LOSSES), tokens(2, 8)
    inputs = {"input_ids": input_ids, "labels": input_ids, "use_cache": False}
    expected = train_step(model, **inputs)
    torch._dynamo.reset()
    assert_same_step(train_step(model, forward=torch.compile(model, fullgraph=True), **inputs), expected)


@parametrize_routing
@parametrize_backend
def test_exported_program_gives_the_logits_of_any_batch_and_length(backend: str, routing: dict):
    model = tiny_model(**PER_LAYER, **routing)
    model.set_experts_implementation(backend)
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        options = {"input_ids": tokens(2, 6), "use_cache": False}
        program = torch.export.export(model, (), options, dynamic_shapes=shapes, strict=False)
    tolerance = logits_rounding(model.config, 6)
    for input_ids in (tokens(2, 6, seed=1), tokens(3, 5)):
        exported = program.module()(input_ids=input_ids, use_cache=False).logits
        assert_close_to_largest(exported, logits_of(model, input_ids=input_ids), tolerance)


@pytest.mark.parametrize(
    "routing",
    [ROUTINGS["top_k"], {"router_type": "modse"}, ROUTINGS["top_p"]],
    ids=["top_k-linear", "top_k-modse", "top_p-linear"],
)
@pytest.mark.parametrize("hidden_act", ["silu", "prelu"])
def test_every_parameter_gets_a_gradient(routing: dict, hidden_act: str):
    model = tiny_model(**routing, **ALL_LOSSES, qk_norm=True, attention_bias=True, hidden_act=hidden_act)
    step = train_step(model, input_ids=tokens(4, 16), labels=tokens(4, 16))
    assert [name for name, gradient in step.items() if gradient is None or not gradient.any()] == []
    assert [name for name, gradient in step.items() if not gradient.isfinite().all()] == []


@parametrize_backend
@parametrize_routing
def test_sizes_that_differ_by_layer_train_generate_save_and_load(backend: str, routing: dict, tmp_path: Path):
    model, input_ids = tiny_model(**PER_LAYER, **routing, **ALL_LOSSES), tokens(2, 8)
    expected = train_step(model, input_ids=input_ids, labels=input_ids)
    model.save_pretrained(tmp_path)
    loaded = HMoEForCausalLM.from_pretrained(tmp_path, experts_implementation=backend)
    assert_same_step(train_step(loaded, input_ids=input_ids, labels=input_ids), expected)
    for layer, sizes in zip(loaded.model.layers, model.config.layer_expert_sizes, strict=True):
        tile_offsets, tile = layer.mlp.experts.tile_offsets, layer.mlp.experts.down_proj.shape[1]
        assert [tile * (end - start) for start, end in zip(tile_offsets, tile_offsets[1:])] == sizes
    sequences = [one.eval().generate(input_ids, do_sample=False, **NEW) for one in (model, loaded)]
    assert torch.equal(*sequences)


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("router_type", ["linear", "modse"])
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_fresh_weights_follow_initializer_range(router_type: str, device: str):
    config = tiny_model(router_type=router_type, qk_norm=True, initializer_range=0.05, hidden_size=64).config
    expected = HMoEForCausalLM(config)
    with torch.device(device):
        model = HMoEForCausalLM(config)
    if device == "meta":
        model = model.to_empty(device="cpu")
        model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.15), name
            assert abs(parameter.mean().item()) < 0.02, name
    assert [name for name, b in model.named_buffers() if not torch.equal(b, expected.get_buffer(name))] == []


@parametrize_backend
def test_experts_implementation_is_chosen_by_name(backend: str, tmp_path: Path):
    model, input_ids = tiny_model(), tokens(2, 6)
    model.set_experts_implementation("eager")
    expected = logits_of(model, input_ids=input_ids)
    model.save_pretrained(tmp_path)
    loaded = HMoEForCausalLM.from_pretrained(tmp_path, experts_implementation=backend)
    model.set_experts_implementation(backend)
    for one in (model, loaded):
        assert {layer.mlp.experts.config._experts_implementation for layer in one.model.layers} == {backend}
        torch.testing.assert_close(logits_of(one, input_ids=input_ids), expected, rtol=1e-4, atol=1e-5)
    assert HMoEForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("name", ["sonicmoe", "deepgemm", "nonsense"])
def test_an_unknown_experts_implementation_is_refused_with_the_list(name: str, tmp_path: Path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    message = f"{name}.*eager.*grouped_mm.*batched_mm.*triton"
    with pytest.raises(ValueError, match=message):
        model.set_experts_implementation(name)
    with pytest.raises(ValueError, match=message):
        HMoEForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
    assert model.config._experts_implementation == "grouped_mm"


def test_the_backend_that_was_removed_is_refused_with_its_successor(tmp_path: Path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'tiled_grouped_mm' was removed.*use 'grouped_mm'"):
        model.set_experts_implementation("tiled_grouped_mm")
    with pytest.raises(ValueError, match=r"'tiled_grouped_mm' was removed.*use 'grouped_mm'"):
        HMoEForCausalLM.from_pretrained(tmp_path, experts_implementation="tiled_grouped_mm")


@parametrize_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_checkpoints_train_with_an_fp32_router(backend: str, dtype: torch.dtype, tmp_path: Path):
    tiny_model(**ALL_LOSSES).to(dtype).save_pretrained(tmp_path)
    model = HMoEForCausalLM.from_pretrained(tmp_path, experts_implementation=backend)
    step = train_step(model, input_ids=tokens(2, 8), labels=tokens(2, 8))
    assert {gradient.dtype for name, gradient in step.items() if name != "loss"} == {dtype}
    assert all(gradient.isfinite().all() for gradient in step.values())
    outputs = model(input_ids=tokens(2, 8), output_router_logits=True)
    assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}
