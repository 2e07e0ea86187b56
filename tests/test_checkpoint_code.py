"""The code that a checkpoint carries: without `hmoe`, beside it, and beside that of other checkpoints."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from without_hmoe import run_without_hmoe

import hmoe


HEADS = {
    "AutoModel": "HMoEModel",
    "AutoModelForCausalLM": "HMoEForCausalLM",
    "AutoModelForSequenceClassification": "HMoEForSequenceClassification",
    "AutoModelForTokenClassification": "HMoEForTokenClassification",
    "AutoModelForQuestionAnswering": "HMoEForQuestionAnswering",
}
BACKENDS = ("eager", "grouped_mm", "batched_mm")
# What a checkpoint's code does only where the package is installed.
WITH_THE_PACKAGE = ("from hmoe.presets import preset_fields",)
INPUT_IDS = torch.arange(12).view(2, 6) + 3

# Opens every head from every checkpoint in a folder, and saves each checkpoint again from the head that made it.
OPEN_ALL = """
import json
from pathlib import Path

import torch
from transformers.models.mixtral import modeling_mixtral
import transformers

source, resaved, answers = map(Path, sys.argv[1:4])
heads, backends = map(json.loads, sys.argv[4:])
input_ids = torch.arange(12).view(2, 6) + 3


def first_output(model):
    with torch.no_grad():
        return model.eval()(input_ids, return_dict=True).to_tuple()[0]


tensors, info = {}, {}
for folder in sorted(source.iterdir()):
    for auto_class in heads:
        torch.manual_seed(0)  # a new head is drawn from here
        key = f"{folder.name}/{auto_class}"
        try:
            model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
        except ValueError as error:
            info[key] = str(error)
            continue
        info[key] = type(model).__module__
        tensors[key] = first_output(model)
        if auto_class == folder.name:
            model.save_pretrained(resaved / folder.name)
        if auto_class == folder.name == "AutoModelForCausalLM":
            tensors["generated"] = model.generate(input_ids, max_new_tokens=4, do_sample=False)
            for backend in backends:
                model.set_experts_implementation(backend)
                tensors[f"set/{backend}"] = first_output(model)
                chosen = type(model).from_pretrained(folder, experts_implementation=backend)
                tensors[f"chosen/{backend}"] = first_output(chosen)
            again = type(model).from_pretrained(folder, trust_remote_code=True, force_download=True)
            tensors["reloaded code"] = first_output(again)
            try:
                model.set_experts_implementation("sonicmoe")
            except ValueError as error:
                info["refused backend"] = str(error)
            model.add_model_tags(["trl", "sft"])
            output = model(input_ids, output_router_logits=True)
            tensors["aux_loss"] = output.aux_loss
            tensors["trl"] = modeling_mixtral.load_balancing_loss_func(output.router_logits, 4, 2)
