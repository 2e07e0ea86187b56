"""Train, save, reload and evaluate a small HMoE on real text, in a few minutes on two CPU cores.

    python examples/quickstart.py                                # the whole of it, three to five minutes
    python examples/quickstart.py --max_steps 50 --no_benchmark  # a look at every step, under a minute

Writes `model/`, `results.json` and `load_per_expert.png` into `--output_dir` (default `runs/quickstart`).
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


# The model's own files are all that is needed: no step may wait for a hub that cannot be reached.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait make training several times slower where other processes use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from offline_items import ItemsUnavailable, write_items
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from hmoe import HMoEConfig, HMoEForCausalLM, count_parameters, expert_sizes
from hmoe.costs import inverse_size_load
from hmoe.heat_map import draw_load
from hmoe.routers import RouterTap, tokens_per_expert
from hmoe.training.arguments import DataOptions
from hmoe.training.data import TrainingData, build_data
from hmoe.training.tokenizer import corpus_texts, train_tokenizer


TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"
PROMPT = "My fellow Americans, the state of our"
SEED = 0
CONTEXT = 256
VOCABULARY = 4096
HELD_OUT = 0.1  # share of the speeches
BATCH = 4
BENCHMARK_ITEMS = 100

# Runs in an interpreter of its own that cannot import hmoe: what loads there is the code saved with the model.
RELOAD = """
import json, sys

sys.modules["hmoe"] = None  # from now on, importing it raises
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, ids = sys.argv[1], sys.argv[2], torch.tensor([json.loads(sys.argv[3])])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    loss = model(input_ids=ids, labels=ids).loss.item()
torch.manual_seed(0)
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
output = model.generate(
    **inputs, max_new_tokens=48, do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.2,
    pad_token_id=tokenizer.pad_token_id,
)
assert sys.modules["hmoe"] is None
print("RESULT " + json.dumps({
    "class": f"{type(model).__module__}.{type(model).__name__}",
    "loss": loss,
    "text": tokenizer.decode(output[0], skip_special_tokens=True),
}))
"""


def announce(step: str) -> None:
    print(f"\n=== {step}", flush=True)


def make_model(tokenizer: PreTrainedTokenizerBase) -> HMoEForCausalLM:
    config = HMoEConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        expert_intermediate_sizes=expert_sizes("arithmetic", 8, total=2048, multiple_of=16),
        num_experts_per_tok=2,
        parameter_penalty_loss_coef=0.1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return HMoEForCausalLM(config)


def make_trainer(model: HMoEForCausalLM, data: TrainingData, max_steps: int, output_dir: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(output_dir / "trainer"),
        max_steps=max_steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, max_steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, max_steps // 12),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=SEED,
    )
    return Trainer(model, arguments, data.collate, data.train, data.validation)


def evaluate(trainer: Trainer, model: HMoEForCausalLM) -> tuple[float, list[list[float]]]:
    """Mean cross-entropy of a held-out token, in nats, without router terms; and the load.

    The load is, per layer, per expert, the share of held-out tokens that activate it; a layer sums to Top-K.
    """
    counts = [torch.zeros(len(sizes), dtype=torch.long) for sizes in model.config.layer_expert_sizes]

    def count(layer: int, logits: torch.Tensor, index: torch.Tensor) -> None:
        counts[layer] += tokens_per_expert(index, len(counts[layer])).cpu()

    with RouterTap(model, count):
        loss = trainer.evaluate()["eval_loss"]
    top_k = model.config.num_experts_per_tok
    return loss, [(top_k * count / count.sum()).tolist() for count in counts]


def reload_and_generate(folder: Path, row: Sequence[int]) -> dict[str, str | float]:
    """Loss on `row` and a generated sentence, from a fresh process in which `hmoe` cannot be imported."""
    command = [sys.executable, "-I", "-W", "ignore", "-c", RELOAD, str(folder), PROMPT, json.dumps(list(row))]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"reloading {folder} failed:\n{done.stderr}")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def run_benchmarks(
    model: HMoEForCausalLM, tokenizer: PreTrainedTokenizerBase, items: Path
) -> tuple[list[dict[str, Any]], str]:
    """lm_eval's accuracy on PIQA and ARC-Easy items, and a note, which says why where there are no scores."""
    try:
        write_items(items, ["piqa", "arc_easy"])
    except ItemsUnavailable as error:
        return [], f"not run, the items could not be downloaded ({error}); the perplexity stands alone"

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answer = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32, max_length=CONTEXT),
        tasks=["local_piqa", "local_arc_easy"],
        task_manager=TaskManager(include_path=str(items)),
        limit=BENCHMARK_ITEMS,
        bootstrap_iters=100,
        log_samples=True,
    )
    scores = []
    for task, metrics in answer["results"].items():
        samples = answer["samples"][task]
        scores.append(
            {
                "task": task,
                "accuracy": metrics["acc,none"],
                "stderr": metrics["acc_stderr,none"],
                "chance": sum(1 / len(sample["resps"]) for sample in samples) / len(samples),
                "items": len(samples),
            }
        )
    return scores, f"first {BENCHMARK_ITEMS} items of each, 0-shot, through lm_eval"


