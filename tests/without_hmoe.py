"""Python processes in which `hmoe` cannot be imported, as on a machine that only has a checkpoint's own code."""

import os
import subprocess
import sys
from pathlib import Path


_BLOCK = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hmoe":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
"""


def run_without_hmoe(code: str, *args: str | Path, home: Path) -> None:
    """Runs `code` offline with `args` as sys.argv[1:]; an AssertionError holds its stderr if it fails."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_HOME": str(home),  # the cache of checkpoints' code and of data sets
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # -I: neither the working directory nor PYTHONPATH can bring the package in.
    process = subprocess.run(
        [sys.executable, "-I", "-c", _BLOCK + code, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-5000:]
