"""Benchmarks of the papers: each YAML file is one task group of lm_eval, named after the file."""

from pathlib import Path


SUITES_FOLDER = Path(__file__).parent
SUITES = tuple(sorted(path.stem for path in SUITES_FOLDER.glob("*.yaml")))