def print_table(results: dict[str, Any]) -> None:
    def row(name: str, value: str) -> None:
        print(f"  {name:<44}{value}")

    def cells(name: str, values: Sequence[float], form: str) -> None:
        print(f"  {name:<12}" + "".join(f"{value:>7{form}}" for value in values))

    announce("Results")
    before, after = results["loss_before"], results["loss_after"]
    row("held-out loss, before -> after", f"{before:.3f} -> {after:.3f} nats/token")
    row("held-out perplexity, before -> after", f"{math.exp(before):,.0f} -> {math.exp(after):.1f}")
    row("parameters, total", f"{results['total_parameters']:,}")
    row("parameters, activated per token (measured)", f"{results['activated_parameters']:,.0f}")
    row("activated share of the expert parameters", f"{results['activated_share']:.1%}")
    row("  if every expert had equal load", f"{results['activated_share_equal_load']:.1%}")
    row("  if load were proportional to 1 / size", f"{results['activated_share_inverse_size']:.1%}")
    print("\n  Tokens that activate an expert, % of held-out tokens (a layer sums to 200)")
    cells("neurons", results["expert_sizes"], "")
    for layer, shares in enumerate(results["load"]):
        cells(f"layer {layer}", shares, ".1%")
    cells("mean", np.mean(results["load"], axis=0), ".1%")
    print(f"\n  Benchmarks: {results['benchmark_note']}")
    for score in results["scores"]:
        row(f"  {score['task']}", "{accuracy:.1%} +- {stderr:.1%} (chance {chance:.1%})".format(**score))
    if results["scores"]:
        print(
            "  A model of this size, trained for minutes, is expected near chance: the point is that lm_eval runs it."
        )
    print(f"\n  Generated after reloading as {results['reloaded_class']}:\n  {results['generated']!r}")


def draw(results: dict[str, Any], top_k: int, path: Path) -> None:
    """The load by layer and expert, and its mean over layers beside the law that the parameter penalty drives to."""
    sizes, load = results["expert_sizes"], results["load"]  # smallest expert first
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = draw_load(left, load, [sizes] * len(load))
    left.set_title("Load per layer and expert")
    figure.colorbar(image, ax=left, label="tokens that activate the expert", format=PercentFormatter(1))

    positions = range(len(sizes))
    right.bar(positions, np.mean(load, axis=0), color="#0072B2", label="measured")
    right.plot(positions, inverse_size_load(sizes, top_k), "o-", color="#E69F00", label="proportional to 1 / size")
    right.axhline(top_k / len(sizes), color="black", linestyle="--", label="equal load")
    right.set_xticks(positions, map(str, sizes))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.set(
        xlabel="expert size [neurons]",
        ylabel="tokens that activate the expert",
        title="Load by expert size, mean over layers",
    )
    right.legend(frameon=False)
    figure.suptitle(f"HMoE, Top-{top_k} of {len(sizes)} experts, after {results['steps']} steps (held-out text)")
    figure.savefig(path, dpi=130)


