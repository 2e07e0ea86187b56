"""Shared by all tests: a small config, and a fixed seed for everything random."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings


# Triton reads it when it is first imported, which Transformers may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nor is what a user's caches hold for tests to read: code of checkpoints, encoded data sets, models.
_CACHES = tempfile.TemporaryDirectory(prefix="hmoe-tests-")
for _name in ("DATASETS", "HUB", "MODULES"):
    os.environ[f"HF_{_name}_CACHE"] = os.path.join(_CACHES.name, _name.lower())

from hmoe import HMoEConfig  # noqa: E402


# The same examples on every run, and no time limit on any of them: CI machines are shared and slow.
settings.register_profile("hmoe", deadline=None, derandomize=True)
settings.load_profile("hmoe")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _empty_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(autouse=True)
def _nowhere(_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths lead to an empty folder, never to what a user made in the checkout, such as runs/."""
    monkeypatch.chdir(_empty_folder)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., HMoEConfig]:
    """Makes the config of a model with two layers of four experts; `tiny_config(**overrides)` replaces fields."""

    def make(**overrides) -> HMoEConfig:
        fields = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "expert_intermediate_sizes": [8, 16, 24, 32],
        }
        return HMoEConfig(**{**fields, **overrides})

    return make
