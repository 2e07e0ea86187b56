"""The model card of a training run, and its way to the Hub.

The card is written from what the run measured. Absolute paths and tokens are kept out of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers import Trainer, TrainingArguments

from hmoe import __version__
from hmoe.configuration_hmoe import HMoEConfig
from hmoe.costs import ParameterCounts, count_parameters

from .checkpointing import STAGING_PREFIX


CARD = "README.md"
# What a folder of a run holds besides the model.
# Recipe and tokenizer notes name local paths, the pickled arguments may hold a token; the card has a clean recipe.
NOT_PUBLISHED = [
    "checkpoint-*",
    f"{STAGING_PREFIX}*",
    "_*",
    "tokenizer/*",
    "merged/*",
    "runs/*",
    "recipe.yaml",
    "training_args.bin",
]
_SPEEDS = ("_runtime", "_per_second", "_preparation_time")
_SECRETS = ("hub_token", "push_to_hub_token", "token")

_CITATION = """```bibtex
@inproceedings{wang2025hmoe,
  title = {{HMoE}: Heterogeneous Mixture of Experts for Language Modeling},
  author = {Wang, An and Sun, Xingwu and Xie, Ruobing and others},
  booktitle = {Proceedings of EMNLP},
  year = {2025},
  eprint = {2408.10681},
  archivePrefix = {arXiv}
}
@inproceedings{sun2024modse,
  title = {Mixture of Diverse Size Experts},
  author = {Sun, Manxi and Liu, Wei and Luan, Jian and Gao, Pengzhi and Wang, Bin},
  booktitle = {Proceedings of EMNLP: Industry Track},
  year = {2024},
  eprint = {2409.12210},
  archivePrefix = {arXiv}
}
```"""


def write_model_card(
    model: Any,
    tokenizer: Any,
    args: TrainingArguments,
    output_dir: str | os.PathLike,
    run_info: Mapping[str, Any],
) -> Path:
    """Writes `README.md` into `output_dir` and returns its path.

    Args:
        model: a causal LM, or its PEFT wrapper: the card then tells how to load the adapter.
        args: hyper-parameters; `hub_model_id`, if set, is the name in the usage example.
        run_info: all optional; [`run_info_of`] gives what a trainer knows.

            | key | value |
            |---|---|
            | `steps`, `tokens`, `flops`, `seconds`, `processes` | totals of the run |
            | `losses` | name to value: the last training log |
            | `load` | per layer, per expert, the share of tokens that activated it |
            | `evaluation` | name to number, or task to such mappings |
            | `data` | sentences or names: what it was trained on |
            | `datasets` | Hub names of data sets, for the metadata |
            | `recipe` | the fields that recipe and command line set |
            | `base_model` | what it was continued or fine-tuned from |
            | `license`, `language`, `tags` | metadata |
    """
    config = model.config
    name = getattr(args, "hub_model_id", None) or Path(output_dir).resolve().name
    is_adapter = hasattr(model, "peft_config")
    parts = [
        f"# {name.rpartition('/')[2]}",
        _introduction(config, is_adapter, run_info),
        _section("Use", _usage(name, config, is_adapter, run_info)),
        _section("Size", _size(model, config, run_info)),
        _section("Routing", _routing(config)),
        _section("Training", _training(args, run_info)),
        _section("Data", _bullets(run_info.get("data"))),
        _section("Evaluation", _evaluation(run_info.get("evaluation") or {})),
        _section("Recipe", _recipe(run_info.get("recipe"))),
        _section("Citation", _CITATION),
        f"Written by hmoe {__version__} with Transformers {transformers.__version__}.",
    ]
    metadata = _metadata(name, config, tokenizer, is_adapter, run_info)
    text = "\n\n".join(part for part in parts if part)
    path = Path(output_dir) / CARD
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n").save(path)
    return path


def run_info_of(trainer: Trainer) -> dict[str, Any]:
    """What [`write_model_card`] needs and a trainer knows; `load` and `losses` are of the last training log."""
    state = trainer.state
    training = [entry for entry in state.log_history if "loss" in entry]
    evaluation = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    window = getattr(trainer, "router_window", None)
    config = trainer.model.config
    adapters = getattr(trainer.model, "peft_config", None) or {}
    bases = [adapter.base_model_name_or_path for adapter in adapters.values()]
    return {
        "steps": state.global_step,
        "tokens": state.num_input_tokens_seen or None,
        "flops": state.total_flos or None,
        "processes": trainer.args.world_size,
        "losses": {name: value for name, value in training[-1].items() if name.endswith("loss")} if training else {},
        "load": window.load() if window is not None else None,
        "evaluation": {
            name: value
            for name, value in (evaluation[-1] if evaluation else {}).items()
            if name.startswith("eval_") and not name.endswith(_SPEEDS)
        },
        "base_model": next(iter(bases), None) or config.name_or_path or None,
    }


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Publishes the final folder of a run, without its checkpoints; returns the address of the commit.

    The repository is made if it does not exist. Files of it that the folder does not have stay.
    """
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=Path(folder),
        commit_message=commit_message,
        revision=revision,
        ignore_patterns=NOT_PUBLISHED,
    )
    return str(commit.commit_url)


