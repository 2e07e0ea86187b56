import json
import math
import os
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hmoe_cli
from hmoe.training.command import main


TINY = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
HMOE = {**TINY, "expert_intermediate_sizes": [8, 16, 24, 32]}
LLAMA = {**TINY, "intermediate_size": 24}
MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


@pytest.fixture(autouse=True, scope="session")
def _data_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Sixty short documents of a small language."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = ["we", "the", "people", "of", "this", "union", "work", "for", "peace", "and", "a", "better", "life"]
    with open(path, "w") as file:
        for number in range(60):
            text = " ".join(words[(number * step + step) % len(words)] for step in range(10 + number % 13))
            file.write(json.dumps({"text": f"{text} {number}"}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus):
    """A run of six steps of two accumulated batches, with a checkpoint after three; its folder."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(command(corpus, folder, HMOE, "--save_steps", "3", "--gradient_accumulation_steps", "2")) == 0
    return folder


def command(corpus, folder, fields, *more, model=("--model_type", "hmoe")):
    words = ["--dataset", corpus, "--output_dir", str(folder), "--train_tokenizer", "300", "--max_steps", "6"]
    words += [*model, "--model_config", json.dumps(fields)] if fields is not None else [*model]
    words += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu", "--report_to", "none"]
    return [*words, "--disable_tqdm", "true", "--save_strategy", "steps", *more]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def losses(folder) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_finished_run_leaves_a_model_that_loads_by_itself(trained):
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    output = model.generate(**tokenizer("we the people", return_tensors="pt"), max_new_tokens=3)
    assert output.shape[1] > 3
    names = {path.name for path in trained.iterdir()}
    assert {"recipe.yaml", "trainer_state.json", "modeling_hmoe.py", "all_results.json"} <= names


def test_the_saved_recipe_repeats_the_run(trained, tmp_path):
    assert main(["--config", str(trained / "recipe.yaml"), "--output_dir", str(tmp_path)]) == 0
    assert_same_weights(weights(trained), weights(tmp_path))


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_resumed_run_equals_one_that_never_stopped(corpus, tmp_path, streaming):
    # 6 steps of 4 sequences are more than one epoch of the corpus, so that the resume crosses its end.
    more = ["--save_steps", "4", "--streaming", streaming, "--max_steps", "16", "--sequence_length", "24"]
    more += ["--gradient_accumulation_steps", "2", "--shuffle_buffer", "8"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(command(corpus, whole, HMOE, *more)) == 0
    for step in (4, 12):
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        shutil.copytree(whole / "tokenizer", resumed / "tokenizer")
        assert main(command(corpus, resumed, HMOE, *more)) == 0
        assert_same_weights(weights(whole), weights(resumed))


@pytest.mark.parametrize(("model_type", "fields"), [("llama", LLAMA), ("mixtral", MIXTRAL)])
def test_twins_of_other_types_train_through_the_same_command(corpus, tmp_path, model_type, fields):
    more = ["--validation_fraction", "0.2", "--eval_strategy", "steps", "--eval_steps", "3"]
    assert main(command(corpus, tmp_path, fields, *more, model=("--model_type", model_type))) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == model_type
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]), rel=1e-4)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_accuracy" in entry] == [3, 6, 6]


def test_the_loss_alone_can_be_evaluated(corpus, tmp_path):
    more = ["--validation_fraction", "0.2", "--max_steps", "1", "--prediction_loss_only", "true"]
    assert main(command(corpus, tmp_path, HMOE, *more)) == 0
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert "eval_perplexity" in results and "eval_accuracy" not in results


def test_a_checkpoint_is_continued_from(trained, corpus, tmp_path):
    words = command(corpus, tmp_path, None, model=("--model_name_or_path", str(trained)))
    del words[words.index("--train_tokenizer") : words.index("--train_tokenizer") + 2]
    assert main([*words, "--learning_rate", "0"]) == 0
    assert_same_weights(weights(trained), weights(tmp_path))


def test_presets_take_overrides(corpus, tmp_path):
    assert main(command(corpus, tmp_path, HMOE, "--max_steps", "1", model=("--preset", "modse-300m-x8"))) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["router_type"], config["hidden_size"]) == ("modse", 16)


def test_a_token_budget_sets_the_steps(corpus, tmp_path):
    words = command(corpus, tmp_path, HMOE, "--max_steps", "-1", "--max_train_tokens", str(5 * 64 - 3))
    assert main(words) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (5, 5)


def test_a_flops_budget_stops_the_run_at_its_step(trained, corpus, tmp_path):
    spent = json.loads((trained / "trainer_state.json").read_text())["total_flos"]
    words = command(corpus, tmp_path, HMOE, "--max_steps", "-1", "--max_train_flops", str(spent / 2))
    words += ["--lr_scheduler_type", "constant", "--save_steps", "100"]
    assert main(words) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    steps, flops = state["global_step"], state["total_flos"]
    assert steps <= state["max_steps"]
    assert flops * (1 - 1 / steps) * 0.95 < spent / 2 <= flops
    assert (tmp_path / f"checkpoint-{state['global_step']}").is_dir()
    # Started again, a run whose budget is spent takes no further step.
    assert main(words) == 0
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == steps


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [("we the people?", "work for peace"), ("a better life?", "for this union")]
    with open(path, "w") as file:
        for question, answer in turns * 4:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "question": question, "answer": answer}) + "\n")
    return str(path)


def finetune(trained, chats, folder, *more):
    words = command(chats, folder, None, "--task", "instruct", *more, model=("--model_name_or_path", str(trained)))
    del words[words.index("--train_tokenizer") : words.index("--train_tokenizer") + 2]
    return main(words)


def test_full_fine_tuning_learns_the_answers(trained, chats, tmp_path):
    assert finetune(trained, chats, tmp_path, "--max_steps", "20") == 0
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3


def test_lora_leaves_the_model_alone_and_merges(trained, chats, tmp_path):
    peft = pytest.importorskip("peft")
    pairs = ["--prompt_column", "question", "--answer_column", "answer"]
    assert finetune(trained, chats, tmp_path, "--lora", "--lora_r", "2", "--lora_merge", *pairs) == 0
    base = AutoModelForCausalLM.from_pretrained(trained)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    assert not torch.allclose(before, adapted, atol=1e-3)
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sequence_length", "64"], "`max_position_embeddings`=32"),
        (["--eval_strategy", "steps"], "no validation data"),
        (["--streaming", "true", "--max_steps", "-1"], "give a budget"),
        (["--model_config.vocab_size", "280"], "less than the 300 tokens"),
        (["--model_config.hiden_size", "8"], "did you mean `hidden_size`"),
        (["--model_type", "hmo"], "did you mean `hmoe`"),
        (["--model_type", "llama", "--model_config.num_experts_per_token", "8"], "llama has no field"),
        (["--resume", "nowhere"], "is no checkpoint folder"),
        (["--dataset", "nothing.txt"], "nothing.txt: no such file or folder"),
        (["--train_tokenizer", "100"], "fewer than 256 bytes"),
    ],
)
def test_what_cannot_work_is_refused_before_training(corpus, tmp_path, capsys, words, message):
    fields = [part for name, value in HMOE.items() for part in (f"--model_config.{name}", json.dumps(value))]
    assert hmoe_cli.main(["train", *command(corpus, tmp_path, None), *fields, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_used_folder_is_not_overwritten(trained, corpus, capsys):
    assert hmoe_cli.main(["train", *command(corpus, trained, HMOE, "--resume", "never")]) == 2
    assert "holds 2 checkpoints of another run" in capsys.readouterr().err


def test_a_run_without_a_tokenizer_is_refused(corpus, tmp_path, capsys):
    words = command(corpus, tmp_path, HMOE)
    del words[words.index("--train_tokenizer") : words.index("--train_tokenizer") + 2]
    assert hmoe_cli.main(["train", *words]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_an_unwritable_folder_is_a_clear_error(corpus, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert hmoe_cli.main(["train", *command(corpus, tmp_path / "file", HMOE)]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_stream_what_one_process_does(corpus, tmp_path):
    # A Llama, because router losses are not linear in the batch that one rank sees.
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--streaming", "true", "--logging_steps", "1", "--save_strategy", "no", "--per_device_train_batch_size"]
    llama = {"fields": LLAMA, "model": ("--model_type", "llama")}
    assert main([*command(corpus, one, **llama), *more, "4"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "hmoe.training", *command(corpus, two, **llama), *more, "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert len(losses(one)) == 6


def test_the_three_ways_to_start_are_one(capsys):
    module = subprocess.run([sys.executable, "-m", "hmoe.training", "--help"], capture_output=True, text=True)
    assert hmoe_cli.main(["train", "--help"]) == 0
    assert module.stdout == capsys.readouterr().out
