"""The first command of the README, with one step of training: it ends with the figures and the picture it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hmoe


QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


def test_the_quickstart_runs_to_its_end(tmp_path):
    command = [sys.executable, QUICKSTART, "--max_steps", "1", "--no_benchmark", "--output_dir", tmp_path]
    package = str(Path(hmoe.__file__).parents[1])  # this copy, whatever is installed
    environment = {**os.environ, "PYTHONPATH": package, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["reloaded_class"].startswith("transformers_modules.")
    assert results["steps"] == 1 and results["loss_after"] < results["loss_before"]
    assert len(results["load"]) == 4
    assert all(sum(layer) == pytest.approx(2) and max(layer) <= 1 for layer in results["load"])
    assert f"{results['loss_after']:.3f} nats/token" in done.stdout
    assert (tmp_path / "load_per_expert.png").read_bytes().startswith(b"\x89PNG")
