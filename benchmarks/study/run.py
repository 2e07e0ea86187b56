"""Runs what the study's plan asks for and is not done yet, one run a process, at low priority.

    python benchmarks/study/fetch_text.py runs/study/text.jsonl
    python benchmarks/study/run.py                        # all that is missing, smallest scale first
    python benchmarks/study/run.py --scales small --most 5
    python benchmarks/study/run.py --pilot                # the runs that the learning rates were chosen with

Kill it at any moment: started again, it goes on with the run that was under way, from its last checkpoint. While the
file WORK_DIR/pause exists no new run begins. Every finished run appends one line to `results.jsonl`, from which the
report makes all tables and pictures; nothing is typed in by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hmoe import expert_sizes
from hmoe.sources import read_texts
from hmoe.training.tokenizer import train_tokenizer


HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Run:
    """One cell of the plan."""

    scale: str
    seed: int
    arm: str
    device: str
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.scale}-{self.arm}-{self.seed}-{self.learning_rate:g}-{self.device}"

    def is_in(self, line: dict[str, Any]) -> bool:
        return all(line[field] == value for field, value in vars(self).items())


def planned(plan: dict[str, Any], args: argparse.Namespace) -> Iterator[Run]:
    """All runs, smallest scale first; every arm has a seed before any arm has the next."""
    seeds, arms = plan["seeds"], list(plan["arms"])
    if args.pilot:
        seeds, arms = [plan["pilot"]["seed"]], plan["pilot"]["arms"]
    for scale in args.scales or plan["scales"]:
        rates = plan["pilot"]["learning_rates"] if args.pilot else [plan["scales"][scale]["learning_rate"]]
        for seed in seeds:
            for arm in args.arms or arms:
                for rate in rates:
                    yield Run(scale, seed, arm, args.device, rate)


def recipe(plan: dict[str, Any], run: Run, work_dir: Path) -> dict[str, Any]:
    """The recipe of `hmoe train` for a run."""
    scale, arm = plan["scales"][run.scale], plan["arms"][run.arm]
    width = round(scale["width"] * arm.get("share", 1))
    shape = {name: scale[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    shape |= {
        "vocab_size": plan["tokenizer"]["vocab_size"],
        "max_position_embeddings": plan["data"]["sequence_length"],
        "num_key_value_heads": scale["num_attention_heads"],
        "tie_word_embeddings": True,
        **arm.get("fields", {}),
    }
    if "sizes" in arm:
        model = {"preset": arm["preset"]}
        shape["expert_intermediate_sizes"] = expert_sizes(**arm["sizes"], total=width, multiple_of=2)
    else:
        model = {"model_type": arm["model_type"]}
        shape |= {"intermediate_size": width, "rms_norm_eps": 1e-5}
    return {
        "model": {**model, "model_config": shape},
        "tokenizer": {"tokenizer": str(work_dir / "tokenizer")},
        "data": {"dataset": [str(work_dir / "text.jsonl")], "data_cache_dir": str(work_dir / "cache"), **plan["data"]},
        "training": {
            **plan["training"],
            "output_dir": str(work_dir / "runs" / run.name),
            "max_train_flops": float(scale["budget"]),
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "eval_strategy": "steps",
            "eval_steps": scale["eval_steps"],
            "logging_steps": scale["eval_steps"],
            "save_steps": 4 * scale["eval_steps"],
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": run.device == "cpu",
            "bf16": run.device == "cuda",
            "dataloader_pin_memory": run.device == "cuda",
        },
    }


def prepare(plan: dict[str, Any], work_dir: Path) -> None:
    """The tokenizer of all runs, trained once on the whole text."""
    text = work_dir / "text.jsonl"
    if not text.is_file():
        sys.exit(f"{text} is missing: python benchmarks/study/fetch_text.py {text}")
    if not (work_dir / "tokenizer" / "tokenizer.json").is_file():
        print("training the tokenizer", flush=True)
        train_tokenizer(read_texts([text]), plan["tokenizer"]["vocab_size"]).save_pretrained(work_dir / "tokenizer")


def train(plan: dict[str, Any], run: Run, work_dir: Path) -> int:
    folder = work_dir / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe(plan, run, work_dir), sort_keys=False), encoding="utf-8")
    with open(folder.with_suffix(".log"), "ab") as log:
        command = [sys.executable, "-m", "hmoe.training", "--config", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        return subprocess.run(
            command, env=environment, stdout=log, stderr=log, preexec_fn=lambda: os.nice(15)
        ).returncode


def line_of(plan: dict[str, Any], run: Run, work_dir: Path) -> dict[str, Any]:
    """What a finished run measured, from its metrics.jsonl."""
    folder = work_dir / "runs" / run.name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = {line["step"]: line for line in lines if "train_flops" in line and "loss" in line}
    names = ("train_flops", "tokens_seen", "activated_parameters", "activated_ratio", "load_imbalance")
    curve = {}  # by step: the last step is evaluated twice
    for line in lines:
        if "eval_loss" in line and (logged := training.get(line["step"])):
            measured = {name: logged[name] for name in names if name in logged}
            curve[line["step"]] = {"step": line["step"], "loss": line["eval_loss"], **measured}
    seconds = sum(
        (line["tokens_seen"] - before["tokens_seen"]) / line["tokens_per_second"]
        for before, line in zip([{"tokens_seen": 0}, *training.values()], training.values())
    )
    return {
        "plan": plan["version"],
        **vars(run),
        "budget": float(plan["scales"][run.scale]["budget"]),
        "curve": list(curve.values()),
        "training_seconds": round(seconds, 1),  # beside other processes: no measure of speed
        "processor": platform.processor() or platform.machine(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.yaml")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="lines are appended to it")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/study"), help="text, tokenizer and running runs")
    parser.add_argument("--scales", nargs="+", help="only these")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--most", type=int, help="stop after so many runs")
    parser.add_argument("--pilot", action="store_true", help="the runs that choose the learning rates")
    args = parser.parse_args()
    plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
    for option, known in (("scales", plan["scales"]), ("arms", plan["arms"])):
        if unknown := [name for name in getattr(args, option) or [] if name not in known]:
            parser.error(f"--{option} {unknown[0]}: the plan has {', '.join(known)}")
    prepare(plan, args.work_dir)
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    missing = [run for run in planned(plan, args) if not any(run.is_in(line) for line in done)]
    print(f"{len(done)} runs are done, {len(missing)} are missing", flush=True)
    for index, run in enumerate(missing[: args.most], start=1):
        while (args.work_dir / "pause").exists():
            time.sleep(10)
        start = time.time()
        if status := train(plan, run, args.work_dir):
            print(f"{run.name}: exit status {status}, see {args.work_dir / 'runs' / run.name}.log", flush=True)
            continue
        line = line_of(plan, run, args.work_dir)
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shutil.rmtree(args.work_dir / "runs" / run.name)
        last = line["curve"][-1]["loss"]
        print(f"{index}/{len(missing)} {run.name}: {last:.4f} nats, {(time.time() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
