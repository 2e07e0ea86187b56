"""LoRA on attention, expert banks and routers: gradients, merging, adapters on disk, `Trainer`, and refusals."""

from collections.abc import Callable
from functools import partial

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from hmoe import HMoEConfig, HMoEForCausalLM, lora_config
from hmoe.experts_hmoe import EXPERTS_IMPLEMENTATIONS
from hmoe.lora import ATTENTION_MODULES


INPUT_IDS = torch.arange(24).view(2, 12) % 21
UNEVEN = [[8, 16, 24, 32], [40, 8, 16]]
PARTS = {
    "attention": {"attention": True, "experts": False},
    "experts": {"attention": False},
    "router": {"attention": False, "experts": False, "router": True},
    "all": {"router": True},
}
parts = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)


@pytest.fixture
def make_config(tiny_config: Callable[..., HMoEConfig]) -> Callable[..., HMoEConfig]:
    return partial(tiny_config, expert_intermediate_sizes=UNEVEN, load_balancing_loss_coef=0.1, router_z_loss_coef=0.1)


@pytest.fixture(params=["linear", "modse"])
def config(make_config, request) -> HMoEConfig:
    return make_config(router_type=request.param)


def adapted(config: HMoEConfig, **lora_kwargs) -> peft.PeftModel:
    return peft.get_peft_model(HMoEForCausalLM(config), lora_config(4, **lora_kwargs)).train()


def adapters(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def randomize_adapters(model: peft.PeftModel) -> peft.PeftModel:
    """Adapters as after training: B starts at zero, and a zero product would hide every mistake."""
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.normal_(std=0.3)
    return model.eval()


def backward(model: peft.PeftModel) -> None:
    model.zero_grad()
    model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=INPUT_IDS).logits


@parts
def test_every_adapter_learns_and_nothing_else(config, parts):
    model = adapted(config, **parts)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(adapters(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    # The gradient of A passes through B, which starts at zero: it shows from the second step on.
    for trained in ("lora_B", "lora_"):
        backward(model)
        for name, parameter in adapters(model).items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert trained not in name or parameter.grad.any(), name
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


def test_every_layer_has_an_adapter_on_every_part(config):
    names = set(adapters(adapted(config, router=True)))
    for layer in range(config.num_hidden_layers):
        in_layer = [name for name in names if f"layers.{layer}." in name]
        for module in ATTENTION_MODULES:
            assert sum(f".self_attn.{module}." in name for name in in_layer) == 2  # A and B
        assert sum(".mlp.experts." in name for name in in_layer) == 4  # of two banks
        assert sum(".mlp.gate." in name for name in in_layer) == (4 if config.router_type == "modse" else 2)


def test_an_expert_has_one_pair_of_rank_r_per_tile(config):
    model = adapted(config, attention=False)
    for layer, sizes in enumerate(UNEVEN):
        num_tiles = sum(sizes) // config.expert_tile_size
        for name, parameter in adapters(model).items():
            if f"layers.{layer}." in name:
                assert 4 * num_tiles in parameter.shape, name


@pytest.mark.filterwarnings("error::UserWarning")
def test_adapting_every_part_of_either_router_type_warns_of_nothing(config):
    assert any("lora_" in name for name, _ in adapted(config, router=True).named_parameters())


@parts
def test_merging_keeps_the_logits_and_gives_the_plain_class(config, parts):
    # In fp64: adapters this large amplify the rounding of fp32, to 1e-5 of the largest logit.
    model = randomize_adapters(adapted(config, **parts)).double()
    expected = logits(model)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert type(merged) is HMoEForCausalLM
    assert merged.state_dict().keys() == HMoEForCausalLM(config).state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


@parts
def test_unloading_restores_the_base_bit_for_bit(config, parts):
    base = HMoEForCausalLM(config)
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, lora_config(4, **parts))
    backward(randomize_adapters(model).train())
    restored = model.unload()
    assert type(restored) is HMoEForCausalLM
    assert restored.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in restored.state_dict().items())


@parts
def test_a_saved_adapter_gives_the_same_logits_on_the_base(config, parts, tmp_path):
    base = HMoEForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    model = randomize_adapters(peft.get_peft_model(base, lora_config(4, **parts)))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(HMoEForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_a_merged_model_is_a_checkpoint_like_any_other(config, tmp_path):
    merged = randomize_adapters(adapted(config, router=True)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(HMoEForCausalLM.from_pretrained(tmp_path)), logits(merged))


@pytest.mark.parametrize("routing", ["top_k", "top_p"])
@pytest.mark.parametrize("backend", [name for name in EXPERTS_IMPLEMENTATIONS if name != "eager"])
def test_backends_agree_on_adapted_experts_and_on_their_gradients(make_config, backend, routing):
    model = randomize_adapters(adapted(make_config(routing=routing), router=True)).train()
    results = []
    for name in ("eager", backend):
        model.get_base_model().set_experts_implementation(name)
        backward(model)
        results.append([logits(model), *(parameter.grad for parameter in adapters(model).values())])
        model.train()
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention": False, "experts": False}, "nothing would be adapted"),
        ({"lora_dropout": 0.1}, "`lora_dropout`=0.1.*experts=False, router=False"),
        ({"attention": False, "experts": False, "router": True, "lora_dropout": 0.1}, "`lora_dropout`=0.1"),
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"r": 0}, "`r` should be a positive integer"),
    ],
    ids=["nothing", "dropout_on_experts", "dropout_on_router", "dora", "lora_bias", "rank_0"],
)
def test_options_that_cannot_be_applied_are_refused_by_name(make_config, arguments, message):
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(HMoEForCausalLM(make_config(attention_bias=True)), lora_config(**arguments))


@pytest.mark.parametrize("arguments", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_attention_alone_takes_every_lora_option(make_config, arguments):
    model = adapted(make_config(attention_bias=True), experts=False, **arguments)
    backward(model)
    assert all(parameter.grad is not None for parameter in adapters(model).values())


@pytest.mark.parametrize(
    "checkpointing",
    [None, {"use_reentrant": False}, {"use_reentrant": True}],
    ids=["no_checkpointing", "non_reentrant", "reentrant"],
)
def test_trainer_fine_tunes_the_adapters(config, checkpointing, tmp_path):
    model = adapted(config, router=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        activation_checkpointing=checkpointing is not None,
        activation_checkpointing_kwargs=checkpointing,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in INPUT_IDS.repeat(4, 1)]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    loaded = peft.PeftModel.from_pretrained(HMoEForCausalLM(config), tmp_path / "checkpoint-2")
    assert all(torch.equal(p, adapters(model)[name]) for name, p in adapters(loaded).items())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointing_does_not_change_the_adapters_gradients(config, use_reentrant):
    model = randomize_adapters(adapted(config, router=True)).train()
    backward(model)
    expected = {name: parameter.grad.clone() for name, parameter in adapters(model).items()}
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # as Trainer does: reentrant checkpointing needs an input with a gradient
    backward(model)
    for name, parameter in adapters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