def peak_memory_gib() -> float:
    """Peak resident memory of this process or of the largest child, whichever is more."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=600, help="training steps (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="default: %(default)s")
    parser.add_argument("--no_benchmark", action="store_true", help="leave out PIQA and ARC-Easy")
    arguments = parser.parse_args()
    if arguments.max_steps < 1:
        parser.error(f"--max_steps must be at least 1, got {arguments.max_steps}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    start = time.time()
    set_seed(SEED)
    output_dir = arguments.output_dir
    model_dir = output_dir / "model"
    output_dir.mkdir(parents=True, exist_ok=True)

    announce("1/6 Tokenizer and data: presidents' speeches, held out by document")
    options = DataOptions(
        dataset=[str(TEXT)],
        document_separator=r"^=== \S+ ===$",
        validation_fraction=HELD_OUT,
        data_cache_dir=str(output_dir / "data"),
    )
    tokenizer = train_tokenizer(corpus_texts(options, max_bytes=TEXT.stat().st_size), VOCABULARY)
    data = build_data(options, tokenizer, CONTEXT)
    speeches, held_out_speeches = (part.documents for part in data.parts)
    print(f"{speeches} speeches to train on, {held_out_speeches} held out; {len(tokenizer)} tokens in the vocabulary;")
    print(f"{len(data.train)} + {len(data.validation)} rows of {CONTEXT} tokens")

    announce("2/6 Model: 8 experts of arithmetic sizes, Top-2, parameter penalty 0.1")
    model = make_model(tokenizer)
    config = model.config
    sizes = config.layer_expert_sizes[0]
    print(f"experts of {sizes} neurons, {count_parameters(config).total:,} parameters")

    announce(f"3/6 Training with transformers.Trainer, {arguments.max_steps} steps of {BATCH * CONTEXT:,} tokens")
    trainer = make_trainer(model, data, arguments.max_steps, output_dir)
    loss_before, _ = evaluate(trainer, model)
    train_start = time.time()
    trainer.train()
    train_seconds = time.time() - train_start
    loss_after, load = evaluate(trainer, model)

    announce(f"4/6 Saving to {model_dir}")
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    print("\n".join(sorted(f"  {path.name}" for path in model_dir.iterdir())))

    announce("5/6 Reloading in a fresh process that cannot import hmoe (trust_remote_code=True)")
    row = data.validation[0]["input_ids"]
    reloaded = reload_and_generate(model_dir, row.tolist())
    ids = row[None].to(model.device)
    with torch.no_grad():
        loss_here = model(input_ids=ids, labels=ids).loss.item()
    print(f"loss on one held-out row: {loss_here:.6f} here, {reloaded['loss']:.6f} there")
    if abs(loss_here - float(reloaded["loss"])) > 1e-4:
        raise RuntimeError("the reloaded model does not compute what was saved")

    scores, note = [], "left out (--no_benchmark)"
    if not arguments.no_benchmark:
        announce(f"6/6 lm_eval: PIQA and ARC-Easy, {BENCHMARK_ITEMS} items each")
        scores, note = run_benchmarks(model, tokenizer, output_dir / "items")

    inverse = [inverse_size_load(layer_sizes, config.num_experts_per_tok) for layer_sizes in config.layer_expert_sizes]
    measured = count_parameters(config, load=load)
    results = {
        "steps": arguments.max_steps,
        "train_seconds": train_seconds,
        "loss_before": loss_before,
        "loss_after": loss_after,
        "total_parameters": measured.total,
        "activated_parameters": measured.activated,
        "expert_sizes": sizes,
        "load": load,
        "activated_share": measured.activated_ratio,
        "activated_share_equal_load": count_parameters(config).activated_ratio,
        "activated_share_inverse_size": count_parameters(config, load=inverse).activated_ratio,
        "reloaded_class": reloaded["class"],
        "generated": reloaded["text"],
        "scores": scores,
        "benchmark_note": note,
    }
    print_table(results)
    draw(results, config.num_experts_per_tok, output_dir / "load_per_expert.png")
    seconds, peak = time.time() - start, peak_memory_gib()
    record = {**results, "seconds": seconds, "peak_memory_gib": peak}
    (output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n  {output_dir / 'load_per_expert.png'}, {output_dir / 'results.json'}")
    print(f"  {seconds / 60:.1f} minutes, of which {train_seconds / 60:.1f} training; peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