info["hmoe"] = any(name.partition(".")[0] == "hmoe" for name in sys.modules)
torch.save(tensors, answers.with_suffix(".pt"))
answers.with_suffix(".json").write_text(json.dumps(info))
"""


def first_output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(INPUT_IDS, return_dict=True).to_tuple()[0]


class Strangers:
    """What processes without `hmoe` make of checkpoints that the package saved, one folder per head."""

    def __init__(self, root: Path, config: hmoe.HMoEConfig):
        self.saved, self.resaved, self.resaved_twice = root / "saved", root / "resaved", root / "resaved_twice"
        for seed, (auto_class, name) in enumerate(HEADS.items()):
            torch.manual_seed(seed)
            getattr(hmoe, name)(config).save_pretrained(self.saved / auto_class)
        self.first = self._open(self.saved, self.resaved, root / "first")
        self.second = self._open(self.resaved, self.resaved_twice, root / "second")

    @staticmethod
    def _open(source: Path, resaved: Path, answers: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        lists = json.dumps(list(HEADS)), json.dumps(BACKENDS)
        run_without_hmoe(OPEN_ALL, source, resaved, answers, *lists, home=answers.with_suffix(".home"))
        info = json.loads(answers.with_suffix(".json").read_text())
        assert not info.pop("hmoe")
        return torch.load(answers.with_suffix(".pt")), info


@pytest.fixture(scope="module")
def strangers(tmp_path_factory, tiny_config) -> Strangers:
    config = tiny_config(expert_intermediate_sizes=[[8, 16, 24, 32], [16, 16, 40]], pad_token_id=0, num_labels=3)
    return Strangers(tmp_path_factory.mktemp("strangers"), config)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("saved_by", HEADS)
def test_checkpoint_code_gives_the_packages_outputs_for_every_head(strangers, saved_by, head):
    key = f"{saved_by}/{head}"
    if head == "AutoModelForCausalLM" != saved_by:
        # Only a new classification head is a start; a causal LM with a random head is a broken checkpoint.
        assert "lm_head.weight" in strangers.first[1][key]
        assert "lm_head.weight" in strangers.second[1][key]
        return
    torch.manual_seed(0)
    expected = first_output(getattr(transformers, head).from_pretrained(strangers.saved / saved_by))
    for tensors, info in (strangers.first, strangers.second):
        assert info[key].startswith("transformers_modules.")
        assert torch.equal(tensors[key], expected)


@pytest.mark.parametrize("saved_by", HEADS)
def test_saving_again_from_checkpoint_code_keeps_code_auto_map_and_tensors(strangers, saved_by):
    folders = [root / saved_by for root in (strangers.saved, strangers.resaved, strangers.resaved_twice)]
    for folder in folders:
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", *HEADS}
        for reference in auto_map.values():
            module, _, name = reference.partition(".")
            tree = ast.parse((folder / f"{module}.py").read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    first, *others = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert all(names == first for names in others)
    for name in first:
        if name.endswith((".py", ".safetensors")):
            assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def test_generation_and_backends_work_on_checkpoint_code(strangers):
    model = hmoe.HMoEForCausalLM.from_pretrained(strangers.saved / "AutoModelForCausalLM").eval()
    for tensors, info in (strangers.first, strangers.second):
        assert torch.equal(tensors["generated"], model.generate(INPUT_IDS, max_new_tokens=4, do_sample=False))
        for backend in BACKENDS:
            model.set_experts_implementation(backend)
            assert torch.equal(tensors[f"set/{backend}"], first_output(model))
            assert torch.equal(tensors[f"chosen/{backend}"], first_output(model))
        model.set_experts_implementation("grouped_mm")
        assert torch.equal(tensors["reloaded code"], first_output(model))
        assert all(name in info["refused backend"] for name in ("sonicmoe", *BACKENDS))


def test_without_the_package_a_trainer_of_trl_gets_the_models_own_router_losses(strangers):
    for tensors, _ in (strangers.first, strangers.second):
        torch.testing.assert_close(tensors["trl"], tensors["aux_loss"], rtol=0, atol=0)


def test_with_the_package_imported_no_trust_is_needed_and_its_classes_are_used(strangers):
    for auto_class, name in HEADS.items():
        for trust in (None, True):
            model = getattr(transformers, auto_class).from_pretrained(
                strangers.saved / auto_class, trust_remote_code=trust
            )
            assert type(model) is getattr(hmoe, name)


def test_files_that_travel_import_only_each_other_and_what_every_host_has(strangers):
    hosts = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"} | sys.stdlib_module_names
    files = {path.stem: path for path in (strangers.saved / "AutoModel").glob("*.py")}
    assert "modeling_hmoe" in files
    for path in files.values():
        tree = ast.parse(path.read_text())
        guarded = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and "ImportError" in ast.unparse(node)]
        optional = {node for guard in guarded for statement in guard.body for node in ast.walk(statement)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                known = hosts | {"triton"} if node in optional else hosts
                assert {alias.name.partition(".")[0] for alias in node.names} <= known, ast.unparse(node)
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in files, ast.unparse(node)
            elif isinstance(node, ast.ImportFrom) and ast.unparse(node) not in WITH_THE_PACKAGE:
                assert node.module.partition(".")[0] in hosts, ast.unparse(node)


NEIGHBOURS = """
import json
import sys

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.mixtral import modeling_mixtral

import hmoe

plain, edited = sys.argv[1:3]
input_ids = torch.arange(12).view(2, 6) + 3


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids, labels=input_ids).lm_loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


# The model's own, and what a trainer of TRL gets for it.
def aux_losses(model):
    model.add_model_tags(["trl", "sft"])
    output = model(input_ids, output_router_logits=True)
    return [output.aux_loss, modeling_mixtral.load_balancing_loss_func(output.router_logits, 4, 2)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


installed = hmoe.HMoEForCausalLM.from_pretrained(plain)
silu = loss_and_gradients(installed)
relu = loss_and_gradients(hmoe.HMoEForCausalLM.from_pretrained(plain, hidden_act="relu"))
copies = [
    get_class_from_dynamic_module("modeling_hmoe.HMoEForCausalLM", folder).from_pretrained(folder)
    for folder in (plain, edited)
]
print(json.dumps({
    "three classes": len({hmoe.HMoEForCausalLM, *map(type, copies)}) == 3,
    "activations differ": not same(silu, relu),
    "plain copy": same(loss_and_gradients(copies[0]), silu),
    "edited copy": same(loss_and_gradients(copies[1]), relu),
    "installed package": same(loss_and_gradients(installed), silu),
    "plain copy again": same(loss_and_gradients(copies[0]), silu),
    "trl": all(torch.equal(*aux_losses(model)) for model in (installed, *copies)),
    "trl and the edited loss": not same(aux_losses(copies[0]), aux_losses(copies[1])),
}))
"""


def test_code_of_two_checkpoints_and_the_package_share_one_process(tiny_config, strangers, tmp_path):
    plain, edited = tmp_path / "a" / "checkpoint-1", tmp_path / "b" / "checkpoint-1"
    for folder in (plain, edited):
        shutil.copytree(strangers.saved / "AutoModelForCausalLM", folder)
    # Code of the same name that computes something else inside its custom op.
    with (edited / "grouped_hmoe.py").open("a") as file:
        file.write('\nACTIVATIONS["silu"] = ACTIVATIONS["relu"]\n')
    with (edited / "routing_hmoe.py").open("a") as file:
        file.write('\nROUTER_LOSSES["parameter_penalty_loss"] = router_z_loss\n')
    process = subprocess.run(
        [sys.executable, "-c", NEIGHBOURS, plain, edited],
        env={
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(hmoe.__file__).parents[1]),  # this copy of the package, whatever is installed
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    answers = json.loads(process.stdout)
    assert all(answers.values()), answers
