import base64
import copy
import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hmoe.eval.analyze import Settings, analyze, main
from hmoe.eval.report import write_report


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