def _metadata(name: str, config: Any, tokenizer: Any, is_adapter: bool, run_info: Mapping[str, Any]) -> ModelCardData:
    tags = [config.model_type, "mixture-of-experts"] if _num_experts(config) else [config.model_type]
    data = run_info.get("datasets") or None
    numbers = _flat(run_info.get("evaluation") or {})
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task or "validation",
            dataset_name=task or "validation",
            metric_type=metric,
            metric_value=value,
        )
        for (task, metric), value in numbers.items()
        if metric != "loss"
    ]
    return ModelCardData(
        model_name=name.rpartition("/")[2],
        base_model=_public(run_info.get("base_model")),
        language=run_info.get("language"),
        license=run_info.get("license"),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys([*tags, *(run_info.get("tags") or [])])],
        datasets=data,
        eval_results=results or None,
        ignore_metadata_errors=True,
    )


def _num_experts(config: Any) -> int:
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def _is_hmoe(config: Any) -> bool:
    return config.model_type == HMoEConfig.model_type


def _introduction(config: Any, is_adapter: bool, run_info: Mapping[str, Any]) -> str:
    kind = f"A language model of type `{config.model_type}`"
    if _is_hmoe(config):
        sizes = config.layer_expert_sizes
        different = any(len(set(row)) > 1 for row in sizes)
        experts = "one expert" if config.num_experts == 1 else f"{config.num_experts} experts"
        kind = f"A mixture-of-experts language model, {experts} per layer" + (
            " of different sizes (HMoE, arXiv 2408.10681; MoDSE, arXiv 2409.12210)" if different else ""
        )
    base = _public(run_info.get("base_model"))
    adapter = "LoRA adapter for " if is_adapter else ""
    origin = f", {'trained on' if is_adapter else 'continued from'} `{base}`" if base else ""
    return f"{adapter}{kind[0].lower() + kind[1:] if adapter else kind}{origin}."


def _usage(name: str, config: Any, is_adapter: bool, run_info: Mapping[str, Any]) -> str:
    trust = ", trust_remote_code=True" if _is_hmoe(config) else ""
    if is_adapter:
        base = _public(run_info.get("base_model")) or "BASE_MODEL"
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base}"{trust})',
            f'model = PeftModel.from_pretrained(model, "{name}")',
        ]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
        ]
    lines += [
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
    ]
    note = ""
    if trust:
        note = (
            "\n\nThe model's code travels with it; where `hmoe` is installed and imported, `trust_remote_code` is not "
        )
        note += "needed."
    return "```python\n" + "\n".join(lines) + "\n```" + note


def _size(model: Any, config: Any, run_info: Mapping[str, Any]) -> str:
    if not _is_hmoe(config):
        total = sum(parameter.numel() for parameter in model.parameters())
        return _table(["parameters", ""], [["total", f"{total:,}"]])
    load = run_info.get("load") or None
    counts = count_parameters(config, load=load)
    rows = [
        ["total", f"{counts.total:,}"],
        _activated_row(counts, config, measured=load is not None),
        ["activated, fewest and most", f"{counts.activated_min:,} to {counts.activated_max:,}"],
        ["embeddings", f"{counts.embedding:,}"],
        ["attention", f"{counts.attention:,}"],
        ["routers", f"{counts.router:,}"],
        ["experts", f"{sum(map(sum, counts.experts)):,}"],
    ]
    return _table(["parameters", ""], rows) + "\n\n" + _expert_table(config, counts, load)


def _activated_row(counts: ParameterCounts, config: Any, measured: bool) -> list[str]:
    share = f"{counts.activated_ratio:.1%} of the expert parameters"
    if measured:
        return ["activated per token, measured in training", f"{counts.activated:,.0f} ({share})"]
    if config.routing == "top_p":
        return ["activated per token", "depends on the token (Top-P)"]
    return ["activated per token, at equal load", f"{counts.activated:,.0f} ({share})"]


