"""Results of lm_eval as one table for several checkpoints, as JSON, as Markdown and in model cards."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from hmoe.costs import abbreviated

from .suites import SUITES


# Of the metrics that a task reports, the first of these is its score; other tasks show their own first metric.
PREFERRED_METRICS = ("acc", "exact_match", "em", "f1", "mcc", "acc_norm")
CARD_START, CARD_END = "<!-- hmoe evaluate: start -->", "<!-- hmoe evaluate: end -->"


@dataclass(frozen=True)
class Score:
    """One task or group of tasks.

    Attributes:
        value, stderr: as lm_eval reports them, shares for accuracies; `stderr` None where it gives none.
        averaged: whether the value joins the average: a share where higher is better.
        shots: None for a group whose tasks differ.
        samples: evaluated items.
        activated_ratio: activated share of the expert parameters (HMoE Table 2), where measured.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    averaged: bool
    shots: int | None
    samples: int | None
    activated_ratio: float | None


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint; parameters as [`hmoe.count_parameters`] counts them.

    Attributes:
        average: unweighted mean of the scores that can be averaged; its standard error takes tasks as independent.
        activated_parameters: per token, measured on all tokens of the evaluation; all of them for a dense model.
        activated_ratio, experts_per_token: None for a dense model.
    """

    name: str
    parameters: int
    activated_parameters: float | None
    activated_ratio: float | None
    experts_per_token: float | None
    scores: list[Score]
    average: float | None
    average_stderr: float | None


def read_evaluation(name: str, results: dict[str, Any]) -> Evaluation:
    """Reads one checkpoint from a results file of lm_eval. A suite has the scores of its tasks, none of its own."""
    config = results["config"]
    parameters, routing = config["model_num_parameters"], config.get("routing") or {}
    is_dense = not config.get("is_moe", True)
    scores = [_read_score(task, results) for task in _scored_tasks(results)]
    average, stderr = _average(scores)
    return Evaluation(
        name=name,
        parameters=parameters,
        activated_parameters=float(parameters) if is_dense else routing.get("activated_parameters"),
        activated_ratio=routing.get("activated_ratio"),
        experts_per_token=routing.get("experts_per_token"),
        scores=scores,
        average=average,
        average_stderr=stderr,
    )


def _scored_tasks(results: dict[str, Any]) -> list[str]:
    """The tasks and groups that were asked for; suites, and groups without a score, are replaced by their members."""
    members = results.get("group_subtasks", {})
    nested = {task for tasks in members.values() for task in tasks}

    def expand(name: str) -> list[str]:
        if name in members and (name in SUITES or not _numbers(results["results"].get(name, {}))):
            return [task for member in members[name] for task in expand(member)]
        return [name]

    top = [name for name in {**members, **results["results"]} if name not in nested]
    return list(dict.fromkeys(task for name in top for task in expand(name)))


def _numbers(entries: dict[str, Any]) -> dict[str, float]:
    """The metrics of one task, such as `acc,none`, without their errors."""
    return {
        key: value
        for key, value in entries.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }


def _leaves(task: str, results: dict[str, Any]) -> list[str]:
    members = results.get("group_subtasks", {}).get(task)
    return [leaf for member in members for leaf in _leaves(member, results)] if members else [task]


def _read_score(task: str, results: dict[str, Any]) -> Score:
    entries = results["results"][task]
    values = _numbers(entries)
    if not values:
        raise ValueError(f"lm_eval reports no number for {task!r}, only {sorted(entries)}: leave this task out")
    metrics = {key.partition(",")[0] for key in values}
    metric = next((name for name in PREFERRED_METRICS if name in metrics), next(iter(values)).partition(",")[0])
    key = next(key for key in values if key.partition(",")[0] == metric)
    stderr = entries.get(key.replace(",", "_stderr,", 1))
    higher = results.get("higher_is_better", {}).get(task, {}).get(metric, True)
    leaves = _leaves(task, results)
    shots = {results.get("n-shot", {}).get(leaf) for leaf in leaves}
    samples = [results.get("n-samples", {}).get(leaf, {}).get("effective") for leaf in leaves]
    return Score(
        task=task,
        metric=metric,
        value=float(values[key]),
        stderr=float(stderr) if isinstance(stderr, (int, float)) and not math.isnan(stderr) else None,
        averaged=metric in PREFERRED_METRICS and higher is not False,
        shots=shots.pop() if len(shots) == 1 else None,
        samples=sum(samples) if None not in samples else None,
        activated_ratio=_task_ratio(leaves, results),
    )


def _task_ratio(leaves: list[str], results: dict[str, Any]) -> float | None:
    measured = (results["config"].get("routing") or {}).get("tasks", {})
    parts = [measured[leaf] for leaf in leaves if leaf in measured]
    tokens = sum(part["tokens"] for part in parts)
    return sum(part["tokens"] * part["activated_ratio"] for part in parts) / tokens if tokens else None


def _average(scores: list[Score]) -> tuple[float | None, float | None]:
    chosen = [score for score in scores if score.averaged]
    if not chosen:
        return None, None
    errors = [score.stderr for score in chosen if score.stderr is not None]
    stderr = math.hypot(*errors) / len(chosen) if len(errors) == len(chosen) else None
    return fmean(score.value for score in chosen), stderr


def _plus_minus(value: float | None, stderr: float | None, *, percent: bool = True) -> str:
    if value is None:
        return "-"
    scale = 100 if percent else 1
    text = f"{scale * value:.2f}"
    return text if stderr is None else f"{text} ± {scale * stderr:.2f}"


def markdown(evaluations: list[Evaluation]) -> str:
    """Scores as in HMoE's Table 1, activated ratios by task as in its Table 2. Scores in percent ± standard error."""
    headings: dict[str, str] = {}  # of the tasks
    for score in chain.from_iterable(evaluation.scores for evaluation in evaluations):
        shots = "" if score.shots is None else f", {score.shots}-shot"
        headings.setdefault(score.task, f"{score.task} ({score.metric}{shots})")
    rows = [
        {
            "model": evaluation.name,
            "parameters": abbreviated(evaluation.parameters),
            "activated": abbreviated(evaluation.activated_parameters),
            "ratio": _percent(evaluation.activated_ratio),
            **{headings[s.task]: _plus_minus(s.value, s.stderr, percent=s.averaged) for s in evaluation.scores},
            "average": _plus_minus(evaluation.average, evaluation.average_stderr),
        }
        for evaluation in evaluations
    ]
    text = _table(["model", "parameters", "activated", "ratio", *headings.values(), "average"], rows)
    ratios = [
        {"model": evaluation.name, **{score.task: _percent(score.activated_ratio) for score in evaluation.scores}}
        for evaluation in evaluations
        if evaluation.activated_ratio is not None
    ]
    if ratios:
        text += "\n\nActivated share of the expert parameters, by task:\n\n" + _table(["model", *headings], ratios)
    return text + "\n"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2%}"


