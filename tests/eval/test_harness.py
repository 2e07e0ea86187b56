import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hmoe_cli
from hmoe.eval.harness import _names, _parser, _tasks, main


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


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "checkpoint-600", tmp_path / "b" / "checkpoint-600"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert _names([*map(str, folders), "owner/name"]) == ["a/checkpoint-600", "b/checkpoint-600", "owner/name"]
    assert _names([str(folders[0])]) == ["checkpoint-600"]


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
        ([folder, "--tasks", "choise", "--offline_items", str(tasks)], "did you mean `local_choice`"),
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