def _expert_table(config: Any, counts: ParameterCounts, load: Sequence[Sequence[float]] | None) -> str:
    sizes = config.layer_expert_sizes
    if any(row != sizes[0] for row in sizes):
        header = ["layer", "expert sizes (neurons)"] + (["tokens that activate each, %"] if load else [])
        rows = [[str(layer), ", ".join(map(str, row))] for layer, row in enumerate(sizes)]
        for row, shares in zip(rows, load or []):
            row.append(", ".join(f"{100 * share:.1f}" for share in shares))
        return _table(header, rows)
    header = ["expert", "neurons", "parameters per layer"] + (["tokens that activate it"] if load else [])
    rows = [[str(expert), f"{size:,}", f"{counts.experts[0][expert]:,}"] for expert, size in enumerate(sizes[0])]
    for expert, row in enumerate(rows if load else []):
        shares = [layer[expert] for layer in load or []]
        row.append(f"{sum(shares) / len(shares):.1%}")
    return _table(header, rows)


def _routing(config: Any) -> str:
    if not _is_hmoe(config):
        return ""
    if config.routing == "top_p":
        cap = f", at most {config.max_experts_per_tok}" if config.max_experts_per_tok else ""
        text = f"Top-P, p = {config.router_top_p}{cap}"
    else:
        text = f"Top-{config.num_experts_per_tok}" + (", renormalised" if config.norm_topk_prob else "")
    lines = [f"{text}; router type `{config.router_type}`."]
    for name, coef in config.router_loss_coefs_by_field.items():
        if coef:
            lines.append(f"- {name.removesuffix('_loss_coef').replace('_', ' ')} loss, coefficient {coef}")
    if config.router_aux_loss_coef != 1:
        lines.append(f"- all of them times {config.router_aux_loss_coef}")
    return "\n".join(lines)


def _training(args: TrainingArguments, run_info: Mapping[str, Any]) -> str:
    rows = []
    formats = {"steps": "{:,}", "tokens": "{:,}", "flops": "{:.3e}", "seconds": "{:,.0f}", "processes": "{}"}
    for name, style in formats.items():
        if run_info.get(name) is not None:
            rows.append([name, style.format(run_info[name])])
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * (run_info.get("processes") or 1)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    rows += [
        ["sequences per step", f"{batch:,}"],
        ["optimizer", f"{_value(args.optim)}, betas ({args.adam_beta1}, {args.adam_beta2}), eps {args.adam_epsilon}"],
        ["learning rate", f"{args.learning_rate}, {_value(args.lr_scheduler_type)}, warm-up {args.warmup_steps}"],
        ["weight decay", str(args.weight_decay)],
        ["gradient clipping", str(args.max_grad_norm)],
        ["precision", precision],
        ["seed", str(args.seed)],
    ]
    for name, value in (run_info.get("losses") or {}).items():
        rows.append([f"last {name.replace('_', ' ')}", f"{value:.4f}"])
    return _table(["", ""], rows)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    rows = [[task or "validation", metric, f"{value:.4f}"] for (task, metric), value in _flat(evaluation).items()]
    return _table(["data", "metric", "value"], rows) if rows else ""


def _flat(evaluation: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    flat: dict[tuple[str, str], float] = {}
    for name, value in evaluation.items():
        entries = value.items() if isinstance(value, Mapping) else [(name, value)]
        for metric, number in entries:
            if isinstance(number, int | float) and not isinstance(number, bool):
                flat[name if isinstance(value, Mapping) else "", metric.removeprefix("eval_")] = number
    return flat


def _recipe(recipe: Mapping[str, Any] | None) -> str:
    if not recipe:
        return ""
    public = {name: _public(value) for name, value in recipe.items() if name not in _SECRETS}
    return "```yaml\n" + yaml.safe_dump(public, sort_keys=False, allow_unicode=True).strip() + "\n```"


def _public(value: Any) -> Any:
    """Without the folders of the machine it was trained on."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith(("~", "..", "."))):
        return Path(value).name
    if isinstance(value, Mapping):
        return {str(name): _public(entry) for name, entry in value.items() if name not in _SECRETS}
    if isinstance(value, list | tuple):
        return [_public(entry) for entry in value]
    return value


def _bullets(lines: str | Iterable[str] | None) -> str:
    if not lines:
        return ""
    return "\n".join(f"- {_public(line)}" for line in ([lines] if isinstance(lines, str) else lines))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(choice: Any) -> str:
    return str(getattr(choice, "value", choice))
