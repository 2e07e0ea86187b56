"""Sizes of the experts of a layer, by the strategies of both papers.

HMoE: arXiv 2408.10681; MoDSE: arXiv 2409.12210. This file travels with every saved checkpoint, so it imports only the
standard library.
"""

import math


SIZE_STRATEGIES = ("arithmetic", "geometric", "hybrid", "pairs", "uniform")


def expert_sizes(
    strategy: str, num_experts: int, total: int, multiple_of: int = 1, spread: float | None = None
) -> list[int]:
    """Intermediate sizes of `num_experts` experts that sum to `total` neurons.

    | strategy | sizes | source |
    |---|---|---|
    | `arithmetic` | equal steps, largest / smallest = 23 / 9 (8 experts: 9, 11, ..., 23) | HMoE, main results |
    | `geometric` | each twice the one before (8 experts: 1, 2, ..., 128) | HMoE Fig. 8 |
    | `hybrid` | half 1, a quarter 2, a quarter 4 | HMoE Fig. 8 |
    | `pairs` | (large, small) neighbours of one sum; 8 experts: 9, 1, 8, 2, 6, 4, 5, 5 | MoDSE Tables 1-2 |
    | `uniform` | all equal | the homogeneous twin |

    Args:
        total: sum of all sizes, in neurons.
        multiple_of: every size is a multiple of it (the largest possible tile); rounding keeps the sum (and, for
            `pairs`, the sum of each pair).
        spread: largest / smallest size, at least 1, for `arithmetic` (default 23 / 9) and `geometric` (default 2 per
            step).

    Raises:
        ValueError: with the argument, its value and the remedy.
    """
    if strategy not in SIZE_STRATEGIES:
        raise ValueError(f"`strategy` must be one of {list(SIZE_STRATEGIES)}, got {strategy!r}")
    for name, value in (("num_experts", num_experts), ("total", total), ("multiple_of", multiple_of)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}")
    if spread is not None and strategy not in ("arithmetic", "geometric"):
        raise ValueError(f"`spread` applies to 'arithmetic' and 'geometric' sizes, not to {strategy!r}")
    is_number = isinstance(spread, (int, float)) and not isinstance(spread, bool)
    if spread is not None and not (is_number and 1 <= spread < math.inf):
        raise ValueError(f"`spread` (largest / smallest size) must be a finite number of at least 1, got {spread!r}")
    if total % multiple_of:
        raise ValueError(
            f"`total`={total} is not divisible by `multiple_of`={multiple_of}: no sizes that are multiples of "
            f"{multiple_of} sum to it; the nearest totals are {total - total % multiple_of} and "
            f"{total - total % multiple_of + multiple_of}"
        )
    units = total // multiple_of
    if units < num_experts:
        raise ValueError(
            f"`total`={total} gives {num_experts} experts fewer than `multiple_of`={multiple_of} neurons each: "
            f"raise `total` to {num_experts * multiple_of} or more, or lower `multiple_of`"
        )
    if strategy == "pairs":
        return _pair_sizes(num_experts, total, multiple_of)
    return [unit * multiple_of for unit in _apportion(_size_ratios(strategy, num_experts, spread), units)]


def _size_ratios(strategy: str, num_experts: int, spread: float | None) -> list[float]:
    steps = max(num_experts - 1, 1)
    if strategy == "arithmetic":
        spread = 23 / 9 if spread is None else spread
        return [1 / spread + (1 - 1 / spread) * i / steps for i in range(num_experts)]
    if strategy == "geometric":
        log_spread = math.log(2) * steps if spread is None else math.log(spread)
        return [math.exp(log_spread * (i / steps - 1)) for i in range(num_experts)]  # the largest is 1: no overflow
    if strategy == "hybrid":
        if num_experts % 4:
            raise ValueError(
                f"`num_experts`={num_experts} cannot be split into half size 1, a quarter size 2 and a quarter size "
                "4: 'hybrid' needs a multiple of 4"
            )
        return [1.0] * (num_experts // 2) + [2.0] * (num_experts // 4) + [4.0] * (num_experts // 4)
    if strategy == "uniform":
        return [1.0] * num_experts
    raise AssertionError(strategy)


def _apportion(ratios: list[float], units: int) -> list[int]:
    """Whole numbers of at least 1 proportional to `ratios` that sum to `units` (largest remainders)."""
    quotas = [ratio / sum(ratios) * units for ratio in ratios]
    shares = [max(1, math.floor(quota + 1e-9)) for quota in quotas]
    while sum(shares) < units:
        shares[max(range(len(shares)), key=lambda i: quotas[i] - shares[i])] += 1
    while sum(shares) > units:
        shares[min((i for i in range(len(shares)) if shares[i] > 1), key=lambda i: quotas[i] - shares[i])] -= 1
    return shares


def _pair_sizes(num_experts: int, total: int, multiple_of: int) -> list[int]:
    if num_experts % 2:
        raise ValueError(f"`num_experts`={num_experts} is odd: 'pairs' needs an even number of experts")
    num_pairs = num_experts // 2
    pair_units, remainder = divmod(total // multiple_of, num_pairs)
    if remainder:
        raise ValueError(
            f"`total`={total} does not give {num_pairs} pairs of equal sum in multiples of {multiple_of}: "
            f"use a multiple of {num_pairs * multiple_of}"
        )
    sizes = []
    for pair in range(num_pairs):
        # MoDSE's four pairs deviate from the mean by 0.8, 0.6, 0.2 and 0; other counts interpolate between them.
        position = 3 * pair / max(num_pairs - 1, 1)
        left = min(int(position), 2)
        offsets = (0.8, 0.6, 0.2, 0.0)
        offset = offsets[left] + (offsets[left + 1] - offsets[left]) * (position - left)
        large = min(math.floor(pair_units / 2 * (1 + offset) + 0.5), pair_units - 1)
        sizes += [large * multiple_of, (pair_units - large) * multiple_of]
    return sizes
