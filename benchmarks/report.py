"""Writes the tables and pictures of `docs/performance.md` from the JSON files of the benchmarks.

    python benchmarks/report.py
    python benchmarks/report.py --folder runs/performance --page runs/performance.md --images runs

A table stands between `<!-- BEGIN name -->` and `<!-- END name -->`; what is between them is replaced, all else stays.
Tables whose benchmark has no file in the folder stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import plots
from timing import Row, markdown_table, show_spread


ROOT = Path(__file__).parents[1]
BENCHMARKS = ("experts", "growth", "train_step", "generate", "soak")
OURS = "hmoe grouped_mm"  # the default backend
Results = dict[str, dict]


def read_results(folder: Path) -> Results:
    results = {}
    for name in BENCHMARKS:
        path = folder / f"{name}.json"
        if path.exists():
            try:
                results[name] = json.loads(path.read_text(encoding="utf-8"))
                results[name]["rows"]
            except (json.JSONDecodeError, KeyError) as error:
                raise SystemExit(f"{path} is not the output of benchmarks/{name}.py: {error!r}") from None
    if not results:
        raise SystemExit(f"no results in {folder}: run `make benchmark`, or a benchmark with --json")
    return results


def environment_table(results: Results) -> str:
    rows = [{"benchmark": name, **content["environment"]} for name, content in results.items()]
    names = ["benchmark", *next(iter(results.values()))["environment"]]
    return markdown_table(rows, {name: name for name in names})


def targets_table(results: Results) -> str:
    rows = list(_targets(results))
    columns: dict[str, str | Callable[[Row], str]] = {
        "work": "work",
        "figure": "figure",
        "target": lambda row: f"{row['sign']} {row['target']}",
        "measured": lambda row: show_spread(row["value"]),
        "met": lambda row: "yes" if _meets(row) else "no",
    }
    return markdown_table(rows, columns)


def _meets(row: Row) -> bool:
    median = round(row["value"]["median"], 2)
    return median >= row["target"] if row["sign"] == ">=" else median <= row["target"]


def _targets(results: Results) -> Iterator[Row]:
    layers = [row for row in results.get("experts", {}).get("rows", []) if "skipped" not in row]
    for row in layers:
        if row["contender"] != OURS or not plots.is_plain(row):
            continue
        tokens = f"{row['tokens']} token{'s' if row['tokens'] > 1 else ''}"
        work = f"{row['experts']} experts, {tokens}, {row['pass']}"
        base = {"work": work, "sign": "<="}
        if row["experts"] == 8 and row["tokens"] == 4096 and row["backward"]:
            peers = [peer for peer in layers if _same_point(peer, row) and peer["contender"].startswith("mixtral")]
            saved = row["saved_mib"] / min(peer["saved_mib"] for peer in peers)
            yield {**base, "figure": "time / dense", "target": 1.06, "value": row["ratio"]}
            yield {**base, "figure": "time / fastest stock", "target": 0.85, "value": row["ratio_to_stock"]}
            constant = {"median": saved, "low": saved, "high": saved}
            yield {**base, "figure": "saved bytes / leanest stock", "target": 0.55, "value": constant}
        elif row["experts"] > 8 and row["tokens"] > 16:
            target = 0.83 if row["experts"] == 256 else 1.0
            yield {**base, "figure": "time / fastest stock", "target": target, "value": row["ratio_to_stock"]}
        elif row["tokens"] <= 16 and not row["backward"]:
            yield {**base, "figure": "time / fastest stock", "target": 1.0, "value": row["ratio_to_stock"]}
            yield {**base, "figure": "time / reading weights", "target": 1.15, "value": row["ratio_to_read"]}
    for row in layers:
        if row["contender"] == OURS and row["routing"] == "zipf":
            even = [peer for peer in layers if _same_point(peer, {**row, "routing": "uniform"})]
            for peer in even:
                if peer["contender"] == OURS:
                    figure = f"cost per FLOP / dense (even routing: {peer['cost_per_flop']['median']:.2f})"
                    work = f"{row['experts']} experts, {row['tokens']} tokens, zipf routing"
                    target = round(peer["cost_per_flop"]["high"], 2)
                    yield {"work": work, "figure": figure, "sign": "<=", "target": target} | {
                        "value": row["cost_per_flop"]
                    }
    spreads = [
        row
        for row in results.get("growth", {}).get("rows", [])
        if row["against"] == "spread" and row["contender"] == OURS
    ]
    if len(spreads) > 1:
        narrow, wide = spreads[0], spreads[-1]
        figure = f"time / dense (equal sizes: {narrow['ratio']['median']:.2f})"
        work = f"sizes {wide['widest'] / wide['narrowest']:.0f}:1, forward+backward"
        target = round(narrow["ratio"]["high"], 2)
        yield {"work": work, "figure": figure, "sign": "<=", "target": target, "value": wide["ratio"]}
    for row in results.get("train_step", {}).get("rows", []):
        if row["contender"] == "hmoe":
            figure = "tokens/s over fastest stock"
            yield {"work": "training step", "figure": figure, "sign": ">=", "target": 1.1} | {
                "value": row["speed_to_stock"]
            }
    for row in results.get("generate", {}).get("rows", []):
        if row["contender"] == "hmoe" and row["stage"] == "decode":
            work = f"decode, batch {row['batch']}"
            yield {"work": work, "figure": "tokens/s over fastest stock", "sign": ">=", "target": 1.05} | {
                "value": row["speed_to_stock"]
            }


POINT = ("experts", "tokens", "dtype", "sizes", "routing", "pass")


def _same_point(row: Row, other: Row) -> bool:
    return all(row[key] == other[key] for key in POINT)


def experts_table(results: Results) -> str:
    """Time over dense, a line per point and a column per contender."""
    return _matrix(results["experts"]["rows"], plots.is_plain, "ratio", ("experts", "tokens", "pass"))


def factors_table(results: Results) -> str:
    rows = results["experts"]["rows"]
    return _matrix(rows, lambda row: not plots.is_plain(row), "cost_per_flop", POINT)


def _matrix(rows: Sequence[Row], chosen: Callable[[Row], bool], key: str, labels: Sequence[str]) -> str:
    points: dict[tuple, Row] = {}
    contenders: dict[str, None] = {}
    for row in rows:
        if not chosen(row) or row["contender"] in ("dense", "read", "copy"):
            continue
        point = points.setdefault(tuple(row[name] for name in POINT), {name: row[name] for name in POINT})
        contenders[row["contender"]] = None
        point[row["contender"]] = "skipped" if "skipped" in row else show_spread(row.get(key))
    return markdown_table(list(points.values()), {name: name for name in (*labels, *contenders)})


def few_tokens_table(results: Results) -> str:
    """Forward on few tokens, where reading the weights is the bound."""
    rows = [row for row in results["experts"]["rows"] if "ratio_to_read" in row]
    columns: dict[str, str | Callable[[Row], str]] = {
        "experts": "experts",
        "tokens": "tokens",
        "dtype": "dtype",
        "contender": "contender",
        "us": lambda row: f"{1000 * row['milliseconds']:,.0f}",
        "time / read": lambda row: show_spread(row["ratio_to_read"]),
        "time / dense": lambda row: show_spread(row.get("ratio")),
        "time / fastest stock": lambda row: show_spread(row.get("ratio_to_stock")),
        "GB/s": lambda row: f"{row['gigabytes_per_second']:.1f}" if "gigabytes_per_second" in row else "-",
    }
    return markdown_table(rows, columns)


def memory_table(results: Results) -> str:
    rows = [row for row in results["experts"]["rows"] if "peak_mib" in row]
    columns: dict[str, str | Callable[[Row], str]] = {
        "experts": "experts",
        "tokens": "tokens",
        "contender": "contender",
        "kept for backward MiB": lambda row: f"{row['saved_mib']:,.0f}",
        "peak over weights and inputs MiB": lambda row: f"{row['peak_mib']:,.0f}",
    }
    return markdown_table(rows, columns)


def growth_table(results: Results) -> str:
    import growth

    rows = [row for row in results["growth"]["rows"] if "ratio" in row and row["contender"] != "dense"]
    return markdown_table(rows, growth.COLUMNS)


def twins_table(results: Results) -> str:
    import train_step

    return markdown_table(results["train_step"]["rows"], train_step.TWINS_COLUMNS)


def trainers_table(results: Results) -> str:
    import train_step

    return markdown_table(results["train_step"]["trainers"], train_step.TRAINERS_COLUMNS)


def generate_table(results: Results) -> str:
    import generate

    return markdown_table(results["generate"]["rows"], generate.COLUMNS)


def loading_table(results: Results) -> str:
    import generate

    return markdown_table(results["generate"]["loading"], generate.LOADING_COLUMNS)


def soak_table(results: Results) -> str:
    columns: dict[str, str | Callable[[Row], str]] = {
        "shapes": lambda row: f"{row['checked']['shapes']:,}",
        "on": lambda row: ", ".join(f"{name} {row['checked'].get(name, 0):,}" for name in row["backends"]),
        "mismatches": "mismatches",
        "seconds": lambda row: f"{row['seconds']:,.0f}",
    }
    return markdown_table(results["soak"]["rows"], columns)


# Name, benchmark that must have run (None: any), table.
TABLES: tuple[tuple[str, str | None, Callable[[Results], str]], ...] = (
    ("environment", None, environment_table),
    ("targets", None, targets_table),
    ("experts", "experts", experts_table),
    ("few-tokens", "experts", few_tokens_table),
    ("memory", "experts", memory_table),
    ("factors", "experts", factors_table),
    ("growth", "growth", growth_table),
    ("training", "train_step", twins_table),
    ("trainers", "train_step", trainers_table),
    ("generation", "generate", generate_table),
    ("loading", "generate", loading_table),
    ("soak", "soak", soak_table),
)
PICTURES: tuple[tuple[str, str, Callable], ...] = (
    ("experts", "experts", plots.experts_figure),
    ("memory", "experts", plots.memory_figure),
    ("growth-experts", "growth", lambda rows: plots.growth_figure(rows, "experts")),
    ("growth-tokens", "growth", lambda rows: plots.growth_figure(rows, "tokens")),
    ("growth-spread", "growth", lambda rows: plots.growth_figure(rows, "spread")),
    ("generate", "generate", plots.generate_figure),
)


def replace_table(page: str, name: str, table: str, path: Path) -> str:
    pattern = re.compile(rf"(<!-- BEGIN {re.escape(name)} -->\n).*?(<!-- END {re.escape(name)} -->)", re.DOTALL)
    page, count = pattern.subn(lambda match: match[1] + table + "\n" + match[2], page)
    if count != 1:
        raise SystemExit(f"{path} needs one pair of lines `<!-- BEGIN {name} -->` and `<!-- END {name} -->`")
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "performance", help="of the JSON files")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args(argv)
    results = read_results(options.folder)
    if not options.page.exists():
        parser.error(f"--page {options.page} does not exist")
    page = options.page.read_text(encoding="utf-8")
    for name, needed, make in TABLES:
        if needed is None or needed in results:
            page = replace_table(page, name, make(results), options.page)
    for name, needed, draw in PICTURES:
        figure = draw(results[needed]["rows"]) if needed in results else None
        if figure:
            options.images.mkdir(parents=True, exist_ok=True)
            figure.savefig(options.images / f"performance-{name}.png", dpi=110)
    options.page.write_text(page, encoding="utf-8")
    missing = [name for name in BENCHMARKS if name not in results]
    if missing:
        print(f"not measured, left as they are: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    main()
