"""Checkpoints of every kind that hmoe 0.1.0 wrote load, answer the same, resume, and are saved again as they were.

tests/fixtures/make_checkpoints.py says how they were made.
"""

import json
import os
import pickletools
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from recorded import (
    ADAPTERS,
    AUTO_CLASSES,
    CHECKPOINTS,
    EXPECTED,
    RUN,
    TRAINED,
    expected_file,
    names_of_logs,
    outputs_of,
)
from safetensors.torch import load_file
from without_hmoe import run_without_hmoe

import hmoe
from hmoe.cli import main


# Of the largest value: float32 rounds to 6e-8, and another processor adds up sums of up to 64 terms, through two
# layers, in another order.
FLOAT32_BOUND = 1e-5
# Rounding to 2^-8 after each of the about twenty operations that stand in a row, at worst half of it each time.
BFLOAT16_BOUND = 10 * 2**-8
# Measured with other vector instructions: losses 1e-7, weights 1e-5 of the way they went. Adam divides a gradient by
# its own size, so the rounding of gradients near zero moves weights more than losses.
RESUMED_LOSS_BOUND = 1e-5
RESUMED_WEIGHTS_BOUND = 1e-3

checkpoints = pytest.mark.parametrize("name", AUTO_CLASSES, ids=lambda name: name.split("/")[0])


def load(name: str, **options) -> torch.nn.Module:
    return getattr(transformers, AUTO_CLASSES[name]).from_pretrained(CHECKPOINTS / name, **options)


def assert_same_outputs(model: torch.nn.Module, name: str, bound: float = FLOAT32_BOUND) -> None:
    expected = load_file(expected_file(name))
    found = outputs_of(model, expected.pop("input_ids"))
    assert found.keys() >= expected.keys()
    for key, tensor in expected.items():
        difference = (found[key] - tensor).abs().max()
        assert difference <= bound * tensor.abs().max(), f"{key} differs by {difference:.1e}"


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@checkpoints
def test_an_old_checkpoint_gives_its_outputs_and_losses(name):
    model = load(name, dtype=torch.float32)
    assert type(model).__module__ == "hmoe.modeling_hmoe"
    assert_same_outputs(model, name)


def test_an_old_bfloat16_checkpoint_stays_bfloat16():
    model = load("bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_same_outputs(model, "bfloat16", BFLOAT16_BOUND)


@checkpoints
def test_an_old_checkpoint_saved_again_keeps_tensors_and_config_fields(name, tmp_path):
    load(name).save_pretrained(tmp_path)
    old, new = read_tensors(CHECKPOINTS / name), read_tensors(tmp_path)
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert new[key].dtype == tensor.dtype and torch.equal(new[key], tensor), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (CHECKPOINTS / name, tmp_path))
    del old["transformers_version"]
    assert {field: new.get(field, "is missing") for field in old} == old


