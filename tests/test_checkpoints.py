"""Checkpoints: their own code where `hmoe` is not installed, registration, exact round trips, refusal of bad ones."""

import ast
import json
import math
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from without_hmoe import run_without_hmoe

import hmoe


HEADS = {
    "AutoModel": "HMoEModel",
    "AutoModelForCausalLM": "HMoEForCausalLM",
    "AutoModelForSequenceClassification": "HMoEForSequenceClassification",
    "AutoModelForTokenClassification": "HMoEForTokenClassification",
    "AutoModelForQuestionAnswering": "HMoEForQuestionAnswering",
}
BACKENDS = ("eager", "grouped_mm", "batched_mm", "tiled_grouped_mm")
INPUT_IDS = torch.arange(12).view(2, 6) + 3

# Opens every head from every checkpoint in a folder, and saves each checkpoint again from the head that made it.
OPEN_ALL = """
import json
from pathlib import Path

import torch
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
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] in hosts, ast.unparse(node)


NEIGHBOURS = """
import json
import sys

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hmoe

plain, edited = sys.argv[1:3]
input_ids = torch.arange(12).view(2, 6) + 3


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids, labels=input_ids).lm_loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


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
}))
"""


def test_code_of_two_checkpoints_and_the_package_share_one_process(tiny_config, strangers, tmp_path):
    plain, edited = tmp_path / "a" / "checkpoint-1", tmp_path / "b" / "checkpoint-1"
    for folder in (plain, edited):
        shutil.copytree(strangers.saved / "AutoModelForCausalLM", folder)
    # Code of the same name that computes something else inside its custom op.
    with (edited / "grouped_hmoe.py").open("a") as file:
        file.write('\nACTIVATIONS["silu"] = ACTIVATIONS["relu"]\n')
    process = subprocess.run(
        [sys.executable, "-c", NEIGHBOURS, plain, edited],
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    answers = json.loads(process.stdout)
    assert all(answers.values()), answers


# Each is the first code of a fresh process; `folder` holds a causal LM and its pickle.
IMPORT_ORDERS = {
    "hmoe_before_transformers": "import hmoe, transformers; check(transformers.AutoModelForCausalLM)",
    "hmoe_after_transformers": "import transformers, hmoe; check(transformers.AutoModelForCausalLM)",
    "hmoe_after_the_auto_classes": """
from transformers import AutoConfig, AutoModelForCausalLM
import hmoe
check(AutoModelForCausalLM)
""",
    "a_stock_model_first": """
import hmoe
from transformers import LlamaForCausalLM
from transformers import AutoModelForCausalLM
check(AutoModelForCausalLM)
""",
    "auto_config_only": """
import hmoe
from transformers import AutoConfig
config = AutoConfig.from_pretrained(folder)
assert type(config) is hmoe.HMoEConfig
""",
    "auto_model_for_causal_lm_only": """
import hmoe
from transformers import AutoModelForCausalLM
check(AutoModelForCausalLM)
""",
    "mixtral_modeling_first": """
import transformers.models.mixtral.modeling_mixtral
import hmoe
from transformers import AutoModel
check(AutoModel, "HMoEModel")
""",
    "mixtral_modeling_after": """
import hmoe
import transformers.models.mixtral.modeling_mixtral
from transformers import AutoModel
check(AutoModel, "HMoEModel")
""",
    "modeling_file_first": """
from hmoe.modeling_hmoe import HMoEForCausalLM
from transformers import AutoModelForCausalLM
check(AutoModelForCausalLM)
""",
    "generic_head_first": """
import hmoe
from transformers import AutoModelForTokenClassification
check(AutoModelForTokenClassification, "HMoEForTokenClassification")
""",
    "pickle": """
import pickle
from pathlib import Path
model = pickle.loads(Path(folder, "model.pickle").read_bytes())
config = pickle.loads(Path(folder, "config.pickle").read_bytes())
from transformers import AutoModelForCausalLM
check(AutoModelForCausalLM)
assert type(AutoModelForCausalLM.from_config(config)) is type(model)
""",
}
# Libraries that do not touch the registration take seconds to import: the fresh processes are forks made after that.
RUN_IMPORT_ORDERS = """
import json
import os
import sys
import traceback
from pathlib import Path

