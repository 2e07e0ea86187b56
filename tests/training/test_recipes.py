import json
import re
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from hmoe import PRESETS, count_parameters
from hmoe.sources import Source
from hmoe.training.command import main
from hmoe.training.model import build_config, build_model
from hmoe.training.recipe import parse_arguments
from hmoe.training.tokenizer import train_tokenizer


ROOT = Path(__file__).parents[2]
RECIPES = {str(path.relative_to(ROOT / "recipes")): path for path in sorted((ROOT / "recipes").rglob("*.yaml"))}
BASES = {name: RECIPES.pop(name) for name in list(RECIPES) if name.startswith("base/")}
CPU = [name for name in RECIPES if name.startswith("cpu/")]
FINETUNING = [name for name in RECIPES if "finetune" in name]
FRESH = [name for name in RECIPES if name not in FINETUNING]

# Total parameters. Printed in the papers or following from their printed sizes: Dense-0.4B 417 M, Dense-1B 1.32 B,
# HMoE-3B 2.58 B with both embeddings, MoDSE 1.300 B and 3.344 B, dense equivalents of 309 M and 702 M.
PARAMETERS = {
    "dense-0.4b": 417_221_376,
    "hmoe-0.4b": 417_295_104,
    "hmoe-0.4b-top-p": 417_295_104,
    "hmoe-0.4b-hybrid": 417_295_104,
    "hmoe-0.4b-geometric": 417_295_104,
    "moe-0.4b": 417_295_104,
    "moe-0.4b-top-p": 417_295_104,
    "uniform-small-0.4b": 378_366_720,
    "dense-1b": 1_323_852_800,
    "hmoe-3b": 2_582_365_184,
    "hmoe-3b-top-p": 2_582_365_184,
    "hmoe-3b-hybrid": 2_582_365_184,
    "moe-3b": 2_582_365_184,
    "moe-3b-top-p": 2_582_365_184,
}


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch, tmp_path_factory):
    # Recipes name their data from the top of the repository, where runs/ may hold what a user trained.
    top = tmp_path_factory.mktemp("repository")
    for folder in ("examples", "recipes"):
        (top / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(top)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def parse(name: str, *words: str):
    # These need a GPU or a package that the test machine may lack; the rest stands as it is.
    return parse_arguments(["--config", str(RECIPES[name]), "--bf16", "false", "--report_to", "none", *words])


def test_every_preset_of_the_papers_has_a_recipe():
    used = {parse(name).model.preset for name in FRESH}
    assert used >= set(PRESETS) - {"dense-0.4b", "dense-1b"}
    assert {"dense-0.4b.yaml", "dense-1b.yaml", "dense-300m.yaml", "dense-700m.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_names_what_it_needs(name):
    arguments = parse(name)
    assert arguments.training.output_dir == f"runs/{name.removesuffix('.yaml')}"
    for entry in arguments.data.dataset:
        source = Source.parse(entry)
        assert not name.startswith("cpu/") or Path(source.path).exists()


@pytest.mark.parametrize("name", FRESH)
def test_a_recipe_builds_its_model_with_the_expected_parameters(name):
    arguments = parse(name)
    config = build_config(arguments.model)
    with torch.device("meta"):
        model = build_model(arguments.model, config)
    total = sum(parameter.numel() for parameter in model.parameters())
    if config.model_type == "hmoe":
        assert total == count_parameters(config).total
    stem = name.removesuffix(".yaml")
    if stem in PARAMETERS:
        assert total == PARAMETERS[stem]
    vocabulary = arguments.tokenizer.train_tokenizer
    assert vocabulary is None or vocabulary == config.vocab_size
    assert arguments.data.sequence_length <= config.max_position_embeddings


def test_totals_are_those_of_the_papers():
    totals = {}
    for name in ("modse-300m-x8.yaml", "modse-700m-x8.yaml", "dense-300m.yaml", "dense-700m.yaml"):
        arguments = parse(name)
        with torch.device("meta"):
            model = build_model(arguments.model, build_config(arguments.model))
        totals[name.removesuffix(".yaml")] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert totals == pytest.approx(
        {"modse-300m-x8": 1300, "modse-700m-x8": 3344, "dense-300m": 309, "dense-700m": 702}, rel=2e-3
    )


def test_the_control_activates_as_many_parameters_as_hmoe():
    config = build_config(parse("uniform-small-0.4b.yaml").model)
    assert count_parameters(config).activated == pytest.approx(153e6, rel=0.005)


@pytest.mark.parametrize("name", [name for name in FRESH if not name.startswith("cpu/")])
def test_twins_of_a_paper_differ_in_nothing_but_the_model(name):
    reference = "modse-300m-x8.yaml" if "300m" in name or "700m" in name else "hmoe-0.4b.yaml"
    ours, theirs = parse(name), parse(reference)
    for values in (ours.recipe, theirs.recipe):
        for free in ("preset", "model_type", "model_config", "output_dir", "router_heat_maps"):
            values.pop(free, None)
        values["batch"] = values.pop("gradient_accumulation_steps") * values["per_device_train_batch_size"]
    if "3b" in name or "1b" in name:
        assert (ours.recipe.pop("max_train_flops"), theirs.recipe.pop("max_train_flops")) == (2.6e20, 7e19)
    if "700m" in name:
        assert 64 * ours.recipe.pop("batch") == 16 * theirs.recipe.pop("batch")
    assert ours.recipe == theirs.recipe


def test_the_papers_hyper_parameters_are_kept():
    hmoe, modse = parse("hmoe-3b.yaml").training, parse("modse-700m-x8.yaml").training
    assert (hmoe.adam_beta1, hmoe.adam_beta2, hmoe.weight_decay) == (0.9, 0.999, 1e-5)
    assert (hmoe.learning_rate, hmoe.warmup_steps, hmoe.lr_scheduler_type) == (1e-4, 1000, "constant_with_warmup")
    assert (hmoe.seed, hmoe.activation_checkpointing, hmoe.max_train_flops) == (12345, True, 2.6e20)
    assert hmoe.per_device_train_batch_size * hmoe.gradient_accumulation_steps * 8 == 640
    assert (modse.adam_beta1, modse.adam_beta2, modse.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert (modse.weight_decay, modse.max_grad_norm, modse.warmup_steps) == (0.1, 1.0, 2000)
    assert modse.max_train_tokens == 100_000_000_000
    schedule = modse.lr_scheduler_kwargs
    assert schedule["min_lr"] == 3e-5
    assert schedule["warmup_lr_rate"] * modse.learning_rate == pytest.approx(2e-7, rel=1e-4)


CHOSEN = re.compile(r"#.*chosen")


@pytest.mark.parametrize("name", ["base/hmoe-paper.yaml", "base/modse-paper.yaml"])
def test_values_that_the_paper_does_not_give_are_marked(name):
    unknown = {"streaming", "bf16", "validation_fraction", "eval_steps", "save_steps"}
    of_one_paper = {
        "modse": {"learning_rate", "sequence_length", "seed"},
        "hmoe": {"max_grad_norm", "flops_convention"},
    }
    unknown |= of_one_paper["modse" if "modse" in name else "hmoe"]
    lines = {line.strip().partition(":")[0]: line for line in BASES[name].read_text().splitlines()}
    assert unknown <= set(lines)
    for key in unknown:
        assert CHOSEN.search(lines[key]), lines[key]


# CPU recipes run


@pytest.fixture(scope="session")
def slice_of_text(tmp_path_factory):
    """The beginnings of some speeches of the sample text, and a tokenizer for it."""
    folder = tmp_path_factory.mktemp("slice")
    whole = (ROOT / "examples" / "data" / "state_of_the_union.txt").read_text(encoding="utf-8")
    text = "\n".join(speech[:3000] for speech in re.split(r"(?m)^(?==== )", whole)[1:13])
    path = folder / "slice.txt"
    path.write_text(text, encoding="utf-8")
    train_tokenizer([text], 400).save_pretrained(folder / "tokenizer")
    return path, folder / "tokenizer"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def run_fresh(name, runs, slice_of_text):
    text, tokenizer = slice_of_text
    recipe = parse(name).data
    assert recipe.document_separator
    words = ["--dataset", str(text), "--validation_fraction", "0.4", "--tokenizer", str(tokenizer)]
    path = runs / name.removesuffix(".yaml")
    copy = path.parent / f"{path.name}.yaml"
    copy.parent.mkdir(parents=True, exist_ok=True)
    # The slice is too short for the recipe's own tokenizer.
    copy.write_text(f"extends: {RECIPES[name]}\ntrain_tokenizer: null\n")
    common = ["--output_dir", str(path), "--max_steps", "2", "--report_to", "none", "--eval_strategy", "no"]
    common += ["--sequence_length", "64", "--max_validation_sequences", "2", "--disable_tqdm", "true"]
    assert main(["--config", str(copy), *common, "--save_strategy", "no", *words]) == 0
    return path


@pytest.mark.parametrize("name", [name for name in CPU if name in FRESH])
def test_a_cpu_recipe_runs_two_steps(name, runs, slice_of_text):
    path = run_fresh(name, runs, slice_of_text)
    results = json.loads((path / "all_results.json").read_text())
    assert 5 < results["eval_loss"] < 9
    assert json.loads((path / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("name", [name for name in CPU if name in FINETUNING])
def test_a_cpu_fine_tuning_recipe_runs_two_steps(name, runs, slice_of_text, tmp_path):
    base = run_fresh("cpu/hmoe.yaml", runs, slice_of_text)
    words = [
        "--model_name_or_path",
        str(base),
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "2",
        "--report_to",
        "none",
    ]
    assert main(["--config", str(RECIPES[name]), *words, "--disable_tqdm", "true"]) == 0
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_loss"] > 0
    assert ("lora" in name) == (tmp_path / "adapter_config.json").exists() == (tmp_path / "merged").exists()


# Accelerate


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_accelerate_config_is_read(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    expected = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == expected[path.stem]
    if path.stem == "zero3":
        assert config.deepspeed_config["deepspeed_moe_layer_cls_names"] == "HMoESparseMoeBlock"
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
