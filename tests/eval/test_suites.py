import pytest

from hmoe.eval.scores import PREFERRED_METRICS
from hmoe.eval.suites import SUITES_FOLDER


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
