"""Routers, routings and router losses are added from outside: one entry of a table each, and fields of a config."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from peft import get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hmoe import HMoEConfig, HMoEForCausalLM, lora_config
from hmoe.routing_hmoe import ROUTER_LOSSES, ROUTERS, ROUTINGS, HMoERouter, LayerRouting, router_parameter_names
from hmoe.training.router_log import RouterMetrics


# No `from __future__ import annotations` here: the names are checked by what the annotations are.
@strict
class ToyConfig(HMoEConfig):
    router_type: Literal["linear", "modse", "bilinear"] = "bilinear"
    routing: Literal["top_k", "top_p", "first"] = "first"
    confidence_loss_coef: float | int = 0.5


class BilinearRouter(HMoERouter):
    """The sum of two linear maps, and a bias that starts at one."""

    matrices = ("weight", "second")

    def __init__(self, config: HMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.bias = torch.nn.Parameter(torch.empty(self.num_experts))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        torch.nn.init.ones_(self.bias)

    def scores(self, hidden_states: Tensor) -> Tensor:
        return super().scores(hidden_states) + hidden_states @ self.second.to(hidden_states.dtype).T + self.bias


def route_to_the_first(probability: Tensor, config: HMoEConfig) -> tuple[Tensor, Tensor]:
    return probability.max(dim=-1, keepdim=True)


def confidence_loss(layer: LayerRouting) -> Tensor:
    return layer.mean_over_tokens(layer.logits.softmax(dim=-1).max(dim=-1).values)


@pytest.fixture
def toy_config(monkeypatch) -> Callable[..., ToyConfig]:
    monkeypatch.setitem(ROUTERS, "bilinear", BilinearRouter)
    monkeypatch.setitem(ROUTINGS, "first", route_to_the_first)
    monkeypatch.setitem(ROUTER_LOSSES, "confidence_loss", confidence_loss)

    def make(**overrides) -> ToyConfig:
        fields = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "expert_intermediate_sizes": [8, 16, 24],
            "parameter_penalty_loss_coef": 0.0,
        }
        return ToyConfig(**{**fields, **overrides})

    return make


INPUT_IDS = torch.arange(24).view(2, 12)


def test_an_added_router_is_drawn_by_its_own_rule(toy_config):
    for layer in HMoEForCausalLM(toy_config(initializer_range=0.5)).model.layers:
        assert layer.mlp.gate.second.std().item() == pytest.approx(0.5, rel=0.3)
        assert (layer.mlp.gate.bias == 1).all()


def test_an_added_loss_is_in_the_outputs_weighted_and_trains_the_added_router(toy_config):
    model = HMoEForCausalLM(toy_config()).train()
    output = model(INPUT_IDS, labels=INPUT_IDS, output_router_logits=True)
    assert all(index.shape == (24, 1) for index in output.router_index)
    expected = torch.stack([logits.softmax(-1).max(-1).values.mean() for logits in output.router_logits]).mean()
    torch.testing.assert_close(output.confidence_loss, expected)
    torch.testing.assert_close(output["aux_loss"], 0.5 * expected)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.5 * expected)
    (output.loss - output.lm_loss).backward()
    for layer in model.model.layers:
        assert all(parameter.grad.any() for parameter in layer.mlp.gate.parameters())


def test_outputs_with_an_added_loss_survive_trees_and_the_config_hides_it_from_evaluation(toy_config):
    config = toy_config()
    output = HMoEForCausalLM(config).train()(INPUT_IDS, labels=INPUT_IDS)
    mapped = torch.utils._pytree.tree_map(lambda value: value, output)  # as the hooks of FSDP2 do
    assert type(mapped) is type(output)
    assert mapped.keys() == output.keys() and mapped.confidence_loss is output.confidence_loss
    assert "confidence_loss" in config.keys_to_ignore_at_inference


def test_an_added_loss_is_logged(toy_config):
    config = toy_config()
    inputs = {"input_ids": INPUT_IDS, "labels": INPUT_IDS}
    output = HMoEForCausalLM(config).train()(**inputs)
    metrics = RouterMetrics()
    metrics.update(output, inputs, config)
    logged = metrics.collect(lambda values: values).mean_losses()
    assert logged["confidence_loss"] == pytest.approx(output.confidence_loss.item())


def test_a_coefficient_of_zero_turns_an_added_loss_off(toy_config):
    assert toy_config().has_router_losses
    assert not toy_config(confidence_loss_coef=0).has_router_losses


def test_a_model_with_additions_trains_saves_and_loads(toy_config, tmp_path: Path):
    model = HMoEForCausalLM(toy_config())
    before = model.model.layers[0].mlp.gate.second.detach().clone()
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True, learning_rate=0.1
    )
    data = [{"input_ids": row, "labels": row} for row in INPUT_IDS]
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.predict(data).predictions.shape == (2, 12, 64)  # the logits alone
    assert not torch.equal(model.model.layers[0].mlp.gate.second, before)
    model.save_pretrained(tmp_path / "saved")
    config = ToyConfig.from_pretrained(tmp_path / "saved")
    assert (config.router_type, config.routing, config.confidence_loss_coef) == ("bilinear", "first", 0.5)
    loaded = HMoEForCausalLM.from_pretrained(tmp_path / "saved", config=config)
    with torch.no_grad():
        assert torch.equal(loaded(INPUT_IDS).logits, model.eval()(INPUT_IDS).logits)


def test_lora_and_conversion_know_the_parameters_of_an_added_router(toy_config):
    config = toy_config()
    assert set(router_parameter_names(config)) == {"weight", "second", "bias"}
    model = get_peft_model(HMoEForCausalLM(config), lora_config(2, attention=False, experts=False, router=True))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 2 * config.num_hidden_layers


@pytest.mark.parametrize(
    ("field", "known"), [("router_type", "'linear', 'modse', 'bilinear'"), ("routing", "'top_k', 'top_p', 'first'")]
)
def test_a_name_that_nobody_added_is_refused_with_the_list(toy_config, field, known):
    with pytest.raises(StrictDataclassError, match=known):
        toy_config(**{field: "unheard_of"})


@pytest.mark.parametrize(("field", "name"), [("router_type", "bilinear"), ("routing", "first")])
def test_the_package_config_does_not_take_the_names_of_others(tiny_config, toy_config, field, name):
    with pytest.raises(StrictDataclassError, match=field):
        tiny_config(**{field: name})


def test_a_model_of_the_package_ignores_losses_that_others_added(tiny_config, toy_config):
    output = HMoEForCausalLM(tiny_config()).train()(INPUT_IDS, labels=INPUT_IDS)
    assert "confidence_loss" not in output and "parameter_penalty_loss" in output
