"""Train, save, reload and evaluate a small HMoE on real text, in a few minutes on two CPU cores.

    python examples/quickstart.py                                # the whole of it, three to five minutes
    python examples/quickstart.py --max_steps 50 --no_benchmark  # a look at every step, under a minute

Writes `model/`, `results.json` and `load_per_expert.png` into `--output_dir` (default `runs/quickstart`).
"""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


# The model's own files are all that is needed: no step may wait for a hub that cannot be reached.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait make training several times slower where other processes use the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from datasets import Dataset
from offline_items import ItemsUnavailable, write_items
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator, set_seed

from hmoe import HMoEConfig, HMoEForCausalLM, count_parameters, expert_sizes


TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"
PROMPT = "My fellow Americans, the state of our"
SEED = 0
CONTEXT = 256
VOCABULARY = 4096
HELD_OUT_EVERY = 10
BATCH = 4
BENCHMARK_ITEMS = 100

# Runs in an interpreter of its own that refuses to import hmoe: what loads there is the code saved with the model.
RELOAD = """
import json, sys, importlib.abc

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hmoe":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)")

sys.meta_path.insert(0, Refuse())
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
assert not any(name.partition(".")[0] == "hmoe" for name in sys.modules)
print("RESULT " + json.dumps({
    "class": f"{type(model).__module__}.{type(model).__name__}",
    "loss": loss,
    "text": tokenizer.decode(output[0], skip_special_tokens=True),
}))
"""


@dataclass
class Score:
    """One benchmark: accuracy, its standard error and chance level, all in [0, 1]."""

    task: str
    accuracy: float
    stderr: float
    chance: float
    items: int


@dataclass
class Results:
    steps: int
    train_seconds: float
    loss_before: float
    loss_after: float
    total_parameters: int
    activated_parameters: float
    expert_sizes: list[int]
    load: list[list[float]]
    activated_share: float
    activated_share_equal_load: float
    activated_share_inverse_size: float
    reloaded_class: str
    generated: str
    scores: list[Score]
    benchmark_note: str


def announce(step: str) -> None:
    print(f"\n=== {step}", flush=True)


def read_documents(path: Path) -> list[str]:
    """The speeches of the sample; each stands under a line `=== name ===`."""
    return [text.strip() for text in re.split(r"(?m)^=== \S+ ===\n", path.read_text(encoding="utf-8"))[1:]]


def train_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special)


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """All documents in one stream, between bos and eos, in rows of `CONTEXT` tokens; the last part row is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(documents), verbose=False)["input_ids"]:
        stream += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    rows = [stream[start : start + CONTEXT] for start in range(0, len(stream) - CONTEXT + 1, CONTEXT)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def make_model(tokenizer: PreTrainedTokenizerFast) -> HMoEForCausalLM:
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


def make_trainer(
    model: HMoEForCausalLM, train: Dataset, held_out: Dataset, max_steps: int, output_dir: Path
) -> Trainer:
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
        disable_tqdm=False,
        dataloader_pin_memory=False,
        seed=SEED,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=default_data_collator,
    )


def held_out_loss(trainer: Trainer) -> float:
    """Mean cross-entropy of a held-out token, in nats, without router terms."""
    return trainer.evaluate()["eval_loss"]


@torch.no_grad()
def measure_load(model: HMoEForCausalLM, data: Dataset) -> list[list[float]]:
    """Per layer, per expert, the share of held-out tokens that activate it; a layer's shares sum to Top-K."""
    model.eval()
    layer_sizes = model.config.layer_expert_sizes
    counts = [torch.zeros(len(sizes), dtype=torch.long) for sizes in layer_sizes]
    for start in range(0, len(data), BATCH):
        ids = torch.tensor(data[start : start + BATCH]["input_ids"], device=model.device)
        outputs = model(input_ids=ids, output_router_logits=True)
        for count, index in zip(counts, outputs.router_index, strict=True):  # index: [tokens, K]
            count += torch.bincount(index.flatten().cpu(), minlength=len(count))
    return [(count / (len(data) * CONTEXT)).tolist() for count in counts]


