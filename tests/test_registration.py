"""The Auto classes know the model in every order of imports, and other libraries stay as they were."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import hmoe


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
    "mixtral_stays_as_it_is": """
from transformers.models.mixtral import modeling_mixtral
before = dict(vars(modeling_mixtral))
import hmoe
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
check(AutoModelForCausalLM)
copy = get_class_from_dynamic_module("modeling_hmoe.HMoEForCausalLM", folder)
assert copy is not hmoe.HMoEForCausalLM
assert vars(modeling_mixtral) == before
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
        env={
            "OMP_NUM_THREADS": "1",
            "HF_MODULES_CACHE": str(results.with_name("modules")),
            "PYTHONPATH": str(Path(hmoe.__file__).parents[1]),  # this copy of the package, whatever is installed
        },
        check=True,
    )
    return {path.name: path.read_text() for path in results.iterdir()}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_auto_classes_know_the_model_in_every_import_order(import_results, order):
    assert import_results[order] == "ok"


def test_a_spawned_worker_knows_the_model_from_the_pickled_config(tiny_config):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        model = pool.apply(AutoModelForCausalLM.from_config, (tiny_config(),))
    assert type(model) is hmoe.HMoEForCausalLM
