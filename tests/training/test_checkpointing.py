import json
import random
import time
from pathlib import Path

import crash_runs
import pytest
from tiny_training import tiny_trainer

from hmoe.training.checkpointing import (
    MANIFEST,
    CheckpointError,
    clear_staging,
    describe_damage,
    find_last_complete_checkpoint,
    list_checkpoints,
)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    """The weights of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert crash_runs.finish(crash_runs.start(crash_runs.train, folder)) == 0
    return (folder / "finished").read_text()


def resume(folder: Path, **kwargs) -> str:
    assert crash_runs.finish(crash_runs.start(crash_runs.train, folder, **kwargs)) == 0
    return (folder / "finished").read_text()


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().splitlines()[:-1]):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was never logged")


def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_never_killed(tmp_path, expected):
    moments = random.Random(0)
    # Somewhere after a random step, not after a random time: a run may be quicker than any time chosen here.
    for step in sorted(moments.sample(range(1, 9), 5)):
        (process,) = crash_runs.start(crash_runs.train, tmp_path)
        wait_for_step(tmp_path, step)
        process.join(moments.uniform(0, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -9
        found = find_last_complete_checkpoint(tmp_path)
        assert found is None or found == str(list_checkpoints(tmp_path)[-1])
    assert resume(tmp_path) == expected


def test_killed_at_every_moment_of_a_save_the_next_start_goes_on_from_the_newest_complete_one(tmp_path, expected):
    newest = {"while an old checkpoint is deleted": 6}
    for moment in crash_runs.MOMENTS:
        assert crash_runs.finish(crash_runs.start(crash_runs.train, tmp_path, kill_at=moment)) == -9, moment
        found = find_last_complete_checkpoint(tmp_path)
        assert found == str(tmp_path / f"checkpoint-{newest.get(moment, 2)}"), moment
    assert resume(tmp_path) == expected
    assert not list(tmp_path.glob("tmp-*"))


def test_killed_after_the_last_checkpoint_the_next_start_trains_no_further(tmp_path, expected):
    assert resume(tmp_path) == expected
    (tmp_path / "finished").unlink()
    assert resume(tmp_path) == expected


def test_sigterm_saves_the_step_at_hand_and_exits_with_143(tmp_path, expected):
    (process,) = crash_runs.start(crash_runs.train, tmp_path, save_steps=1000)
    wait_for_step(tmp_path, 3)
    process.terminate()
    assert crash_runs.finish([process]) == 143
    (checkpoint,) = list_checkpoints(tmp_path)
    assert describe_damage(checkpoint) is None
    assert not (tmp_path / "finished").exists()
    assert resume(tmp_path) == expected


def test_sigterm_with_a_limit_of_one_keeps_the_last_checkpoint_beside_the_best(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 10.0}
    (process,) = crash_runs.start(crash_runs.train, tmp_path, save_total_limit=1, **best)
    wait_for_step(tmp_path, 7)
    process.terminate()
    assert crash_runs.finish([process]) == 143
    last = list_checkpoints(tmp_path)[-1]
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] != str(last) and Path(state["best_model_checkpoint"]).exists()


def test_two_ranks_one_of_them_signalled_stop_together_and_resume_to_the_same_weights(tmp_path):
    def ranks(folder, **kwargs):
        return crash_runs.start(crash_runs.train, folder, ranks=2, ddp_backend="gloo", **kwargs)

    assert crash_runs.finish(ranks(tmp_path / "whole")) == 0
    processes = ranks(tmp_path / "cut")
    wait_for_step(tmp_path / "cut", 5)
    processes[1].terminate()
    assert crash_runs.finish(processes) == 143
    assert processes[1].exitcode == 143
    assert crash_runs.finish(ranks(tmp_path / "cut")) == 0
    assert (tmp_path / "cut" / "finished").read_text() == (tmp_path / "whole" / "finished").read_text()


def test_a_full_disk_is_a_clear_error_and_costs_no_earlier_checkpoint(tmp_path, expected):
    run, message = tmp_path / "run", tmp_path / "message"
    limit = {"max_file_size": 20_000, "error_file": message}
    assert crash_runs.finish(crash_runs.start(crash_runs.train, run, **limit)) == 1
    text = message.read_text()
    assert "checkpoint-6" in text and "Earlier checkpoints are untouched" in text and "MiB free" in text
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    assert all(describe_damage(path) is None for path in list_checkpoints(run))
    assert not list(run.glob("tmp-*"))
    assert resume(run) == expected


DAMAGE = {
    "truncated weights": ("model.safetensors", lambda data: data[: len(data) // 2]),
    "truncated optimizer": ("optimizer.pt", lambda data: data[:-1]),
    "empty random state": ("rng_state.pth", lambda data: b""),
    "flipped byte": ("model.safetensors", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
    "truncated manifest": (MANIFEST, lambda data: data[:40]),
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    trainer = tiny_trainer(folder, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, finished_run, caplog, damage):
    name, spoil = DAMAGE[damage]
    copy(finished_run, tmp_path)
    path = tmp_path / "checkpoint-4" / name
    path.write_bytes(spoil(path.read_bytes()))
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert name in caplog.text and "checkpoint-4" in caplog.text
    trainer = tiny_trainer(tmp_path)
    trainer.train(resume_from_checkpoint="auto")
    assert [entry["step"] for entry in trainer.state.log_history if "lm_loss" in entry] == [1, 2, 3, 4]


def copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            new = target / path.relative_to(source)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(path.read_bytes())


def test_a_missing_file_is_damage(tmp_path, finished_run):
    copy(finished_run, tmp_path)
    (tmp_path / "checkpoint-4" / "scheduler.pt").unlink()
    assert describe_damage(tmp_path / "checkpoint-4") == "scheduler.pt is missing"


def test_asking_for_a_damaged_checkpoint_by_name_is_an_error(tmp_path, finished_run):
    copy(finished_run, tmp_path)
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is damaged: optimizer.pt has 0 of \d+ bytes"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_with_nothing_but_damaged_checkpoints_no_run_starts_over_unasked(tmp_path, finished_run):
    copy(finished_run, tmp_path)
    for number in (2, 4):
        (tmp_path / f"checkpoint-{number}" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint="auto")


def test_resuming_from_an_empty_folder_is_an_error_unless_automatic(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)
    tiny_trainer(tmp_path, max_steps=1).train(resume_from_checkpoint="auto")


def test_an_unwritable_folder_is_refused_before_any_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        tiny_trainer(tmp_path / "file" / "run")


def test_a_broken_newer_checkpoint_never_costs_the_complete_one_just_saved(tmp_path, finished_run):
    copy(finished_run, tmp_path)
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    trainer = tiny_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, save_total_limit=1)
    trainer.train(resume_from_checkpoint="auto")
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_complete_save_that_died_before_its_rename_is_taken_up(tmp_path, finished_run):
    copy(finished_run, tmp_path)
    (tmp_path / "checkpoint-4").rename(tmp_path / "tmp-checkpoint-4")
    (tmp_path / "tmp-checkpoint-9").mkdir()
    (tmp_path / "tmp-notes").mkdir()
    clear_staging(tmp_path)
    assert find_last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert {path.name for path in tmp_path.glob("tmp-*")} == {"tmp-notes"}
