"""The study's driver runs what its plan asks for, once, and its arms differ in what they are meant to differ in."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from hmoe.costs import model_costs
from hmoe.training.arguments import ModelOptions
from hmoe.training.model import build_config


ROOT = Path(__file__).parents[1]
PLAN = yaml.safe_load((ROOT / "benchmarks" / "study" / "plan.yaml").read_text())


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "study"))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    import run

    yield run
    sys.modules.pop("run")


def costs(study, scale: str, arm: str):
    run = study.Run(scale, 1, arm, "cpu", 1e-3)
    model = study.recipe(PLAN, run, Path("work"))["model"]
    return model_costs(build_config(ModelOptions(**model)))


@pytest.mark.parametrize("scale", PLAN["scales"])
def test_arms_have_the_parameters_that_the_comparison_needs(study, scale):
    twin = costs(study, scale, "moe-top-2")
    experts = sum(map(sum, twin.expert_parameters))
    for arm in PLAN["arms"]:
        found = costs(study, scale, arm)
        share = PLAN["arms"][arm].get("share", 1)
        if arm == "dense":  # as wide as what the twin activates of its experts
            used = twin.activated_parameters([[0.25] * 8] * twin.num_layers) - twin.parts["router"]
            assert found.parameters == pytest.approx(used, rel=1e-3)
        else:
            assert sum(map(sum, found.expert_parameters)) == pytest.approx(share * experts, rel=0.01)


def test_budgets_span_a_factor_of_thirty_and_every_arm_has_three_seeds():
    budgets = [scale["budget"] for scale in PLAN["scales"].values()]
    assert max(budgets) / min(budgets) >= 30 and len(budgets) >= 3
    assert len(PLAN["seeds"]) >= 3 and PLAN["pilot"]["seed"] not in PLAN["seeds"]


def test_missing_runs_are_done_once_and_a_line_tells_losses_at_flops(study, tmp_path, monkeypatch):
    scale = {**PLAN["scales"]["small"], "budget": 2e9, "hidden_size": 32, "num_hidden_layers": 1, "width": 64}
    plan = {
        **PLAN,
        "seeds": [1],
        "scales": {"tiny": {**scale, "num_attention_heads": 1, "eval_steps": 1}},
        "arms": {name: PLAN["arms"][name] for name in ("dense", "moe-top-p")},
        "tokenizer": {"vocab_size": 300},
        "data": {**PLAN["data"], "sequence_length": 32, "max_validation_sequences": 4, "validation_fraction": 0.3},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    work = tmp_path / "work"
    work.mkdir()
    speeches = (
        (ROOT / "examples" / "data" / "state_of_the_union.txt").read_text(encoding="utf-8").split("\n=== ")[1:13]
    )
    rows = [json.dumps({"text": speech[:2000]}) for speech in speeches]
    (work / "text.jsonl").write_text("\n".join(rows) + "\n")
    options = ["--plan", tmp_path / "plan.yaml", "--results", tmp_path / "results.jsonl", "--work_dir", work]
    for expected in (1, 2, 2):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, options), "--most", "1"])
        study.main()
        lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
        assert len(lines) == expected
    assert [line["arm"] for line in lines] == ["dense", "moe-top-p"]
    for line in lines:
        flops = [point["train_flops"] for point in line["curve"]]
        assert flops == sorted(flops) and flops[-1] >= 2e9 > flops[-2]
        assert all(0 < point["loss"] < 10 for point in line["curve"])
    assert not list((work / "runs").glob("*/"))  # what a run left behind is gone