def test_old_shards_become_one_file_and_shards_again(tmp_path):
    model = load("sharded")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    old, new = (
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for folder in (CHECKPOINTS / "sharded", tmp_path)
    )
    assert len(set(old.values())) > 1 and len(set(new.values())) > 1
    assert old.keys() == new.keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_old_adapter_gives_its_outputs_on_its_base(name):
    base = json.loads((CHECKPOINTS / name / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert_same_outputs(peft.PeftModel.from_pretrained(load(base), CHECKPOINTS / name), name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_old_adapter_finds_its_base_by_the_names_it_holds(name, monkeypatch):
    """The one without a task names `HMoEForCausalLM` of the module `hmoe.modeling_hmoe`."""
    monkeypatch.chdir(CHECKPOINTS)
    if name == "lora":
        model = peft.AutoPeftModelForCausalLM.from_pretrained(name)
    else:
        model = peft.AutoPeftModel.from_pretrained(name, import_allowlist=["hmoe.modeling_hmoe"])
    assert type(model.get_base_model()) is hmoe.HMoEForCausalLM
    assert_same_outputs(model, name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_old_adapter_saved_again_keeps_its_tensors(name, tmp_path):
    peft.PeftModel.from_pretrained(load("top_k"), CHECKPOINTS / name).save_pretrained(tmp_path)
    old, new = read_tensors(CHECKPOINTS / name), read_tensors(tmp_path)
    assert old.keys() == new.keys()
    assert all(torch.equal(new[key], tensor) for key, tensor in old.items())


class Resumed:
    """A copy of the old run, with `hmoe train` given the run's own recipe once more.

    Attributes:
        output: its `output_dir`.
        unpickled: names of the files that `torch.load` opened.
    """

    def __init__(self, root: Path):
        shutil.copytree(RUN, root, dirs_exist_ok=True)
        self.output = root / "output"
        self.unpickled = []
        plain_load = torch.load

        def noting_load(file, *args, **kwargs):
            self.unpickled.append(Path(file).name)
            return plain_load(file, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(root / "cache"))
            patch.setattr(torch, "load", noting_load)
            assert main(["train", "--config", "output/recipe.yaml"]) == 0
        self.history = json.loads((self.output / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Resumed:
    return Resumed(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run_record() -> dict:
    return json.loads((EXPECTED / "run.json").read_text())


def test_an_old_run_resumes_at_its_checkpoint_and_reaches_the_losses_of_the_run_that_never_stopped(
    resumed, run_record
):
    # With the times of the old run, which no new one has.
    old = json.loads((CHECKPOINTS / TRAINED / "trainer_state.json").read_text())["log_history"]
    assert resumed.history[: len(old)] == old
    steps = [entry for entry in resumed.history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert [entry["loss"] for entry in steps] == pytest.approx(run_record["losses"], rel=RESUMED_LOSS_BOUND)
    assert [entry["lm_loss"] for entry in steps] == pytest.approx(run_record["lm_losses"], rel=RESUMED_LOSS_BOUND)
    eval_losses = [entry["eval_loss"] for entry in resumed.history if "eval_loss" in entry]
    assert eval_losses == pytest.approx(run_record["eval_losses"], rel=RESUMED_LOSS_BOUND)


def test_an_old_run_resumed_ends_with_the_weights_of_the_run_that_never_stopped(resumed):
    start = load_file(CHECKPOINTS / TRAINED / "model.safetensors")
    expected, found = load_file(EXPECTED / "run_end.safetensors"), load_file(resumed.output / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        travelled = (tensor - start[name]).norm()
        assert (found[name] - tensor).norm() <= RESUMED_WEIGHTS_BOUND * travelled, name


def test_an_old_run_resumed_goes_on_counting_tokens_and_flops(resumed):
    """Budgets are kept under the name of their callback class."""
    state = json.loads((resumed.output / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["BudgetCallback"]["attributes"]["tokens"] == 6 * 2 * 2 * 32
    assert state["num_input_tokens_seen"] == 6 * 2 * 2 * 32
    lines = [json.loads(line) for line in (resumed.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_resuming_an_old_run_unpickles_no_arguments(resumed):
    """So the class that `training_args.bin` names may move; the run's recipe and command line say what it was told."""
    assert set(resumed.unpickled) == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_an_old_run_names_the_modules_of_hmoe_in_its_pickled_arguments_alone():
    named = {}
    for path in RUN.rglob("*"):
        if path.suffix in (".bin", ".pt", ".pth"):
            with zipfile.ZipFile(path) as archive:
                (entry,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                operations = list(pickletools.genops(archive.read(entry)))
            named[path.name] = {str(value) for _, value, _ in operations if re.match(r"hmoe\b", str(value))}
    assert named == {
        "training_args.bin": {"hmoe.training.arguments HMoETrainingArguments"},
        "optimizer.pt": set(),
        "scheduler.pt": set(),
        "rng_state.pth": set(),
    }


def test_a_run_logs_all_that_it_logged(resumed, run_record):
    found = names_of_logs(resumed.output)
    lost = {kind: sorted(set(names) - set(found[kind])) for kind, names in run_record["names"].items()}
    assert not any(lost.values()), lost


OLD_CODE = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, expected, answers, resaved = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    save_file({"logits": model(load_file(expected)["input_ids"]).logits}, answers)
model.save_pretrained(resaved)
assert "hmoe" not in sys.modules
"""


def test_old_code_runs_without_the_package_and_what_it_saves_loads_with_it(tmp_path):
    answers, resaved = tmp_path / "answers.safetensors", tmp_path / "resaved"
    run_without_hmoe(OLD_CODE, CHECKPOINTS / TRAINED, expected_file(TRAINED), answers, resaved, home=tmp_path / "home")
    expected, found = load_file(expected_file(TRAINED))["logits"], load_file(answers)["logits"]
    assert (found - expected).abs().max() <= FLOAT32_BOUND * expected.abs().max()
    assert_same_outputs(hmoe.HMoEForCausalLM.from_pretrained(resaved), TRAINED)


OLD_AND_NEW_CODE = """
import json
import sys

import torch
from recorded import CHECKPOINTS, TRAINED, expected_file, outputs_of
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hmoe

folder, new_first, answers = CHECKPOINTS / TRAINED, sys.argv[1] == "new_first", sys.argv[2]
input_ids = load_file(expected_file(TRAINED))["input_ids"]
loaders = {
    "new": lambda: hmoe.HMoEForCausalLM,
    "old": lambda: get_class_from_dynamic_module("modeling_hmoe.HMoEForCausalLM", folder),
}
found = {}
classes = {name: loaders[name]() for name in sorted(loaders, reverse=not new_first)}
assert len(set(classes.values())) == 2
for name, model_class in classes.items():
    model = model_class.from_pretrained(folder)
    for key, value in outputs_of(model, input_ids).items():
        found[f"{name}/{key}"] = value
    model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    found[f"{name}/gradient"] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
save_file(found, answers)
"""


@pytest.mark.parametrize("order", ["new_first", "old_first"])
def test_old_code_and_the_package_share_one_process(order, tmp_path):
    tests = Path(__file__).parent
    answers = tmp_path / "answers.safetensors"
    process = subprocess.run(
        [sys.executable, "-c", OLD_AND_NEW_CODE, order, answers],
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    expected, found = load_file(expected_file(TRAINED)), load_file(answers)
    del expected["input_ids"]
    for name in ("old", "new"):
        for key, tensor in expected.items():
            assert (found[f"{name}/{key}"] - tensor).abs().max() <= FLOAT32_BOUND * tensor.abs().max(), (name, key)
    old, new = found["old/gradient"], found["new/gradient"]
    assert (old - new).abs().max() <= FLOAT32_BOUND * old.abs().max()
