"""A model that FSDP2 has wrapped is saved as the model it is."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from hmoe import HMoEConfig, HMoEForCausalLM


def wrap_and_save(rank: int, folder: Path, config: HMoEConfig) -> dict[str, str]:
    torch.manual_seed(0)
    model = fully_shard(HMoEForCausalLM(config))
    before = type(model).__name__
    state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(folder / "wrapped", is_main_process=rank == 0, state_dict=state_dict)
    return {"before": before, "after": type(model).__name__, "base": type(model).__mro__[2].__name__}


@pytest.fixture
def names(tiny_config, tmp_path: Path) -> dict[str, str]:
    torch.manual_seed(0)
    HMoEForCausalLM(tiny_config()).save_pretrained(tmp_path / "plain")
    return run_ranks(2, wrap_and_save, tmp_path, tiny_config())


def test_the_class_keeps_fsdps_name_and_the_checkpoint_has_the_models(names, tmp_path):
    assert names == {"before": "FSDPHMoEForCausalLM", "after": "FSDPHMoEForCausalLM", "base": "HMoEForCausalLM"}
    plain, wrapped = tmp_path / "plain", tmp_path / "wrapped"
    assert {path.name for path in wrapped.iterdir()} == {path.name for path in plain.iterdir()}
    for path in wrapped.glob("*.py"):
        assert path.read_bytes() == (plain / path.name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (plain, wrapped)]
    assert configs[0] == configs[1]
    assert configs[1]["architectures"] == ["HMoEForCausalLM"]
    loaded, expected = (HMoEForCausalLM.from_pretrained(folder) for folder in (wrapped, plain))
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
