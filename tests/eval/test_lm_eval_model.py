import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hmoe.costs import moe_costs
from hmoe.eval.harness import main

from .conftest import DOCUMENTS


def literal_ratio(folder: str, tokenizer) -> float:
    """Activated share of the expert parameters over every option of every item, one text at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.config.output_router_logits = True
    described = moe_costs(model)
    used = tokens = 0
    for document in DOCUMENTS:
        for answer in document["answers"]:
            question = document["question"]
            context = tokenizer(question)["input_ids"]
            ids = context + tokenizer(f"{question} {answer}")["input_ids"][len(context) :]
            outputs = model(input_ids=torch.tensor([ids[:-1]]))
            index = outputs.get("router_index") or [logits.topk(2).indices for logits in outputs.router_logits]
            tokens += len(ids) - 1
            for layer, chosen in enumerate(index):
                sizes = described.expert_parameters[layer]
                used += sum(sizes[expert] for expert in chosen.flatten().tolist() if expert < len(sizes))
    return used / tokens / sum(map(sum, described.expert_parameters))


@pytest.mark.usefixtures("own_tasks_only")
@pytest.mark.parametrize("name", ["hmoe", "top_p", "mixtral"])
def test_activated_ratio_counts_every_token_once_and_no_padding(name, model_folder, tasks, tokenizer, tmp_path):
    arguments = [model_folder(name), "--tasks", str(tasks / "toy_choice.yaml"), "--output_dir", str(tmp_path)]
    assert main([*arguments, "--batch_size", "5", "--device", "cpu"]) == 0
    (evaluation,) = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    expected = literal_ratio(model_folder(name), tokenizer)
    assert evaluation["activated_ratio"] == pytest.approx(expected, rel=1e-9)
    assert evaluation["scores"][0]["activated_ratio"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("own_tasks_only")
def test_peft_adapter_automatic_batch_size_and_cached_answers(model_folder, tasks, tmp_path):
    from peft import get_peft_model

    from hmoe import lora_config

    folder = model_folder("hmoe")
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, lora_config()).save_pretrained(adapter)
    arguments = [folder, "--tasks", str(tasks / "toy_choice.yaml"), "--device", "cpu", "--output_dir", str(tmp_path)]

    assert main([*arguments, "--model_args", f"peft={adapter}", "--batch_size", "2"]) == 0
    (adapted,) = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    cached = ["--use_cache", str(tmp_path / "cache"), "--batch_size", "auto", "--max_batch_size", "4"]
    assert main([*arguments, *cached, "--cache_requests", "delete"]) == 0
    (plain,) = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert adapted["activated_ratio"] == pytest.approx(plain["activated_ratio"], rel=1e-6)  # a fresh adapter is 0
    assert main([*arguments, *cached]) == 0
    (again,) = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert again["scores"][0]["value"] == plain["scores"][0]["value"]
    assert again["activated_ratio"] is None  # nothing was computed, so nothing was measured
