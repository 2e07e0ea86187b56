import json
import math

import crash_runs
import pytest
import torch
from datasets import Dataset
from tiny_training import LENGTH, SIZES, VOCABULARY, padded_data, tiny_arguments, tiny_data, tiny_model, tiny_trainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    default_data_collator,
)

from hmoe import count_parameters
from hmoe.costs import model_costs
from hmoe.metrics import NextTokenMetrics, score_tokens
from hmoe.training.router_log import RouterMetrics, summarise


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def twin_fields():
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def weights_after(trainer):
    trainer.train()
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_metrics_do_not_change_the_weights_that_plain_trainer_gives(tmp_path):
    plain = Trainer(
        model=tiny_model(),
        args=tiny_arguments(tmp_path / "plain"),
        train_dataset=tiny_data(),
        data_collator=default_data_collator,
    )
    expected = weights_after(plain)
    found = weights_after(tiny_trainer(tmp_path / "hmoe"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_logged_terms_and_load_are_those_of_one_forward_pass_over_the_whole_batch(tmp_path):
    """Padded rows, four accumulation steps of two rows: the same as one batch of eight, weighted by label."""
    model = tiny_model(attention_dropout=0.0)
    data = padded_data(8)
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    with torch.no_grad():
        outputs = model.train()(**batch, output_router_logits=True)
    trainer = tiny_trainer(
        tmp_path,
        model,
        data,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    trainer.train()
    (log,) = training_logs(trainer)
    assert log["lm_loss"] == pytest.approx(outputs.lm_loss.item(), rel=1e-5)
    # The z-loss is linear in tokens, so its label-weighted mean differs from the pass over all only by the weighting.
    assert log["router_z_loss"] == pytest.approx(outputs.router_z_loss.item(), rel=0.02)
    mask = batch["attention_mask"].bool().reshape(-1)
    for layer, index in enumerate(outputs.router_index):
        counts = torch.bincount(index[mask].reshape(-1), minlength=len(SIZES)) / mask.sum()
        assert trainer.router_window.load()[layer] == pytest.approx(counts.tolist())
    expected = count_parameters(model.config, load=trainer.router_window.load())
    assert log["activated_parameters"] == pytest.approx(expected.activated)
    assert log["tokens_seen"] == int(mask.sum())


def test_each_term_is_the_label_weighted_mean_over_micro_batches():
    model = tiny_model(attention_dropout=0.0).train()
    data = padded_data(6)
    batches = [
        {name: torch.tensor(data[name][rows]) for name in data.column_names} for rows in (slice(0, 2), slice(2, 6))
    ]
    labels = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    metrics = RouterMetrics()
    terms = []
    for batch in batches:
        outputs = model(**batch, output_router_logits=True, num_items_in_batch=torch.tensor(sum(labels)))
        metrics.update(outputs, batch, model.config, num_items_in_batch=torch.tensor(sum(labels)))
        terms.append(outputs)
    means = metrics.collect(lambda tensor: tensor).mean_losses()
    assert means["lm_loss"] == pytest.approx(sum(t.lm_loss.item() for t in terms))
    for name in ("aux_loss", "load_balancing_loss", "parameter_penalty_loss", "router_entropy_loss", "router_z_loss"):
        weighted = sum(n * t[name].item() for n, t in zip(labels, terms)) / sum(labels)
        assert means[name] == pytest.approx(weighted)


def test_top_p_logs_the_measured_experts_per_token(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model(routing="top_p", router_top_p=0.6), max_steps=1)
    with torch.no_grad():
        ids = torch.tensor(tiny_data()["input_ids"])
        trainer.model(input_ids=ids)
    trainer.train()
    (log,) = training_logs(trainer)
    rows = trainer.router_window.load()
    assert 1 <= log["experts_per_token"] <= len(SIZES)
    assert log["experts_per_token"] == pytest.approx(sum(map(sum, rows)) / len(rows))
    assert log["experts_per_token"] != 2


def test_dead_experts_and_imbalance_are_counted_where_the_router_collapsed(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2:] = 0
            layer.mlp.gate.weight[:2] *= 0
            layer.mlp.gate.forward = collapsed(layer.mlp.gate)
    trainer = tiny_trainer(tmp_path, model, max_steps=1)
    trainer.train()
    (log,) = training_logs(trainer)
    assert log["dead_experts"] == 2 * 2
    assert log["load_imbalance"] == pytest.approx(2.0)
    sizes = SIZES[0] + SIZES[1]
    assert log["activated_ratio"] == pytest.approx(sizes / sum(SIZES))


def collapsed(gate):
    """A router that sends every token to experts 0 and 1."""
    route = type(gate).forward

    def forward(hidden_states):
        logits, weights, _ = route(gate, hidden_states)
        return logits, weights, torch.tensor([0, 1]).expand(len(logits), 2)

    return forward


def test_layers_with_different_numbers_of_experts_are_counted_apart(tmp_path):
    model = tiny_model(expert_intermediate_sizes=[[8, 16, 24, 32, 40], [16, 48]], routing="top_p")
    trainer = tiny_trainer(tmp_path, model, max_steps=1)
    trainer.train()
    load = trainer.router_window.load()
    assert [len(row) for row in load] == [5, 2]
    assert all(0 <= share <= 1 for row in load for share in row)
    assert all(sum(row) >= 1 for row in load)


def test_per_layer_adds_each_layer_and_expert_and_off_adds_nothing(tmp_path):
    config = tiny_model().config
    trainer = tiny_trainer(tmp_path / "a", max_steps=1)
    trainer.train()
    entries = summarise(trainer.router_window, config, "per_layer")
    assert entries["layer_01/load/expert_03"] == trainer.router_window.load()[1][3]
    assert entries["layer_00/load_max_over_min"] >= 1
    assert not any(name.startswith("layer_") for name in summarise(trainer.router_window, config, "brief"))
    silent = tiny_trainer(tmp_path / "b", max_steps=1)
    silent.args.router_metrics = "off"
    silent.train()
    assert "lm_loss" not in training_logs(silent)[0]


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_train_flops_count_the_experts_that_tokens_activated(tmp_path, padded):
    model = tiny_model(attention_dropout=0.0)
    data = padded_data(4) if padded else tiny_data(4)
    batch = {name: torch.tensor(data[name]) for name in data.column_names}
    with torch.no_grad():
        index = model.train()(**batch, output_router_logits=True).router_index
    trainer = tiny_trainer(tmp_path, model, data, max_steps=1)
    trainer.train()
    counts = [torch.bincount(ids.reshape(-1), minlength=len(SIZES)).tolist() for ids in index]
    expected = 3 * model_costs(model).forward_flops().count(4 * LENGTH, LENGTH, counts)
    assert training_logs(trainer)[0]["train_flops"] == pytest.approx(expected)
    assert trainer.state.total_flos == pytest.approx(expected)


def test_evaluation_reports_the_perplexity_of_a_token_without_router_losses(tmp_path):
    """Batches with different numbers of labels count by their labels."""
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model)
    data = padded_data(9)
    metrics = trainer.evaluate(data)
    total, labels = 0.0, 0
    model.eval()
    for row in range(len(data)):
        batch = {name: torch.tensor([data[name][row]]) for name in data.column_names}
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(**batch).loss.item() * count
        labels += count
    assert metrics["eval_loss"] == pytest.approx(total / labels, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / labels), rel=1e-5)
    assert trainer.state.log_history[-1]["eval_perplexity"] == metrics["eval_perplexity"]


def test_a_dense_twin_trains_and_logs_its_loss(tmp_path):
    trainer = tiny_trainer(tmp_path, LlamaForCausalLM(LlamaConfig(**twin_fields())))
    trainer.train()
    log = training_logs(trainer)[-1]
    assert log["lm_loss"] == pytest.approx(log["loss"], rel=1e-4)
    assert log["train_flops"] > 0 and "experts_per_token" not in log


def test_a_stock_moe_twin_logs_its_load_and_evaluates_without_its_router_loss(tmp_path):
    config = MixtralConfig(**twin_fields(), num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    trainer = tiny_trainer(tmp_path, MixtralForCausalLM(config))
    trainer.train()
    log = training_logs(trainer)[-1]
    assert log["experts_per_token"] == pytest.approx(2)
    assert log["loss"] == pytest.approx(log["lm_loss"] + 0.5 * log["aux_loss"], rel=1e-4)
    metrics = trainer.evaluate()
    batch = torch.tensor(tiny_data(8, seed=1)["input_ids"])
    with torch.no_grad():
        pure = trainer.model.eval()(input_ids=batch, labels=batch, output_router_logits=False).loss.item()
    assert metrics["eval_loss"] == pytest.approx(pure, rel=1e-4)


def test_a_batch_without_labels_to_predict_counts_nothing():
    model = tiny_model().train()
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.full((1, 8), -100)}
    good = {"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.ones(1, 8, dtype=torch.long)}
    metrics = RouterMetrics()
    for inputs in (batch, good):
        metrics.update(model(**inputs, output_router_logits=True), inputs, model.config)
    assert math.isfinite(metrics.collect(lambda tensor: tensor).mean_losses()["lm_loss"])


def run_padded(folder, accumulation, **arguments):
    """Two steps on padded rows, then nine rows to evaluate."""
    trainer = tiny_trainer(
        folder,
        tiny_model(attention_dropout=0.0, parameter_penalty_loss_coef=0.0, load_balancing_loss_coef=0.0),
        padded_data(16),
        gradient_accumulation_steps=accumulation,
        **{"max_steps": 2, "lr_scheduler_type": "constant", **arguments},
    )
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = NextTokenMetrics(), score_tokens
    trainer.args.batch_eval_metrics = True
    trainer.train()
    metrics = trainer.evaluate(padded_data(9))
    evaluation = {name: metrics[f"eval_{name}"] for name in ("loss", "accuracy", "perplexity")}
    return {"logs": training_logs(trainer), "eval": evaluation, "load": trainer.router_window.load()}


def write_padded(folder, path, **arguments):
    result = run_padded(folder, accumulation=1, **arguments)
    if torch.distributed.get_rank() == 0:
        path.write_text(json.dumps(result))


def test_two_ranks_log_what_one_process_logs_on_the_same_global_batch(tmp_path):
    """Nine rows to evaluate make the last batch of the ranks incomplete; no row may count twice.

    The ranks stop together when their FLOPs reach a budget that the second step of one process reached.
    """
    path = tmp_path / "two.json"
    one = run_padded(tmp_path / "one", accumulation=2)
    budget = {"max_steps": 5, "max_train_flops": 0.9 * one["logs"][-1]["train_flops"]}
    processes = crash_runs.start(write_padded, tmp_path / "two", path, ranks=2, ddp_backend="gloo", **budget)
    assert crash_runs.finish(processes) == 0
    two = json.loads(path.read_text())
    assert len(two["logs"]) == len(one["logs"]) == 2
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)
    assert two["eval"]["perplexity"] == pytest.approx(math.exp(two["eval"]["loss"]), rel=1e-5)
    for name in ("lm_loss", "tokens_seen", "train_flops", "experts_per_token", "activated_parameters"):
        values = [[log[name] for log in result["logs"]] for result in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-5), name
    for row_one, row_two in zip(one["load"], two["load"]):
        assert row_two == pytest.approx(row_one)


def test_a_dataset_without_labels_still_trains_nothing_silently(tmp_path):
    trainer = tiny_trainer(tmp_path, data=Dataset.from_dict({"input_ids": [[3] * LENGTH] * 4}))
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.train()
