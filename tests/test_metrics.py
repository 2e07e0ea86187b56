import math
from concurrent.futures import ThreadPoolExecutor

import evaluate
import pytest
import torch
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments, default_data_collator

from hmoe import HMoEForCausalLM
from hmoe.metrics import (
    NextTokenAccuracy,
    NextTokenMetrics,
    Perplexity,
    held_out_metrics,
    predicted_labels,
    score_tokens,
)


def random_batch(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """A vocabulary of four, so that a quarter of the predictions is right; a third of the labels does not count."""
    generator = torch.Generator().manual_seed(seed)
    references = torch.randint(4, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) < 1 / 3
    return {
        "predictions": torch.randint(4, (rows, length), generator=generator),
        "references": references.masked_fill(ignored, -100),
        "losses": 3 * torch.rand(rows, length, generator=generator),
    }


def literal_scores(batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    right = tokens = 0
    nats = 0.0
    for batch in batches:
        lists = (batch[name].flatten().tolist() for name in ("predictions", "references", "losses"))
        for prediction, reference, loss in zip(*lists):
            if reference != -100:
                right += prediction == reference
                nats += loss
                tokens += 1
    return {"accuracy": right / tokens, "perplexity": math.exp(nats / tokens), "loss": nats / tokens}


BATCHES = [random_batch(rows, length, seed) for seed, (rows, length) in enumerate([(3, 5), (1, 9), (4, 2), (2, 16)])]


def test_streamed_and_combined_metrics_equal_a_loop_over_tokens():
    metrics = held_out_metrics()
    for batch in BATCHES:
        metrics.add_batch(**batch)
    assert metrics.compute() == pytest.approx(literal_scores(BATCHES))
    metrics.add_batch(**BATCHES[1])
    assert metrics.compute() == pytest.approx(literal_scores(BATCHES[1:2])), "the tokens of the last call were kept"
    assert metrics.compute(**BATCHES[0]) == pytest.approx(literal_scores(BATCHES[:1]))


def test_a_token_at_a_time_lists_and_arrays_give_what_tensors_give():
    accuracy, perplexity = NextTokenAccuracy(), Perplexity()
    expected = literal_scores(BATCHES[:1])
    flat = {name: values.flatten() for name, values in BATCHES[0].items()}
    for prediction, reference, loss in zip(*flat.values()):
        accuracy.add(prediction=prediction, reference=reference)
        perplexity.add(loss=loss, reference=reference)
    assert accuracy.compute() | perplexity.compute() == pytest.approx(expected)
    lists = {name: values.tolist() for name, values in BATCHES[0].items()}
    assert held_out_metrics().compute(**lists) == pytest.approx(expected)
    arrays = {name: values.numpy() for name, values in flat.items()}
    assert held_out_metrics().compute(**arrays) == pytest.approx(expected)
    halves = {"references": flat["references"], "losses": flat["losses"].bfloat16()}
    assert Perplexity().compute(**halves)["loss"] == pytest.approx(expected["loss"], rel=0.01)


def test_they_compose_with_other_metrics_of_the_library():
    class Ones(evaluate.Metric):
        def _info(self):
            features = NextTokenAccuracy().features
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions, references):
            return {"accuracy": 1.0}

    combined = evaluate.combine({"ours": NextTokenAccuracy(), "other": Ones(keep_in_memory=True)})
    combined.add_batch(predictions=[1, 2], references=[1, 3])
    assert combined.compute() == {"ours_accuracy": 0.5, "other_accuracy": 1.0}
    for metric in (NextTokenAccuracy(), Perplexity()):
        assert isinstance(metric.info, evaluate.MetricInfo) and metric.description and metric.inputs_description
        assert "references" in metric.add_batch.__doc__


def test_what_is_kept_is_one_row_a_batch_and_no_cache_folder_is_needed(monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/dev/null/read-only")
    metric = NextTokenAccuracy()
    for batch in BATCHES:
        metric.add_batch(predictions=batch["predictions"], references=batch["references"])
    assert len(metric) == len(BATCHES)
    assert metric.compute() == pytest.approx({"accuracy": literal_scores(BATCHES)["accuracy"]})


def test_two_processes_share_a_folder_and_the_first_has_the_figure_of_all_tokens(tmp_path):
    options = {"num_process": 2, "cache_dir": str(tmp_path), "experiment_id": "run"}
    ranks = [Perplexity(process_id=rank, **options) for rank in range(2)]

    def run(rank: int) -> dict[str, float] | None:
        for batch in BATCHES[rank::2]:
            ranks[rank].add_batch(losses=batch["losses"], references=batch["references"])
        return ranks[rank].compute()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    expected = literal_scores(BATCHES)
    assert first == pytest.approx({name: expected[name] for name in ("perplexity", "loss")})
    assert second is None


def test_nothing_predicted_is_nan_and_a_hopeless_model_is_infinite():
    nothing = held_out_metrics().compute(predictions=[1], references=[-100], losses=[math.nan])
    assert all(math.isnan(value) for value in nothing.values())
    assert Perplexity().compute(losses=[1e6], references=[0]) == {"perplexity": math.inf, "loss": 1e6}


def test_bad_input_is_refused_with_the_value_and_a_remedy():
    with pytest.raises(ValueError, match=r"inputs of `next_token_accuracy` must have one shape.*\(2,\).*\(3,\)"):
        NextTokenAccuracy().add_batch(predictions=[1, 2], references=[1, 2, 3])
    with pytest.raises(ValueError, match=r"takes the inputs \['losses', 'references'\], got \['references'\]"):
        Perplexity().add_batch(references=[1])
    with pytest.raises(ValueError, match="`perplexity` has nothing to compute"):
        Perplexity().compute()


@pytest.mark.parametrize("outputs", [lambda logits: logits, lambda logits: (torch.tensor(1.0), logits)])
def test_scores_of_tokens_are_those_of_the_logits_before_them(outputs):
    logits, labels = torch.randn(2, 6, 7, dtype=torch.bfloat16), torch.randint(7, (2, 6))
    labels[1, 4:] = -100
    predictions, losses = score_tokens(outputs(logits), labels)
    references = predicted_labels(labels)
    assert (references[:, 0] == -100).all() and torch.equal(references[:, 1:], labels[:, 1:])
    for row in range(2):
        for place in range(1, 6):
            scores = logits[row, place - 1].float().log_softmax(-1)
            assert predictions[row, place] == scores.argmax()
            if labels[row, place] != -100:
                assert losses[row, place].item() == pytest.approx(-scores[labels[row, place]].item(), rel=1e-5)


def padded_rows(number: int) -> Dataset:
    rows = []
    for row in range(number):
        kept = 3 + 5 * row % 9
        ids = torch.randint(3, 64, (kept,)).tolist()
        rest = 12 - kept
        rows.append(
            {
                "input_ids": ids + [0] * rest,
                "attention_mask": [1] * kept + [0] * rest,
                "labels": ids + [-100] * rest,
            }
        )
    return Dataset.from_list(rows)


@pytest.mark.parametrize("by_batch", [True, False], ids=["by_batch", "at_the_end"])
@pytest.mark.parametrize("kind", ["hmoe", "mixtral"])
def test_plain_trainer_reports_them_and_keeps_no_tokens_by_batch(kind, by_batch, tiny_config, tmp_path):
    if kind == "hmoe":
        model = HMoEForCausalLM(tiny_config())
    else:
        fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = MixtralForCausalLM(
            MixtralConfig(**fields, **heads, num_local_experts=4, output_router_logits=True, pad_token_id=0)
        )
    data = padded_rows(7)
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=3, batch_eval_metrics=by_batch, report_to="none", use_cpu=True
    )
    trainer = Trainer(
        model,
        arguments,
        eval_dataset=data,
        data_collator=default_data_collator,
        compute_metrics=NextTokenMetrics(),
        preprocess_logits_for_metrics=score_tokens,
    )
    right = tokens = 0
    nats = 0.0
    for row in data:
        ids = torch.tensor([token for token in row["labels"] if token != -100])
        with torch.no_grad():
            scores = model.eval()(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        right += int((scores.argmax(-1) == ids[1:]).sum())
        nats -= scores.gather(1, ids[1:, None]).sum().item()
        tokens += len(ids) - 1
    for _ in range(2):
        metrics = trainer.evaluate()
        assert metrics["eval_accuracy"] == pytest.approx(right / tokens)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation")
    assert (output.predictions is None) == by_batch
