import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import hmoe_cli
from hmoe.costs import moe_costs
from hmoe.eval.harness import _names, _parser, _tasks, main
from hmoe.eval.scores import PREFERRED_METRICS, read_evaluation
from hmoe.eval.suites import SUITES_FOLDER


DOCUMENTS = [
    {"question": "The state of the Union is", "answers": ["strong", "a fish", "blue and green"], "label": 0},
    {"question": "We the people", "answers": ["of the United States", "!", "are"], "label": 0},
    {"question": "Congress", "answers": ["shall make no law", "is", "sleeps in the long grass"], "label": 1},
    {"question": "My fellow", "answers": ["Americans", "tables", "of course, and so on"], "label": 0},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture
def own_tasks_only(monkeypatch):
    """lm_eval reads thousands of YAMLs at every start, which takes it seconds; these tests need none of them."""
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    packaged, read = Path(lm_eval.tasks.__file__).parent, TaskIndex._iter_yaml_files
    monkeypatch.setattr(
        TaskIndex, "_iter_yaml_files", staticmethod(lambda root: iter(()) if root == packaged else read(root))
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two small tasks with items of their own: `toy_choice` (scored options) and `toy_text` (generated answers)."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "items.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
    }
    choice = {
        "task": "toy_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    text = {
        "task": "toy_text",
        "output_type": "generate_until",
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, text, {**choice, "task": "local_choice"}):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


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
def test_several_checkpoints_and_tasks_in_one_table_and_in_the_model_cards(model_folder, tasks, tmp_path, capsys):
    folders = [model_folder("hmoe"), model_folder("llama")]
    card = Path(folders[1], "README.md")
    card.write_text("---\nlicense: mit\n---\n\n# A model\n\nKept.\n")
    arguments = [*folders, "--tasks", "toy_choice", "toy_text", "--include_path", str(tasks), "--model_card"]
    for _ in range(2):
        assert main([*arguments, "--output_dir", str(tmp_path), "--batch_size", "4", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "results.md").read_text()
    assert table in printed
    moe, dense = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert [score["task"] for score in moe["scores"]] == ["toy_choice", "toy_text"]
    assert moe["average"] == pytest.approx((moe["scores"][0]["value"] + moe["scores"][1]["value"]) / 2)
    assert moe["activated_parameters"] < moe["parameters"]
    assert dense["activated_parameters"] == dense["parameters"] and dense["activated_ratio"] is None
    text = card.read_text()
    assert "license: mit" in text and "Kept." in text and "model-index" in text
    assert text.count("## Evaluation") == 1


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


@pytest.fixture(scope="module")
def suites():
    """The tasks of both suites as lm_eval's own registry resolves them, by suite and name: their configs. Their items
    are on the Hub."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._factory import TaskFactory

    configs: dict[str, dict] = {}

    class Built:
        def __init__(self, name):
            self.task_name = name

    def record(self, entry, overrides):
        configs[entry.name] = self._load_full_config(entry, overrides)
        return Built(entry.name)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskFactory, "_build_task", record)
        manager = TaskManager(include_path=str(SUITES_FOLDER))
        for suite in ("hmoe", "modse"):
            configs = {}
            manager.load([suite])
            found[suite] = configs
    return found


def test_suites_name_the_papers_benchmarks_with_their_shots(suites):
    assert {name: config["num_fewshot"] for name, config in suites["hmoe"].items()} == dict.fromkeys(
        ("arc_easy", "boolq", "hellaswag", "piqa", "social_iqa", "winogrande"), 0
    )
    shots = {name: config["num_fewshot"] for name, config in suites["modse"].items()}
    assert shots.pop("gsm8k") == 8
    assert set(shots.values()) == {5}
    assert {"lambada_openai", "triviaqa", "piqa", "social_iqa"} <= set(shots)
    assert sum(name.startswith("mmlu_") for name in shots) == 57
    assert sum(name.startswith("agieval_") for name in shots) == 21
    assert sum(name.startswith("hendrycks_math_") for name in shots) == 7


def test_every_task_of_the_suites_has_the_papers_metric_and_joins_the_average(suites):
    """Accuracy or exact match; lm_eval calls LAMBADA's exact match of the greedy answer `acc`."""
    exact = ("gsm8k", "hendrycks_math_", "triviaqa")
    for name, config in {**suites["hmoe"], **suites["modse"]}.items():
        reported = [metric["metric"] for metric in config["metric_list"]]
        score = next(metric for metric in PREFERRED_METRICS if metric in reported)
        assert score == ("exact_match" if name.startswith(exact) else "acc"), name


def test_shots_come_from_other_items_than_the_scored_ones_where_there_are_any(suites):
    """As docs/evaluation.md says: AGIEval and LAMBADA have one split alone, from which the scored item is left out."""
    alone = set()
    for name, config in suites["modse"].items():
        others = [config.get(f"{split}_split") for split in ("fewshot", "training", "validation")]
        scored = config.get("test_split") or config.get("validation_split")
        if not any(other and other != scored for other in others):
            alone.add(name.partition("_")[0])
    assert alone == {"agieval", "lambada"}


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "checkpoint-600", tmp_path / "b" / "checkpoint-600"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert _names([*map(str, folders), "owner/name"]) == ["a/checkpoint-600", "b/checkpoint-600", "owner/name"]
    assert _names([str(folders[0])]) == ["checkpoint-600"]


def test_a_suite_reads_as_its_members_with_average_and_error():
    results = {
        "results": {
            "hmoe": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "hmoe"},
            "piqa": {"acc,none": 0.6, "acc_stderr,none": 0.03, "acc_norm,none": 0.7, "alias": "piqa"},
            "boolq": {"acc,none": 0.4, "acc_stderr,none": 0.04, "alias": "boolq"},
            "wikitext": {"word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A", "alias": "wikitext"},
        },
        "group_subtasks": {"hmoe": ["piqa", "boolq"]},
        "higher_is_better": {"wikitext": {"word_perplexity": False}},
        "n-shot": {"piqa": 0, "boolq": 0, "wikitext": 0},
        "n-samples": {"piqa": {"effective": 10}},
        "config": {"model_num_parameters": 1000, "routing": None, "is_moe": False},
    }
    evaluation = read_evaluation("m", results)
    assert [score.task for score in evaluation.scores] == ["piqa", "boolq", "wikitext"]
    assert evaluation.average == pytest.approx(0.5)
    assert evaluation.average_stderr == pytest.approx(0.025)
    assert not evaluation.scores[2].averaged
    results["results"]["both"] = {" ": " ", "alias": "both"}  # a group that aggregates nothing
    results["group_subtasks"] = {"both": ["piqa", "boolq"]}
    del results["results"]["hmoe"]
    assert sorted(score.task for score in read_evaluation("m", results).scores) == ["boolq", "piqa", "wikitext"]


def test_offline_items_stand_in_for_the_members_of_a_suite_that_have_them(tmp_path, capsys):
    for name in ("boolq", "copa", "piqa"):
        (tmp_path / f"{name}.yaml").touch()
    options = ["--suite", "hmoe", "--tasks", "local_copa", "piqa", "--offline_items", str(tmp_path)]
    assert _tasks(_parser().parse_args(options)) == (["local_piqa", "local_boolq", "local_copa"], tmp_path)
    assert "left out: hellaswag, arc_easy, winogrande, social_iqa" in capsys.readouterr().err


@pytest.mark.usefixtures("own_tasks_only")
def test_bad_input_is_refused_with_the_value_and_a_remedy(model_folder, tasks, tmp_path, capsys):
    folder = model_folder("hmoe")
    include = ["--include_path", str(tasks)]
    for arguments, words in (
        ([folder], "--suite (hmoe, modse)"),
        ([folder, "--tasks", "toy_choise", *include], "did you mean `toy_choice`"),
        (["./nothing", "--tasks", "toy_choice"], "./nothing: no such file or folder"),
        ([str(tmp_path), "--tasks", "toy_choice"], "no config.json"),
        ([folder, "--tasks", "choise", "--offline_items", str(tasks)], "did you mean local_choice"),
        ([folder, "--tasks", "piqa", "--offline_items"], "`python examples/offline_items.py FOLDER`"),
        ([folder, "--suite", "hmoe", "--offline_items", str(tmp_path)], "`python examples/offline_items.py FOLDER`"),
        ([folder, "--suite", "hmoe", "--offline_items", str(tasks)], "no task of the suite hmoe"),
        ([folder, "--suite", "hmoe", *include], "--tasks FILE.yaml"),
        ([folder, "--suite", "hmoe", "--output_path", "x"], "use --output_dir"),
        (["owner/name", "--suite", "hmoe", "--model_card"], "download it first"),
    ):
        assert hmoe_cli.main(["evaluate", *arguments]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--suite", "hmoe"])
    assert "before the options" in capsys.readouterr().err


@pytest.mark.usefixtures("own_tasks_only")
def test_without_the_hub_the_offline_items_are_named(model_folder, tmp_path, capsys, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    task = {
        "task": "far",
        "dataset_path": "nobody/nothing",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "",
    }
    (tmp_path / "far.yaml").write_text(
        yaml.safe_dump({**task, "output_type": "multiple_choice", "doc_to_choice": "x"})
    )
    arguments = [model_folder("hmoe"), "--tasks", str(tmp_path / "far.yaml"), "--device", "cpu"]
    assert hmoe_cli.main(["evaluate", *arguments]) == 2
    assert (
        "Couldn't reach 'nobody/nothing' on the Hub. `python examples/offline_items.py FOLDER`"
        in capsys.readouterr().err
    )


def _run(command: list[str], tmp_path: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_plain_lm_eval_runs_a_checkpoint_as_remote_code(model_folder, tasks, tmp_path):
    arguments = f"pretrained={model_folder('hmoe')},trust_remote_code=True"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    assert "toy_choice" in _run([*command, "--include_path", str(tasks), "--tasks", "toy_choice"], tmp_path)


@pytest.mark.slow
def test_data_parallel_evaluation_gives_the_scores_of_one_process(model_folder, tasks, tmp_path):
    arguments = [model_folder("hmoe"), "--tasks", str(tasks / "toy_choice.yaml"), "--batch_size", "2"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
    scores = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        _run([*launch, str(ranks), "-m", "hmoe.eval.harness", *arguments, "--output_dir", str(output)], tmp_path)
        (evaluation,) = json.loads((output / "results.json").read_text())["evaluations"]
        scores.append(evaluation["scores"][0]["value"])
    assert scores[0] == scores[1]
