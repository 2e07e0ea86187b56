"""`hmoe train` on two processes: the loss curve of one, checkpoints for any number of ranks, and a rank that dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from ranks import find_port, finish, start_command
from safetensors.torch import load_file

import hmoe_cli
from hmoe.training.checkpointing import find_last_complete_checkpoint
from hmoe.training.command import main


ROOT = Path(__file__).parents[2]
NUM_STEPS, SAVED_STEP, BATCH = 6, 3, 8
# Accelerate takes tensor-parallel models on accelerators only.
LAYOUTS = {
    "ddp": {},
    "fsdp": {"fsdp_size": 2},
    "ep_on_fsdp": {"fsdp_size": 2, "ep_size": 2},
}
# Where a run goes on: layout and number of ranks.
RESUMES = [
    ("ep_on_fsdp", "ep_on_fsdp"),
    ("ep_on_fsdp", "one"),
    ("one", "ep_on_fsdp"),
    ("fsdp", "ddp"),
    ("ddp", "one"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    (path / "text.txt").write_text((ROOT / "examples/data/state_of_the_union.txt").read_text()[:60_000])
    model_config = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "expert_intermediate_sizes": [72, 8, 64, 16, 48, 32, 40, 40],
        # Router losses are not linear in the batch: only with the global batch are they those of one process.
        "router_loss_scope": "global_batch",
        "router_entropy_loss_coef": 0.03,
    }
    recipe = {
        "preset": "hmoe-0.4b",
        "model_config": model_config,
        "train_tokenizer": 300,
        "dataset": [str(path / "text.txt")],
        "data_cache_dir": str(path / "cache"),
        "sequence_length": 32,
        "max_steps": NUM_STEPS,
        "learning_rate": 3e-3,
        "max_grad_norm": 0.5,
        "seed": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVED_STEP,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


def arguments(folder: Path, name: str, layout: str) -> tuple[int, list[str]]:
    """Number of ranks, and the command line of a run in the folder `name`."""
    num_ranks = 1 if layout == "one" else 2
    argv = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / name)]
    argv += ["--per_device_train_batch_size", str(BATCH // num_ranks)]
    for field, size in LAYOUTS.get(layout, {}).items():
        argv += [f"--distributed.{field}", str(size)]
    return num_ranks, argv


def train(folder: Path, name: str, layout: str) -> None:
    num_ranks, argv = arguments(folder, name, layout)
    codes = finish(start_command(num_ranks, main, argv, folder / name))
    logs = "\n".join(path.read_text() for path in folder.glob(f"{name}.*.log"))
    assert codes == [0] * num_ranks, logs[-3000:]


def curve(folder: Path, name: str) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


def assert_same_run(folder: Path, name: str, expected: str) -> None:
    found, wanted = curve(folder, name), curve(folder, expected)
    assert found.keys() == wanted.keys() == set(range(1, NUM_STEPS + 1))
    for step, values in wanted.items():
        assert found[step] == pytest.approx(values, rel=2e-5), step
    weights, expected_weights = (load_file(folder / run / "model.safetensors") for run in (name, expected))
    for key, tensor in expected_weights.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    train(folder, "one", "one")
    for layout in LAYOUTS:
        train(folder, layout, layout)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one_with_router_losses_and_clipping(runs, layout):
    assert all(norm > 0.5 for _, norm in curve(runs, "one").values())  # every step is clipped
    assert_same_run(runs, layout, "one")


@pytest.mark.parametrize("before, after", RESUMES, ids=lambda layout: layout)
def test_a_run_goes_on_with_other_ranks_as_if_it_had_not_stopped(runs, before, after):
    name = f"{before}-then-{after}"
    shutil.copytree(runs / before, runs / name)
    shutil.rmtree(runs / name / f"checkpoint-{NUM_STEPS}")
    (runs / name / "model.safetensors").unlink()
    train(runs, name, after)
    assert_same_run(runs, name, "one")


def test_optimizer_states_of_sharded_runs_are_those_of_one_process(runs):
    expected = torch.load(runs / "one" / f"checkpoint-{SAVED_STEP}" / "optimizer.pt", weights_only=True)
    for layout in ("fsdp", "ep_on_fsdp"):
        found = torch.load(runs / layout / f"checkpoint-{SAVED_STEP}" / "optimizer.pt", weights_only=True)
        for group, wanted in zip(found["param_groups"], expected["param_groups"], strict=True):
            assert group["params"] == wanted["params"]
            assert group["weight_decay"] == wanted["weight_decay"]
        assert found["state"].keys() == expected["state"].keys()
        for index, state in expected["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(found["state"][index][key], value, rtol=1e-4, atol=1e-7)


def test_a_rank_that_dies_ends_the_run_and_leaves_its_last_checkpoint(folder, tmp_path):
    _, argv = arguments(folder, "died", "ep_on_fsdp")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(find_port()),
    ]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            [*command, "-m", "hmoe.training", *argv, "--max_steps", "100000"],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(folder / "died" / f"checkpoint-{SAVED_STEP}", launcher)
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        os.kill(ranks[-1].pid, signal.SIGKILL)
        assert launcher.wait(timeout=90) != 0
        assert not any(rank.is_running() for rank in ranks)
    finally:
        launcher.kill()
    checkpoint = find_last_complete_checkpoint(str(folder / "died"))
    assert checkpoint is not None
    last_step = int(checkpoint.rpartition("-")[2]) + 1
    _, argv = arguments(folder, "died", "one")
    assert finish(start_command(1, main, [*argv, "--max_steps", str(last_step)], folder / "died")) == [0]
    assert max(curve(folder, "died")) == last_step


def wait_for(path: Path, launcher: subprocess.Popen, timeout: float = 180) -> None:
    end = time.monotonic() + timeout
    while not path.exists():
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.2)


def test_sizes_that_do_not_make_the_number_of_processes_are_refused(folder):
    num_ranks, argv = arguments(folder, "refused", "ddp")
    argv = ["train", *argv, "--distributed.fsdp_size", "4"]
    codes = finish(start_command(num_ranks, hmoe_cli.main, argv, folder / "refused"))
    assert codes == [2, 2]
    assert "is 4, but 2 processes run" in (folder / "refused.0.log").read_text()


def launch(config: str, program: list[str], argv: list[str]) -> None:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", f"examples/accelerate/{config}", "--num_processes", "2", "--mixed_precision", "no"]
    command += ["--main_process_port", str(find_port()), *program, *argv]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})


def test_accelerate_launch_trains_as_one_process(runs):
    launch("ddp.yaml", ["-m", "hmoe.training"], arguments(runs, "launched", "ddp")[1])
    assert_same_run(runs, "launched", "one")


def test_accelerates_fsdp2_trains_as_one_process_saves_its_files_and_resumes(runs):
    program = [str(Path(__file__).with_name("accelerator_on_cpu.py"))]
    argv = arguments(runs, "fsdp2", "ddp")[1]
    launch("fsdp2.yaml", program, argv)
    assert (runs / "fsdp2" / f"checkpoint-{SAVED_STEP}" / "pytorch_model_fsdp.bin").exists()  # it was not DDP
    assert_same_run(runs, "fsdp2", "one")
    for file in ("config.json", "modeling_hmoe.py"):
        assert (runs / "fsdp2" / file).read_text() == (runs / "one" / file).read_text()
    shutil.rmtree(runs / "fsdp2" / f"checkpoint-{NUM_STEPS}")
    launch("fsdp2.yaml", program, argv)
    assert_same_run(runs, "fsdp2", "one")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_trains_as_one_process(runs, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    # ZeRO-3 draws fresh weights part by part: both start from a checkpoint.
    argv = {}
    for name, layout in ((f"one-{stage}", "one"), (stage, "ddp")):
        argv[layout] = [*arguments(runs, name, layout)[1], "--model_name_or_path", str(runs / "one")]
    recipe = yaml.safe_load((runs / "recipe.yaml").read_text())
    for field in ("preset", "model_config", "train_tokenizer"):
        del recipe[field]
    (runs / "continue.yaml").write_text(yaml.safe_dump(recipe))
    for words in argv.values():
        words[words.index("--config") + 1] = str(runs / "continue.yaml")
    assert finish(start_command(1, main, argv["one"], runs / f"one-{stage}")) == [0]
    launch(f"{stage}.yaml", [str(Path(__file__).with_name("accelerator_on_cpu.py"))], argv["ddp"])
    assert_same_run(runs, stage, f"one-{stage}")
