"""The `hmoe evaluate` command: lm_eval's own command line for one or more checkpoints, and one table of them all.

hmoe evaluate runs/cpu/hmoe runs/cpu/moe --suite hmoe --batch_size 16 --output_dir runs/scores
hmoe evaluate runs/cpu/hmoe --offline_items runs/items --tasks piqa arc_easy --limit 100 --model_card
accelerate launch -m hmoe.eval.harness MODEL --suite modse --batch_size auto
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download

import hmoe  # noqa: F401  (registers the model type)
import hmoe_cli
from hmoe.errors import CommandError, did_you_mean
from hmoe.sources import load_checkpoint, local_path

from .scores import Evaluation, markdown, read_evaluation, write_model_card
from .suites import SUITES, SUITES_FOLDER


WRITE_ITEMS = "`python examples/offline_items.py FOLDER`, in the repository, writes real items of 14 tasks"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hmoe evaluate ...`; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    num_models = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    args, passed_on = _parser().parse_known_args(argv[num_models:])
    models = argv[:num_models]
    if not models:
        _parser().error("name at least one model folder or Hub id, before the options")
    _check(args, models, passed_on)
    try:
        evaluations = evaluate(models, args, passed_on)
    except ConnectionError as error:
        if args.offline_items is not None:
            raise
        raise CommandError(f"{error}. {WRITE_ITEMS} for --offline_items FOLDER") from error
    if evaluations:
        _report(evaluations, args, models, argv)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hmoe evaluate",
        usage="hmoe evaluate MODEL [MODEL ...] [options] [lm_eval options]",
        description="Scores checkpoints with lm_eval and measures how much of their experts they activate. Options "
        "that are not listed here are those of `lm_eval run`: --batch_size, --limit, --num_fewshot, --device, "
        "--model_args dtype=bfloat16 peft=ADAPTER, --log_samples, --use_cache, --cache_requests, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--suite", choices=SUITES, help="the benchmarks of a paper")
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks or groups of lm_eval, besides the suite")
    parser.add_argument(
        "--offline_items",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="take the items from the folder that examples/offline_items.py writes, instead of the Hub; 0-shot",
    )
    parser.add_argument("--output_dir", type=Path, help="write results.json, results.md and lm_eval's own files here")
    parser.add_argument("--model_card", action="store_true", help="put the scores into the README.md of each folder")
    return parser


def _check(args: argparse.Namespace, models: list[str], passed_on: list[str]) -> None:
    args.tasks = [task for word in args.tasks for task in word.split(",") if task]
    if not args.suite and not args.tasks:
        raise ValueError(f"nothing to evaluate: give --suite ({', '.join(SUITES)}) or --tasks")
    given = {word.partition("=")[0] for word in passed_on}
    for option, instead in (("--output_path", "--output_dir"), ("-o", "--output_dir"), ("--model", "the first words")):
        if option in given:
            raise ValueError(f"{option} belongs to lm_eval alone; here use {instead}")
    if "--include_path" in given and (args.suite or args.offline_items is not None):
        raise ValueError(
            "--suite and --offline_items bring their own --include_path: give your own tasks as --tasks FILE.yaml"
        )
    for model in models:
        local = local_path(model)
        if local is None and args.model_card:
            raise ValueError(f"--model_card writes into folders, and {model!r} is none: download it first")
        if local is None:
            load_checkpoint(partial(hf_hub_download, filename="config.json"), model, "config.json")
        elif not (local / "config.json").is_file():
            raise ValueError(f"{model}: the folder has no config.json, so there is no model in it")


def evaluate(models: Sequence[str], args: argparse.Namespace, passed_on: Sequence[str]) -> list[Evaluation]:
    """Runs lm_eval once per model, in this process; empty on every rank but the first.

    Raises:
        ValueError: for an unknown task; OSError for a model that cannot be read.
    """
    tasks, include_path = _tasks(args)
    if include_path is not None:
        passed_on = [*passed_on, "--include_path", str(include_path)]
    evaluations = []
    with tempfile.TemporaryDirectory() as scratch:
        root = args.output_dir / "lm_eval" if args.output_dir else Path(scratch)
        for index, (model, name) in enumerate(zip(models, _names(models))):
            folder = root / f"{index:02d}-{name.replace('/', '__')}"
            results = run_lm_eval(model, tasks, [*passed_on, "--output_path", str(folder)], folder)
            if results is not None:
                evaluations.append(read_evaluation(name, results))
    return evaluations


def _tasks(args: argparse.Namespace) -> tuple[list[str], Path | None]:
    """Names for lm_eval, and the folder where it finds them."""
    if args.offline_items is None:
        return [*([args.suite] if args.suite else []), *args.tasks], SUITES_FOLDER if args.suite else None
    folder = Path(args.offline_items).expanduser()
    available = {path.stem for path in folder.glob("*.yaml")} if args.offline_items else set()
    if not available:
        raise ValueError(f"--offline_items takes a folder of task files, got {args.offline_items!r}. {WRITE_ITEMS}")
    members = []
    if args.suite:
        group = yaml.safe_load((SUITES_FOLDER / f"{args.suite}.yaml").read_text(encoding="utf-8"))
        members = [task if isinstance(task, str) else task["task"] for task in group["task"]]
    missing = [task for task in members if task not in available]
    if missing:
        print(f"not among the offline items, left out: {', '.join(missing)}", file=sys.stderr)
    wanted = [task for task in members if task in available]
    wanted += [task.removeprefix("local_") for task in args.tasks]
    if not wanted:
        raise ValueError(f"--offline_items {folder} has no task of the suite {args.suite}. {WRITE_ITEMS}")
    return [f"local_{task}" for task in dict.fromkeys(wanted)], folder


def run_lm_eval(model: str, tasks: Sequence[str], options: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """One run of lm_eval's command line; its results file in `folder`, None on every rank but the first."""
    from lm_eval.__main__ import cli_evaluate

    from . import lm_eval_model  # noqa: F401  (registers the lm_eval model `hmoe`)

    before = set(folder.rglob("results_*.json"))
    pretrained = json.dumps({"pretrained": str(local_path(model) or model)})  # paths may hold commas
    command = ["lm_eval", "run", "--model", "hmoe", *options, "--model_args", pretrained, "--tasks", ",".join(tasks)]
    saved, sys.argv = sys.argv, command
    try:
        cli_evaluate()
    except ValueError as error:
        if "Tasks not found" in str(error):
            raise ValueError(_unknown_tasks(str(error), options)) from error
        raise
    finally:
        sys.argv = saved
    if int(os.environ.get("RANK", "0")):
        return None
    written = sorted(set(folder.rglob("results_*.json")) - before)
    if not written:
        raise CommandError(f"lm_eval wrote no results for {model} into {folder}; its log above says why")
    return json.loads(written[-1].read_text(encoding="utf-8"))