def _table(header: list[str], rows: list[dict[str, str]]) -> str:
    """Markdown, `-` where a row lacks a column."""
    lines = [header, *([row.get(column, "-") for column in header] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def write_model_card(folder: Path, evaluation: Evaluation, note: str) -> Path:
    """Puts the scores of `evaluation` into the README.md of a model folder: the metadata that the Hub shows, and a
    section with the table, which replaces that of an earlier run. What else the card says is kept."""
    path = folder / "README.md"
    card = (
        ModelCard.load(path)
        if path.exists()
        else ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {folder.name}\n")
    )
    data: Any = card.data
    data.model_name = data.model_name or folder.name
    ours = {score.task for score in evaluation.scores}
    kept = [result for result in data.eval_results or [] if result.dataset_type not in ours]
    data.eval_results = kept + [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            dataset_args={"num_few_shot": score.shots} if score.shots is not None else None,
            metric_type=score.metric,
            metric_value=score.value,
            metric_name=score.metric,
            metric_args=None if score.stderr is None else {"stderr": score.stderr},
        )
        for score in evaluation.scores
    ]
    section = f"{CARD_START}\n## Evaluation\n\n{note}\n\n{markdown([evaluation])}{CARD_END}"
    old = re.compile(re.escape(CARD_START) + ".*?" + re.escape(CARD_END), re.DOTALL)
    text = card.text
    card.text = old.sub(lambda match: section, text) if old.search(text) else f"{text.rstrip()}\n\n{section}\n"
    path.write_text(str(card), encoding="utf-8")
    return path
