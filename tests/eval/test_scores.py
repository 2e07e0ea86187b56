import pytest

from hmoe.eval.scores import read_evaluation


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
