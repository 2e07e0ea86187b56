"""Sizes of the experts of a layer, by the strategies of HMoE (arXiv 2408.10681) and MoDSE (arXiv 2409.12210).

A strategy is one entry of `SIZE_STRATEGIES`. It counts in units, of which `multiple_of` neurons make one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class SizeStrategy(NamedTuple):
    """A rule for the sizes of the experts of a layer.

    Attributes:
        make: sizes in units from the number of experts, the sum of all sizes in units, and the spread.
        has_spread: whether `spread` can be chosen.
        units_step: from the number of experts, what the sum of all sizes in units must be a multiple of.
    """

    make: Callable[[int, int, float | None], list[int]]
    has_spread: bool = False
    units_step: Callable[[int], int] = lambda num_experts: 1


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
    rule = find_strategy(strategy)
    for name, value in (("num_experts", num_experts), ("total", total), ("multiple_of", multiple_of)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}")
    if spread is not None and not rule.has_spread:
        having = " and ".join(repr(name) for name, rule in SIZE_STRATEGIES.items() if rule.has_spread)
        raise ValueError(f"`spread` applies to {having} sizes, not to {strategy!r}")
    is_number = isinstance(spread, int | float) and not isinstance(spread, bool)
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
    if units % (step := rule.units_step(num_experts)):
        raise ValueError(
            f"`total`={total} cannot be cut into {strategy!r} sizes of {num_experts} experts in multiples of "
            f"{multiple_of}: use a multiple of {step * multiple_of}"
        )
    return [size * multiple_of for size in rule.make(num_experts, units, spread)]


def find_strategy(name: str) -> SizeStrategy:
    """An entry of `SIZE_STRATEGIES`; ValueError with the list for another name."""
    if name not in SIZE_STRATEGIES:
        raise ValueError(f"`strategy` must be one of {list(SIZE_STRATEGIES)}, got {name!r}")
    return SIZE_STRATEGIES[name]


def _arithmetic(num_experts: int, units: int, spread: float | None) -> list[int]:
    spread = 23 / 9 if spread is None else spread
    steps = max(num_experts - 1, 1)
    return _apportion([1 / spread + (1 - 1 / spread) * i / steps for i in range(num_experts)], units)


def _geometric(num_experts: int, units: int, spread: float | None) -> list[int]:
    steps = max(num_experts - 1, 1)
    log_spread = math.log(2) * steps if spread is None else math.log(spread)
    # The largest ratio is 1, so that none overflows.
    return _apportion([math.exp(log_spread * (i / steps - 1)) for i in range(num_experts)], units)


def _hybrid(num_experts: int, units: int, spread: float | None) -> list[int]:
    if num_experts % 4:
        raise ValueError(
            f"`num_experts`={num_experts} cannot be split into half size 1, a quarter size 2 and a quarter size "
            "4: 'hybrid' needs a multiple of 4"
        )
    return _apportion([1.0] * (num_experts // 2) + [2.0] * (num_experts // 4) + [4.0] * (num_experts // 4), units)


def _uniform(num_experts: int, units: int, spread: float | None) -> list[int]:
    return _apportion([1.0] * num_experts, units)


def _pairs(num_experts: int, units: int, spread: float | None) -> list[int]:
    if num_experts % 2:
        raise ValueError(f"`num_experts`={num_experts} is odd: 'pairs' needs an even number of experts")
    num_pairs = num_experts // 2
    pair_units = units // num_pairs
    sizes = []
    for pair in range(num_pairs):
        # MoDSE's four pairs deviate from the mean by 0.8, 0.6, 0.2 and 0; other counts interpolate between them.
        position = 3 * pair / max(num_pairs - 1, 1)
        left = min(int(position), 2)
        offsets = (0.8, 0.6, 0.2, 0.0)
        offset = offsets[left] + (offsets[left + 1] - offsets[left]) * (position - left)
        large = min(math.floor(pair_units / 2 * (1 + offset) + 0.5), pair_units - 1)
        sizes += [large, pair_units - large]
    return sizes


def _apportion(ratios: list[float], units: int) -> list[int]:
    """Whole numbers of at least 1 proportional to `ratios` that sum to `units` (largest remainders)."""
    quotas = [ratio / sum(ratios) * units for ratio in ratios]
    shares = [max(1, math.floor(quota + 1e-9)) for quota in quotas]
    while sum(shares) < units:
        shares[max(range(len(shares)), key=lambda i: quotas[i] - shares[i])] += 1
    while sum(shares) > units:
        shares[min((i for i in range(len(shares)) if shares[i] > 1), key=lambda i: quotas[i] - shares[i])] -= 1
    return shares


SIZE_STRATEGIES = {
    "arithmetic": SizeStrategy(_arithmetic, has_spread=True),
    "geometric": SizeStrategy(_geometric, has_spread=True),
    "hybrid": SizeStrategy(_hybrid),
    "pairs": SizeStrategy(_pairs, units_step=lambda num_experts: num_experts // 2 or 1),
    "uniform": SizeStrategy(_uniform),
}
