import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import SIZES, tiny_trainer


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_holds_every_log_with_its_step_and_load(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    trainer.evaluate()
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 4]
    assert lines[3]["lm_loss"] == trainer.state.log_history[3]["lm_loss"]
    assert [len(row) for row in lines[0]["load"]] == [len(SIZES)] * 2
    assert "eval_perplexity" in lines[5] and "load" not in lines[5]


def test_a_resumed_run_has_each_step_once_even_after_a_torn_line(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=5).train()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    tiny_trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    steps = [line["step"] for line in lines_of(path) if "lm_loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_file_of_another_run_is_moved_aside_not_overwritten(tmp_path):
    tiny_trainer(tmp_path, max_steps=1).train()
    first = (tmp_path / "metrics.jsonl").read_text()
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.evaluate()
    trainer.train()
    assert (tmp_path / "metrics.1.jsonl").read_text() == first
    lines = lines_of(tmp_path / "metrics.jsonl")
    assert "eval_loss" in lines[0] and [line["step"] for line in lines] == [0, 1, 1]


def test_tensorboard_gets_router_scalars_and_heat_maps_of_load(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = tiny_trainer(tmp_path, report_to="tensorboard", router_heat_maps=True)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert {"train/lm_loss", "train/dead_experts", "train/activated_parameters"} <= set(events.Tags()["scalars"])
    pictures = events.Images("router/load_by_layer_and_expert")
    assert [picture.step for picture in pictures] == [1, 2, 3, 4]
    assert min(pictures[0].width, pictures[0].height) > 100
