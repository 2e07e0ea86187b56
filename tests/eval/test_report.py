import base64
import copy
import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hmoe_cli
from hmoe import lora_config
from hmoe.eval.analyze import Settings, analyze, main
from hmoe.eval.loading import Checkpoint, check_same_tokenizer
from hmoe.eval.observe import batches, windows
from hmoe.eval.report import write_report
from hmoe.sources import read_texts

from .conftest import train_tokenizer


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SETTINGS = Settings(window=32, batch_size=4, max_tokens=4000, min_count=3, thresholds=[5, 6, 7], progress=False)
VOID_TAGS = {"meta", "link", "img", "br"}
NUM_FIGURES = 12


class StrictParser(HTMLParser):
    """Fails on unbalanced tags and on any address outside the file."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.headings = 0

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        for name in ("src", "href"):
            assert values.get(name, "data:").startswith("data:"), values[name]
        assert tag != "script"
        if tag == "img":
            assert values["alt"]
            self.images.append(values["src"])
        self.headings += tag == "h2"
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, sample_text) -> Path:
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    path.write_text(sample_text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, model_folder) -> list[str]:
    """Two earlier states of the model `hmoe`: its router and experts moved a little, or a lot."""
    root = tmp_path_factory.mktemp("run")
    folders = []
    for step, scale in ((100, 1.0), (200, 0.2)):
        model = AutoModelForCausalLM.from_pretrained(model_folder("hmoe"))
        for layer in model.model.layers:
            layer.mlp.gate.weight.data.add_(scale * layer.mlp.gate.weight.data.flip(0))
        model.save_pretrained(root / f"checkpoint-{step}")
        folders.append(str(root / f"checkpoint-{step}"))
    return folders


@pytest.fixture(scope="module")
def report(tmp_path_factory, model_folder, text_file, checkpoints) -> tuple[Path, dict]:
    result = analyze(
        model_folder("hmoe"), [text_file], baseline=model_folder("twin"), checkpoints=checkpoints, settings=SETTINGS
    )
    return write_report(result, tmp_path_factory.mktemp("report")), result


def parse(path: Path) -> StrictParser:
    parser = StrictParser()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert not parser.open
    return parser


def test_report_is_one_well_formed_file_with_every_picture_inside(report):
    parser = parse(report[0])
    assert len(parser.images) == NUM_FIGURES
    assert parser.headings == NUM_FIGURES + 1  # and the table of top tokens
    for image in parser.images:
        assert base64.b64decode(image.partition(",")[2], validate=True).startswith(b"\x89PNG")


def test_json_and_csv_hold_the_numbers(report):
    path, result = report
    assert json.loads((path.parent / "report.json").read_text()) == json.loads(json.dumps(result))
    tables = {file.stem: list(csv.DictReader(file.open(encoding="utf-8"))) for file in path.parent.glob("*.csv")}
    assert {"experts", "layers", "sizes", "expert_pairs", "difficult_tokens", "stability"} <= set(tables)
    layer = result["model"]["routing"]["layers"][1]
    rows = [row for row in tables["experts"] if row["model"] == "hmoe" and row["layer"] == "1"]
    assert [float(row["load"]) for row in rows] == layer["load"]
    assert [int(row["size"]) for row in rows] == [24, 8, 32, 16]
    assert len(tables["expert_pairs"]) == 2 * 4 * 4
    assert [row["step"] for row in tables["models"]] == ["", "", "100", "200"]
    assert len(tables["stability"]) == 2 * 2 * 2


def test_names_and_tokens_are_text_in_pictures_html_and_spreadsheets(report, tmp_path):
    """No formula, neither matplotlib's nor a spreadsheet's, and no tag."""
    result = copy.deepcopy(report[1])
    result["model"]["name"], result["baseline"]["name"] = "=1+1", r"$\frac$<b>"
    for run, step in zip(result["checkpoints"], (None, 200, 300)):
        run["step"], run["name"] = step, r"$\frac$"
    result["tokens"]["examples"]["tokens"][:2] = ["$\\frac$", "@é"]
    path = write_report(result, tmp_path)
    assert len(parse(path).images) == NUM_FIGURES
    assert r"baseline $\frac$&lt;b&gt;" in path.read_text(encoding="utf-8")
    models = list(csv.DictReader((tmp_path / "models.csv").open(encoding="utf-8")))
    assert [row["model"] for row in models] == ["'=1+1", r"baseline $\frac$<b>", r"$\frac$", r"$\frac$"]
    tokens = list(csv.DictReader((tmp_path / "example_tokens.csv").open(encoding="utf-8")))
    assert [row["token"] for row in tokens[:2]] == ["$\\frac$", "'@é"]
    assert json.loads((tmp_path / "report.json").read_text())["model"]["name"] == "=1+1"


def test_routes_of_a_checkpoint_closer_to_the_end_agree_more(report):
    early, late = report[1]["stability"]["with_last"]
    for before, after in zip(early["layers"], late["layers"]):
        assert before["saturation"] < after["saturation"] <= 1


def browser_complaints(path: Path, tmp_path: Path) -> list[str]:
    """What a headless Chromium writes to its console when it opens a file."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr
    return re.findall(r"CONSOLE.*", done.stderr)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the report was parsed strictly but not opened")
def test_report_opens_in_a_browser_without_complaints(report, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<!DOCTYPE html><html><body><script>missing()</script></body></html>")
    assert browser_complaints(broken, tmp_path), "the check itself does not see errors"
    assert browser_complaints(report[0], tmp_path) == []


@pytest.mark.parametrize("name", ["top_p", "mixtral", "olmoe"])
def test_other_kinds_of_mixture_are_analysed_alone(name, model_folder, text_file, tmp_path, capsys):
    arguments = [model_folder(name), "--data", str(text_file), "--window", "32", "--max_tokens", "2000"]
    metric = ["--ground_metric", "embedding"] if name == "top_p" else []
    assert main([*arguments, *metric, "--min_count", "3", "--output_dir", str(tmp_path)]) == 0
    assert "parameters activated" in capsys.readouterr().out
    parser = parse(tmp_path / "report.html")
    assert 5 <= len(parser.images) < NUM_FIGURES
    result = json.loads((tmp_path / "report.json").read_text())
    per_token = result["model"]["routing"]["experts_per_token"]
    assert per_token == {"mixtral": 2, "olmoe": 3}.get(name, per_token)
    assert result["baseline"] is None and result["stability"] is None


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


def test_windows_are_cut_from_one_stream_and_documents_end_with_eos(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n\n{"text": "three"}\n')
    (tmp_path / "b.txt").write_text("four\nfive\n" * 300)
    documents = list(read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"], piece=100))
    assert documents[:2] == ["one two", "three"]
    assert len(documents) > 3 and "".join(documents[2:]) == "four\nfive\n" * 300
    expected = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = list(windows(documents, tokenizer, 16))
    assert [token for row in rows for token in row] == expected[: len(expected) // 16 * 16]
    assert len(list(windows(documents, tokenizer, 16, max_tokens=50))) == 3
    assert [len(batch["input_ids"]) for batch in batches(rows[:5], 2)] == [2, 2, 1]


def test_tokenizers_and_steps_are_recognised(tokenizer, tmp_path):
    check_same_tokenizer(tokenizer, copy.deepcopy(tokenizer), ("a", "b"))
    (tmp_path / "trainer_state.json").write_text('{"global_step": 42}')
    assert Checkpoint(str(tmp_path)).step == 42
    assert Checkpoint(str(tmp_path / "hmoe" / "checkpoint-600")).step == 600
    assert Checkpoint(str(tmp_path / "hmoe")).step is None