folder, results, orders = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

CHECK = '''
def check(auto_class, name="HMoEForCausalLM"):
    model = auto_class.from_pretrained(folder)
    assert f"{type(model).__module__}.{type(model).__name__}" == f"hmoe.modeling_hmoe.{name}", type(model)
'''
QUICK = '''
import sys
import hmoe
dir(hmoe)
assert not {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules), sorted(sys.modules)
'''


def in_a_fork(name, code):
    if (child := os.fork()) == 0:
        try:
            exec(code, {"folder": folder})
            results.joinpath(name).write_text("ok")
        except BaseException:
            results.joinpath(name).write_text(traceback.format_exc())
        finally:
            os._exit(0)
    os.waitpid(child, 0)


in_a_fork("quick", QUICK)
import accelerate
import torch._dynamo
import torch.distributed.tensor

assert not {"hmoe", "transformers"} & set(sys.modules)
for name, code in orders.items():
    in_a_fork(name, CHECK + code)
"""


@pytest.fixture(scope="module")
def import_results(tmp_path_factory, tiny_config) -> dict[str, str]:
    folder, results = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("results")
    model = hmoe.HMoEForCausalLM(tiny_config())
    model.save_pretrained(folder)
    (folder / "model.pickle").write_bytes(pickle.dumps(model))
    (folder / "config.pickle").write_bytes(pickle.dumps(model.config))
    subprocess.run(
        [sys.executable, "-c", RUN_IMPORT_ORDERS, folder, results, json.dumps(IMPORT_ORDERS)],
        env={"OMP_NUM_THREADS": "1"},
        check=True,
    )
    return {path.name: path.read_text() for path in results.iterdir()}


def test_importing_the_package_imports_neither_torch_nor_transformers(import_results):
    assert import_results["quick"] == "ok"


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_auto_classes_know_the_model_in_every_import_order(import_results, order):
    assert import_results[order] == "ok"


def test_a_spawned_worker_knows_the_model_from_the_pickled_config(save, tiny_config):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        model = pool.apply(AutoModelForCausalLM.from_config, (tiny_config(),))
    assert type(model) is hmoe.HMoEForCausalLM


@pytest.fixture
def save(tiny_config) -> Callable[..., hmoe.HMoEForCausalLM]:
    """Saves a tiny causal LM to a folder: `save(folder, shard="1GB", **config_overrides)`."""

    def save_tiny(folder: Path, *, shard: str = "1GB", **overrides) -> hmoe.HMoEForCausalLM:
        model = hmoe.HMoEForCausalLM(tiny_config(**overrides))
        model.save_pretrained(folder, max_shard_size=shard)
        return model

    return save_tiny


def assert_same_state(left: torch.nn.Module, right: torch.nn.Module) -> None:
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="plain"),
        pytest.param({"expert_intermediate_sizes": [[8, 16, 24], [32, 8]]}, id="sizes_by_layer"),
        pytest.param({"expert_tile_size": 4}, id="tile_below_gcd"),
        pytest.param({"router_type": "modse"}, id="modse"),
        pytest.param({"qk_norm": True, "attention_bias": True}, id="qk_norm_and_bias"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
    ],
)
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one_file", "sharded"])
def test_saved_and_loaded_weights_are_equal(save, tmp_path, overrides, shard):
    model = save(tmp_path, shard=shard, **overrides)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded, info = hmoe.HMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_state(loaded, model)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_bfloat16_weights_come_back_as_bfloat16(tiny_config, tmp_path):
    model = hmoe.HMoEForCausalLM(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_state(hmoe.HMoEForCausalLM.from_pretrained(tmp_path, dtype="auto"), model)


def test_tied_embeddings_are_on_disk_once_and_tied_again(save, tmp_path):
    save(tmp_path, tie_word_embeddings=True)
    names = load_file(tmp_path / "model.safetensors")
    assert [name for name in names if "embed" in name or "head" in name] == ["model.embed_tokens.weight"]
    loaded = hmoe.HMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_expert_banks_on_disk_have_the_documented_names_and_shapes(save, tmp_path):
    sizes = [[8, 16, 24], [32, 8]]
    model = save(tmp_path, expert_intermediate_sizes=sizes, expert_tile_size=4)
    banks = {name: list(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items() if "experts" in name}
    tile, hidden = 4, model.config.hidden_size
    expected = {}
    for layer, layer_sizes in enumerate(sizes):
        num_tiles = sum(layer_sizes) // tile
        expected[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = [num_tiles, 2 * tile, hidden]
        expected[f"model.layers.{layer}.mlp.experts.down_proj"] = [num_tiles, tile, hidden]
    assert banks == expected


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize("load", [hmoe.HMoEForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: cut(path, 0.5), id="truncated"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("<!DOCTYPE html><title>404</title>"), id="html_page"),
    ],
)
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one_file", "sharded"])
def test_a_broken_weights_file_is_named(save, tmp_path, shard, damage, load):
    save(tmp_path, shard=shard)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    damage(path)
    with pytest.raises(ValueError, match="truncated or not safetensors") as error:
        load(tmp_path)
    assert str(path) in str(error.value)
    assert f"{path.stat().st_size} bytes" in str(error.value)


def test_a_broken_weights_file_in_a_subfolder_is_named(save, tmp_path):
    save(tmp_path / "step-10")
    cut(tmp_path / "step-10" / "model.safetensors", 0.5)
    with pytest.raises(ValueError, match="truncated or not safetensors") as error:
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path, subfolder="step-10")
    assert str(tmp_path / "step-10" / "model.safetensors") in str(error.value)


def test_a_missing_shard_is_named(save, tmp_path):
    save(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_shard_index_is_named(save, tmp_path):
    save(tmp_path, shard="20KB")
    cut(tmp_path / "model.safetensors.index.json", 0.5)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(save, tmp_path, name):
    save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match="lacks 1 tensor") as error:
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path)
    assert f"`{name}`" in str(error.value) and str(tmp_path) in str(error.value)


def test_a_tensor_missing_from_a_given_state_dict_is_named(tiny_config):
    config = tiny_config()
    tensors = hmoe.HMoEForCausalLM(config).state_dict()
    del tensors["model.layers.1.mlp.gate.weight"]
    with pytest.raises(ValueError, match=r"`model\.layers\.1\.mlp\.gate\.weight`") as error:
        hmoe.HMoEForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
    assert "None" not in str(error.value)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"expert_intermediate_sizes": [8, 16, 24, 40]}, "model.layers.0.mlp.experts.gate_up_proj"),
        ({"expert_intermediate_sizes": [8, 16, 24, 24, 8]}, "model.layers.1.mlp.gate.weight"),
        ({"expert_tile_size": 4}, "model.layers.0.mlp.experts.down_proj"),
        ({"vocab_size": 65}, "lm_head.weight"),
    ],
    ids=["a_size", "number_of_experts", "tile", "vocabulary"],
)
def test_a_tensor_of_another_shape_than_the_config_says_is_named_with_both_shapes(save, tmp_path, changes, name):
    save(tmp_path, expert_intermediate_sizes=[8, 16, 24, 32])
    on_disk = load_file(tmp_path / "model.safetensors")[name].shape
    edit_config(tmp_path, **changes)
    expected = hmoe.HMoEForCausalLM(AutoConfig.from_pretrained(tmp_path)).get_parameter(name).shape
    with pytest.raises(ValueError, match="shape") as error:
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path)
    assert all(text in str(error.value) for text in (f"`{name}`", str(tuple(on_disk)), str(tuple(expected))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "tensor, overrides",
    [("weight", {}), ("noise_weight", {"router_type": "modse"}), ("noise_norm.weight", {"router_type": "modse"})],
    ids=["weight", "noise_weight", "noise_norm"],
)
def test_a_router_that_is_not_finite_is_named(save, tmp_path, tensor, overrides, value, dtype):
    save(tmp_path, **overrides)
    name = f"model.layers.1.mlp.gate.{tensor}"
    edit_tensors(tmp_path, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match="finite") as error:
        hmoe.HMoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert f"`{name}`" in str(error.value)


@pytest.fixture
def llama(tmp_path) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("loader", [hmoe.HMoEForCausalLM, hmoe.HMoEConfig])
def test_a_checkpoint_of_another_model_type_is_refused(llama, loader):
    with pytest.raises(ValueError, match="'llama', not 'hmoe'"):
        loader.from_pretrained(llama)


def test_a_checkpoint_of_another_model_is_refused_whatever_config_is_given(tiny_config, llama):
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate\.weight"):
        hmoe.HMoEForCausalLM.from_pretrained(llama, config=tiny_config())


@pytest.mark.parametrize("loader", [hmoe.HMoEForCausalLM, hmoe.HMoEConfig, AutoModelForCausalLM, AutoConfig])
class TestBadConfigFile:
    def test_of_a_newer_format_names_both_versions(self, save, tmp_path, loader):
        config = save(tmp_path).config
        edit_config(tmp_path, format_version=config.format_version + 1)
        with pytest.raises(ValueError, match=f"`format_version`={config.format_version + 1}.*newer"):
            loader.from_pretrained(tmp_path)

    def test_with_a_format_version_that_is_no_number_is_refused(self, save, tmp_path, loader):
        save(tmp_path)
        edit_config(tmp_path, format_version="two")
        with pytest.raises(StrictDataclassError, match=r"(?s)format_version.*int"):
            loader.from_pretrained(tmp_path)

    @pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "truncated"])
    def test_of_broken_json_is_named(self, save, tmp_path, loader, share):
        save(tmp_path)
        cut(tmp_path / "config.json", share)
        with pytest.raises(OSError, match=r"config\.json.*not a valid JSON"):
            loader.from_pretrained(tmp_path)

    def test_that_is_missing_is_named(self, save, tmp_path, loader):
        save(tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            loader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "head", ["HMoEForSequenceClassification", "HMoEForTokenClassification", "HMoEForQuestionAnswering"]
)
def test_a_new_head_starts_on_the_pretrained_body(save, tmp_path, head):
    model = save(tmp_path)
    loaded, info = getattr(hmoe, head).from_pretrained(tmp_path, output_loading_info=True)
    assert_same_state(getattr(loaded, loaded.base_model_prefix), model.model)
    assert info["missing_keys"] and not any(name.startswith("model.") for name in info["missing_keys"])
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}


def test_ignore_mismatched_sizes_replaces_a_head_and_keeps_the_body(tiny_config, tmp_path):
    saved = hmoe.HMoEForSequenceClassification(tiny_config(num_labels=3))
    saved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`score\.weight`"):
        hmoe.HMoEForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    loaded, info = hmoe.HMoEForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert_same_state(loaded.model, saved.model)
    assert loaded.score.out_features == 5
    assert [name for name, *_ in info["mismatched_keys"]] == ["score.weight"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"device_map": "cpu"}, id="cpu"),
        pytest.param({"device_map": "auto"}, id="auto"),
        pytest.param({"device_map": {"": "cpu"}}, id="mapping"),
        pytest.param({"low_cpu_mem_usage": True}, id="low_cpu_mem_usage"),
        pytest.param({"device_map": {"lm_head": "cpu", "model": "disk"}}, id="offloaded_to_disk"),
    ],
)
def test_placement_options_do_not_change_the_outputs(save, tmp_path, options):
    model = save(tmp_path)
    if "disk" in str(options):
        options = {**options, "offload_folder": tmp_path / "offload"}
    assert torch.equal(first_output(hmoe.HMoEForCausalLM.from_pretrained(tmp_path, **options)), first_output(model))


def test_loading_to_the_meta_device_reads_no_weights(save, tmp_path):
    model = save(tmp_path)
    loaded = hmoe.HMoEForCausalLM.from_pretrained(tmp_path, device_map="meta")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in model.parameters()]


def test_a_state_dict_can_be_given_instead_of_a_folder(tiny_config):
    model = hmoe.HMoEForCausalLM(tiny_config())
    loaded = hmoe.HMoEForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_state(loaded, model)
