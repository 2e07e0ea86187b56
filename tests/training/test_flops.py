import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from hmoe import HMoEConfig, HMoEForCausalLM, count_parameters
from hmoe.costs import FlopsMeter, forward_flops
from hmoe.training.budget import BudgetCallback, steps_for_budget


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LENGTH = 16


def hmoe(**overrides) -> HMoEForCausalLM:
    torch.manual_seed(0)
    fields = {
        **SMALL,
        "expert_intermediate_sizes": [[8, 16, 24, 40], [16, 8, 8]],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return HMoEForCausalLM(HMoEConfig(**{**fields, **overrides}))


def literal_flops(model, ids) -> int:
    """Every product of a forward pass, but for the tables of rotary positions."""
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False, depth=None)
    with counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


MODELS = {
    "top_k": lambda: hmoe(experts_implementation="eager"),
    "top_p": lambda: hmoe(routing="top_p", experts_implementation="eager"),
    "modse": lambda: hmoe(router_type="modse", experts_implementation="eager"),
    "qk_norm-tied": lambda: hmoe(qk_norm=True, tie_word_embeddings=True, experts_implementation="eager"),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4, experts_implementation="eager")
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48)),
}


@pytest.mark.parametrize("name", MODELS)
def test_counted_flops_equal_a_literal_count_of_the_products(name):
    model = MODELS[name]()
    ids = torch.randint(0, 64, (3, LENGTH))
    meter = FlopsMeter(model)
    model.train()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    tokens, flops = meter.take().tolist()
    assert tokens == ids.numel()
    assert flops == 3 * literal_flops(model.eval(), ids)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_and_evaluation_do_not_count(reentrant):
    model, ids = hmoe(), torch.randint(0, 64, (2, LENGTH))
    meter = FlopsMeter(model)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    plain = meter.take().tolist()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=ids, labels=ids).loss.backward()
    assert meter.take().tolist() == plain
    model.eval()
    model(input_ids=ids)
    assert meter.take().tolist() == [0, 0]


def test_6nd_counts_six_times_the_activated_parameters():
    model = hmoe(expert_intermediate_sizes=[16] * 4)
    flops = forward_flops(model, "6nd")
    assert 3 * flops.count(10, LENGTH) == 6 * 10 * count_parameters(model.config).activated


def test_conventions_differ_by_attention_embedding_and_norms():
    with torch.device("meta"):
        model = HMoEForCausalLM(HMoEConfig.from_preset("hmoe-0.4b"))
    config, counts = model.config, count_parameters(model.config)
    matmul, paper = (3 * forward_flops(model, name).count(1, 4096) for name in ("matmul", "6nd"))
    attention = 12 * config.num_hidden_layers * config.hidden_size * 4096
    assert matmul == paper + attention - 6 * (counts.embedding // 2 + counts.norms)
    assert 1.25 < matmul / paper < 1.4


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="flops_convention"):
        forward_flops(hmoe(), "6n")


@pytest.mark.parametrize("convention", ["matmul", "6nd"])
@pytest.mark.parametrize("name", ["top_k", "mixtral", "llama"])
def test_partitioned_parameters_count_whole(name, convention):
    model = MODELS[name]()
    whole = forward_flops(model, convention)
    for parameter in model.parameters():  # as DeepSpeed ZeRO-3 does
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert forward_flops(model, convention) == whole


def rows(number: int) -> list[dict]:
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (number, LENGTH))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(tmp_path, budget: BudgetCallback, model, *, resume=None, **settings) -> Trainer:
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none", disable_tqdm=True, **settings
    )
    trainer = Trainer(model, args, train_dataset=rows(64), callbacks=[budget])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_stops_at_the_first_step_that_reaches_the_flops_budget(tmp_path):
    free = BudgetCallback(model := hmoe())
    train(tmp_path / "free", free, model, max_steps=4, save_strategy="no")
    budget = BudgetCallback(model := hmoe(), max_flops=free.flops)
    trainer = train(tmp_path / "budget", budget, model, max_steps=20, save_strategy="no")
    assert trainer.state.global_step == 4
    assert budget.flops == free.flops


def test_a_resumed_run_goes_on_counting(tmp_path):
    whole = BudgetCallback(model := hmoe(), max_flops=1e18)
    train(tmp_path / "whole", whole, model, max_steps=6, save_strategy="steps", save_steps=3)
    resumed = BudgetCallback(model := hmoe(), max_flops=1e18)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    train(tmp_path / "resumed", resumed, model, resume=checkpoint, max_steps=6, save_strategy="no")
    assert (resumed.tokens, resumed.flops) == (whole.tokens, whole.flops)
    assert whole.tokens == 6 * 2 * LENGTH


def test_a_token_budget_stops_and_saves(tmp_path):
    budget = BudgetCallback(model := hmoe(), max_tokens=5 * 2 * LENGTH - 1)
    trainer = train(tmp_path, budget, model, max_steps=20, save_strategy="steps", save_steps=100)
    assert trainer.state.global_step == 5
    assert (tmp_path / "checkpoint-5").is_dir()


def test_planned_steps_cover_the_budget():
    flops = forward_flops(hmoe())
    plan = {"max_steps": -1, "max_tokens": None, "max_flops": None, "tokens_per_step": 32, "length": LENGTH}
    assert steps_for_budget(flops, **plan) == -1
    assert steps_for_budget(flops, **{**plan, "max_tokens": 65}) == 3
    assert steps_for_budget(flops, **{**plan, "max_steps": 2, "max_tokens": 65}) == 2
    least = 3 * flops.least(32, LENGTH)
    assert steps_for_budget(flops, **{**plan, "max_flops": 10 * least}) == 10
    assert least < 3 * flops.count(32, LENGTH)