def _unknown_tasks(message: str, options: Sequence[str]) -> str:
    from lm_eval.tasks import TaskManager

    include = options[list(options).index("--include_path") + 1] if "--include_path" in options else None
    known = TaskManager(include_path=include).all_tasks
    names = [name.strip() for name in message.partition(":")[2].split(",")]
    hints = "; ".join(f"{name!r}{did_you_mean(name, known)}" for name in names)
    return f"lm_eval has no task {hints} `lm_eval ls tasks` lists them all"


def _names(models: Sequence[str]) -> list[str]:
    """What the table calls the models: the last part of a folder, with as many before it as tell all folders apart."""
    paths = [local_path(model) for model in models]
    parts = [[model] if path is None else path.resolve().parts for model, path in zip(models, paths)]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(models)):
            break
    return names


def _report(evaluations: list[Evaluation], args: argparse.Namespace, models: list[str], argv: list[str]) -> None:
    table = markdown(evaluations)
    print(f"\n{table}")
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        record = {"command": ["hmoe", "evaluate", *argv], "evaluations": list(map(asdict, evaluations))}
        (args.output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (args.output_dir / "results.md").write_text(table, encoding="utf-8")
        print(f"{args.output_dir / 'results.json'}, {args.output_dir / 'results.md'}")
    if args.model_card:
        options = " ".join(argv[len(models) :])
        for model, evaluation in zip(models, evaluations):
            note = f"By lm_eval, through `hmoe evaluate {options}`. Scores in percent, ± standard error."
            print(write_model_card(Path(model).expanduser(), evaluation, note))


if __name__ == "__main__":
    sys.exit(hmoe_cli.main(["evaluate", *sys.argv[1:]]))
