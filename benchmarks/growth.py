"""How the cost of a layer of experts grows: with experts and with width spread at equal FLOPs, and with tokens.

    python benchmarks/growth.py --json docs/performance/growth.json
    python benchmarks/growth.py --against experts --experts 2 16 128 --contenders "hmoe grouped_mm" "mixtral eager"

Every figure is a ratio to one dense gated FFN of the same FLOPs, as in `experts.py`, which measures them. Against
experts, the mean size and the tokens stay, so that FLOPs do and parameters grow; against spread, sizes are geometric
and their sum stays. Routing gives every expert the same number of tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import experts
import timing
import torch
from experts import FEW_TOKENS, Point


EXPERTS = [2, 4, 8, 16, 32, 64, 128, 256]
TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 8192]
SPREADS = [1, 2, 4, 8, 16, 32, 64, 128]
DEFAULT_CONTENDERS = ["hmoe grouped_mm", "mixtral eager", "mixtral grouped_mm"]


def make_points(options: argparse.Namespace) -> dict[str, list[Point]]:
    base = Point(tokens=options.batch, hidden=options.hidden, total=options.total)
    points = {
        "experts": [replace(base, experts=count, total=count * options.mean) for count in options.experts],
        "tokens": [
            replace(base, tokens=tokens, backward=backward, layers=1 if tokens > FEW_TOKENS else 2)
            for backward in (False, True)
            for tokens in options.tokens
        ],
        "spread": [
            replace(base, sizes="geometric", spread=spread, multiple_of=max(1, options.total // 256))
            for spread in options.spreads
        ],
    }
    return {factor: points[factor] for factor in options.against}


COLUMNS = {
    "against": "against",
    "experts": "experts",
    "tokens": "tokens",
    "largest / smallest": lambda row: f"{row['widest'] / row['narrowest']:.3g}",
    "pass": "pass",
    "contender": "contender",
    "ms": "milliseconds",
    "time / dense": lambda row: timing.show_spread(row["ratio"]),
    "time / fastest stock": lambda row: timing.show_spread(row.get("ratio_to_stock")),
    "rounds": "rounds",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = timing.make_parser(__doc__, rounds=7, seconds=6)
    factors = ["experts", "tokens", "spread"]
    parser.add_argument("--against", choices=factors, nargs="+", default=factors)
    parser.add_argument("--experts", type=timing.positive_int, nargs="+", default=EXPERTS)
    parser.add_argument("--tokens", type=timing.positive_int, nargs="+", default=TOKENS)
    parser.add_argument("--spreads", type=timing.positive_int, nargs="+", default=SPREADS)
    parser.add_argument("--batch", type=timing.positive_int, default=4096, help="tokens, where they do not vary")
    parser.add_argument("--hidden", type=timing.positive_int, default=512)
    parser.add_argument("--total", type=timing.positive_int, default=8192, help="neurons of the eight experts")
    parser.add_argument("--mean", type=timing.positive_int, default=256, help="mean size, where experts vary")
    choices = [name for name in experts.CONTENDERS if name != "dense"]
    parser.add_argument("--contenders", choices=choices, nargs="+", default=DEFAULT_CONTENDERS)
    options = parser.parse_args(argv)
    try:
        options.points = make_points(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    points = [(factor, point) for factor, chosen in options.__dict__.pop("points").items() for point in chosen]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[timing.Row] = []
    bar = timing.progress(points, "growth")
    for factor, point in bar:
        bar.set_postfix_str(f"{factor}: {point}")
        contenders = [*options.contenders, "dense"]
        found = experts.measure(point, contenders, rounds=options.rounds, max_seconds=options.seconds)
        rows += [{"against": factor, **row} for row in found if row["contender"] in contenders]
    print(timing.markdown_table([row for row in rows if "skipped" not in row], COLUMNS))
    if options.json:
        timing.write_json(options.json, "growth", options, rows)


if __name__ == "__main__":
    main()