def inverse_size_load(sizes: Sequence[int], top_k: int) -> list[float]:
    """The load that the parameter penalty is indifferent to: proportional to 1 / size, summing to `top_k`."""
    inverse = [1 / size for size in sizes]
    return [top_k * value / sum(inverse) for value in inverse]


def reload_and_generate(folder: Path, row: Sequence[int]) -> dict[str, str | float]:
    """Loss on `row` and a generated sentence, from a fresh process in which `hmoe` cannot be imported."""
    command = [sys.executable, "-I", "-W", "ignore", "-c", RELOAD, str(folder), PROMPT, json.dumps(list(row))]
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"reloading {folder} failed:\n{done.stderr}")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def run_benchmarks(model: HMoEForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Path) -> tuple[list[Score], str]:
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
        chance = sum(1 / len(sample["resps"]) for sample in samples) / len(samples)
        scores.append(Score(task, metrics["acc,none"], metrics["acc_stderr,none"], chance, len(samples)))
    return scores, f"first {BENCHMARK_ITEMS} items of each, 0-shot, through lm_eval"


def print_table(results: Results) -> None:
    def row(name: str, value: str) -> None:
        print(f"  {name:<44}{value}")

    announce("Results")
    before, after = results.loss_before, results.loss_after
    row("held-out loss, before -> after", f"{before:.3f} -> {after:.3f} nats/token")
    row("held-out perplexity, before -> after", f"{math.exp(before):,.0f} -> {math.exp(after):.1f}")
    row("parameters, total", f"{results.total_parameters:,}")
    row("parameters, activated per token (measured)", f"{results.activated_parameters:,.0f}")
    row("activated share of the expert parameters", f"{results.activated_share:.1%}")
    row("  if every expert had equal load", f"{results.activated_share_equal_load:.1%}")
    row("  if load were proportional to 1 / size", f"{results.activated_share_inverse_size:.1%}")
    print("\n  Tokens that activate an expert, % of held-out tokens (a layer sums to 200)")
    print("  " + "neurons".ljust(12) + "".join(f"{size:>7}" for size in results.expert_sizes))
    for layer, shares in enumerate(results.load):
        print("  " + f"layer {layer}".ljust(12) + "".join(f"{share:>7.1%}" for share in shares))
    print("  " + "mean".ljust(12) + "".join(f"{share:>7.1%}" for share in mean_load(results.load)))
    print(f"\n  Benchmarks: {results.benchmark_note}")
    for score in results.scores:
        row(f"  {score.task}", f"{score.accuracy:.1%} +- {score.stderr:.1%} (chance {score.chance:.1%})")
    if results.scores:
        print(
            "  A model of this size, trained for minutes, is expected near chance: the point is that lm_eval runs it."
        )
    print(f"\n  Generated after reloading as {results.reloaded_class}:\n  {results.generated!r}")


def mean_load(load: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*load, strict=True)]


