import json
import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hmoe_cli
from hmoe import lora_config
from hmoe.eval.analyze import main
from hmoe.eval.observe import windows

from .conftest import train_tokenizer


def literal_scores(model: PreTrainedModel, text: str, tokenizer, max_tokens: int) -> dict[str, float]:
    """Window by window and token by token."""
    right = tokens = 0
    nats = 0.0
    for row in windows([text], tokenizer, 32, max_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].float()
        for place in range(1, len(row)):
            scores = logits[place - 1].log_softmax(-1)
            right += int(scores.argmax()) == row[place]
            nats -= float(scores[row[place]])
            tokens += 1
    return {"loss": nats / tokens, "perplexity": math.exp(nats / tokens), "accuracy": right / tokens}


def scores_of(result: dict) -> dict[str, float]:
    return {name: result["model"][name] for name in ("loss", "perplexity", "accuracy")}


@pytest.fixture
def written(monkeypatch) -> list[dict]:
    """The results that the command would write; drawing them takes most of its time."""
    results: list[dict] = []
    monkeypatch.setattr("hmoe.eval.analyze.write_report", lambda result, folder: results.append(result))
    return results


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, model_folder) -> list[str]:
    """A LoRA run on the model `hmoe`: two checkpoints, which hold the adapter alone."""
    from peft import get_peft_model

    root = tmp_path_factory.mktemp("lora")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder("hmoe")), lora_config())
    for step in (10, 20):
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
        model.save_pretrained(root / f"checkpoint-{step}")
    return [str(root / f"checkpoint-{step}") for step in (10, 20)]


def test_an_adapter_is_analysed_on_its_base_and_against_it(adapters, model_folder, text_file, tokenizer, written):
    from peft import PeftModel

    base = model_folder("hmoe")
    arguments = ["--data", str(text_file), "--window", "32", "--max_tokens", "1000", "--min_count", "3"]
    arguments += ["--against", base, "--peft", adapters[1], "--checkpoints", adapters[0], adapters[1]]
    assert main([base, *arguments]) == 0
    (result,) = written
    text = text_file.read_text(encoding="utf-8")
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    unadapted = literal_scores(plain, text, tokenizer, 1000)
    expected = literal_scores(PeftModel.from_pretrained(plain, adapters[1]).eval(), text, tokenizer, 1000)
    assert scores_of(result) == pytest.approx(expected, rel=1e-4)
    assert expected["loss"] != pytest.approx(unadapted["loss"], rel=1e-3)
    assert result["baseline"]["loss"] == pytest.approx(unadapted["loss"], rel=1e-4)
    assert [(run["step"], run["path"]) for run in result["checkpoints"][:2]] == [(10, adapters[0]), (20, adapters[1])]
    assert result["checkpoints"][1]["loss"] == result["model"]["loss"] != result["checkpoints"][0]["loss"]
    sizes = [24, 8, 32, 16]
    assert [layer["sizes"] for layer in result["model"]["routing"]["layers"]] == [sizes, sizes]


@pytest.fixture
def foreign(tmp_path, model_folder, monkeypatch) -> str:
    """A model of a type that nobody has registered, with its code beside its weights."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "foreign"
    shutil.copytree(model_folder("hmoe"), folder)
    for name in ("configuration_hmoe.py", "config.json"):
        text = (folder / name).read_text()
        assert re.search(r'model_type"?\s*[=:]\s*"hmoe"', text)
        (folder / name).write_text(re.sub(r'(model_type"?\s*[=:]\s*)"hmoe"', r'\1"foreign"', text))
    return str(folder)


def test_code_beside_a_checkpoint_runs_only_if_it_is_trusted(
    foreign, model_folder, text_file, tokenizer, written, capsys
):
    arguments = [foreign, "--data", str(text_file), "--window", "32", "--max_tokens", "1000", "--min_count", "3"]
    assert hmoe_cli.main(["analyze", *arguments]) == 2
    assert "has code of its own: --trust_remote_code runs it" in capsys.readouterr().err
    assert main([*arguments, "--trust_remote_code"]) == 0
    same = AutoModelForCausalLM.from_pretrained(model_folder("hmoe")).eval()
    expected = literal_scores(same, text_file.read_text(encoding="utf-8"), tokenizer, 1000)
    assert scores_of(written[0]) == pytest.approx(expected, rel=1e-4)
    assert f"next-token accuracy {expected['accuracy']:.1%}" in capsys.readouterr().out


def test_adapters_that_do_not_fit_are_refused_with_a_remedy(adapters, model_folder, text_file, tmp_path, capsys):
    hmoe, good = model_folder("hmoe"), ["--data", str(text_file), "--window", "32", "--output_dir", str(tmp_path)]
    for arguments, words in (
        ([adapters[0], *good], "give its base model there, and the adapter as --peft"),
        ([hmoe, *good, "--against", adapters[0]], "not a whole baseline: merge it first"),
        ([hmoe, *good, "--checkpoints", adapters[0]], "give the last adapter of its run as --peft"),
        ([hmoe, *good, "--peft", str(tmp_path)], f"no PEFT adapter of {hmoe} could be loaded"),
        ([model_folder("top_p"), *good, "--peft", adapters[0]], "no PEFT adapter of"),
    ):
        assert hmoe_cli.main(["analyze", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_dense_model_can_be_the_baseline_but_not_the_model(model_folder, text_file, tmp_path, capsys):
    arguments = ["--data", str(text_file), "--window", "32", "--max_tokens", "1000", "--output_dir", str(tmp_path)]
    assert main([model_folder("hmoe"), "--against", model_folder("llama"), *arguments]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["baseline"]["routing"] is None
    assert hmoe_cli.main(["analyze", model_folder("llama"), *arguments]) == 2
    assert "not a mixture of experts" in capsys.readouterr().err


def test_bad_input_is_refused_with_the_value_and_a_remedy(model_folder, text_file, tmp_path, capsys):
    hmoe, good = model_folder("hmoe"), ["--data", str(text_file), "--output_dir", str(tmp_path)]
    short, lines = tmp_path / "short.txt", tmp_path / "lines.jsonl"
    short.write_text("Too short.")
    lines.write_text('{"text": "fine"}\n{"question": "no text"}\n')
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(hmoe).save_pretrained(other)
    train_tokenizer("quite another text with other words " * 50).save_pretrained(other)
    for arguments, words in (
        ([hmoe, "--data", str(short)], "fewer than one window of 128"),
        ([hmoe, "--data", str(lines)], "lines.jsonl, row 2: no text in column 'text'"),
        ([hmoe, "--data", str(tmp_path / "none.txt")], "no such file"),
        ([hmoe, "--data", "table.csv"], "table.csv: no such file"),
        ([hmoe, *good, "--against", str(other)], "different tokenizers"),
        ([hmoe, *good, "--checkpoints", model_folder("top_p"), "--max_tokens", "500"], "one training run"),
        ([hmoe, *good, "--window", "1"], "at least 2"),
        ([hmoe, *good, "--dtype", "float31"], "'float31'"),
        ([str(tmp_path / "nothing"), *good], "nothing: no such file or folder"),
    ):
        assert hmoe_cli.main(["analyze", *arguments]) == 2
        assert words in capsys.readouterr().err