def draw_load(results: Results, top_k: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes, load = results.expert_sizes, [[100 * share for share in row] for row in results.load]
    order = sorted(range(len(sizes)), key=lambda expert: sizes[expert])
    labels = [str(sizes[expert]) for expert in order]
    ordered = [[row[expert] for expert in order] for row in load]

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    image = left.imshow(ordered, aspect="auto", cmap="cividis", vmin=0)
    middle = image.norm.vmax / 2
    for y, row in enumerate(ordered):
        for x, value in enumerate(row):
            left.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < middle else "black")
    left.set_xticks(range(len(labels)), labels)
    left.set_yticks(range(len(ordered)))
    left.set(xlabel="expert size [neurons]", ylabel="layer", title="Load per layer and expert")
    figure.colorbar(image, ax=left, label="tokens that activate the expert [%]")

    positions = range(len(order))
    means = [100 * share for share in mean_load(results.load)]
    law = [100 * share for share in inverse_size_load(sizes, top_k)]
    right.bar(positions, [means[expert] for expert in order], color="#0072B2", label="measured")
    right.plot(positions, [law[expert] for expert in order], "o-", color="#E69F00", label="proportional to 1 / size")
    right.axhline(100 * top_k / len(sizes), color="black", linestyle="--", label="equal load")
    right.set_xticks(positions, labels)
    right.set(
        xlabel="expert size [neurons]",
        ylabel="tokens that activate the expert [%]",
        title="Load by expert size, mean over layers",
    )
    right.legend(frameon=False)
    figure.suptitle(f"HMoE, Top-{top_k} of {len(sizes)} experts, after {results.steps} steps (held-out text)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
    documents = read_documents(TEXT)
    train_documents = [text for number, text in enumerate(documents) if number % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(train_documents)
    train, held_out = pack(train_documents, tokenizer), pack(documents[::HELD_OUT_EVERY], tokenizer)
    print(f"{len(train_documents)} speeches to train on, {len(documents) - len(train_documents)} held out; ", end="")
    print(f"{len(tokenizer)} tokens in the vocabulary; {len(train)} + {len(held_out)} rows of {CONTEXT} tokens")

    announce("2/6 Model: 8 experts of arithmetic sizes, Top-2, parameter penalty 0.1")
    model = make_model(tokenizer)
    config = model.config
    sizes = config.layer_expert_sizes[0]
    print(f"experts of {sizes} neurons, {count_parameters(config).total:,} parameters")

    announce(f"3/6 Training with transformers.Trainer, {arguments.max_steps} steps of {BATCH * CONTEXT:,} tokens")
    trainer = make_trainer(model, train, held_out, arguments.max_steps, output_dir)
    loss_before = held_out_loss(trainer)
    train_start = time.time()
    trainer.train()
    train_seconds = time.time() - train_start
    loss_after = held_out_loss(trainer)
    load = measure_load(model, held_out)

    announce(f"4/6 Saving to {model_dir}")
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    print("\n".join(sorted(f"  {path.name}" for path in model_dir.iterdir())))

    announce("5/6 Reloading in a fresh process that cannot import hmoe (trust_remote_code=True)")
    row = held_out[0]["input_ids"]
    reloaded = reload_and_generate(model_dir, row)
    ids = torch.tensor([row], device=model.device)
    with torch.no_grad():
        loss_here = model(input_ids=ids, labels=ids).loss.item()
    print(f"loss on one held-out row: {loss_here:.6f} here, {reloaded['loss']:.6f} there")
    if abs(loss_here - float(reloaded["loss"])) > 1e-4:
        raise RuntimeError("the reloaded model does not compute what was saved")

    scores: list[Score] = []
    note = "left out (--no_benchmark)"
    if not arguments.no_benchmark:
        announce(f"6/6 lm_eval: PIQA and ARC-Easy, {BENCHMARK_ITEMS} items each")
        scores, note = run_benchmarks(model, tokenizer, output_dir / "items")

    inverse = [inverse_size_load(layer_sizes, config.num_experts_per_tok) for layer_sizes in config.layer_expert_sizes]
    measured = count_parameters(config, load=load)
    results = Results(
        steps=arguments.max_steps,
        train_seconds=train_seconds,
        loss_before=loss_before,
        loss_after=loss_after,
        total_parameters=measured.total,
        activated_parameters=measured.activated,
        expert_sizes=sizes,
        load=load,
        activated_share=measured.activated_ratio,
        activated_share_equal_load=count_parameters(config).activated_ratio,
        activated_share_inverse_size=count_parameters(config, load=inverse).activated_ratio,
        reloaded_class=str(reloaded["class"]),
        generated=str(reloaded["text"]),
        scores=scores,
        benchmark_note=note,
    )
    print_table(results)
    draw_load(results, config.num_experts_per_tok, output_dir / "load_per_expert.png")
    seconds, peak = time.time() - start, peak_memory_gib()
    record = {**asdict(results), "seconds": seconds, "peak_memory_gib": peak}
    (output_dir / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n  {output_dir / 'load_per_expert.png'}, {output_dir / 'results.json'}")
    print(f"  {seconds / 60:.1f} minutes, of which {train_seconds / 60:.1f} training; peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
