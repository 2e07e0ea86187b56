"""Which rank holds which experts: MoDSE's expert pairs, and balanced placements for any sizes and loads.

    placements = place_layers(config.layer_expert_sizes, 4, "pairs")
    config = reorder_config(config, [placement.order for placement in placements])

Expert parallelism cuts the bank of tiles of a layer into equal runs, one per rank, so a placement is an order of the
experts: renaming them changes no output, and the order of `expert_intermediate_sizes` in the config records it. Where
every rank gets the same number of tiles, the runs are the placement. Where not, experts are split at the cuts:
parameters stay equal, and the tokens of a split expert travel to all of its ranks. `hmoe convert place` reorders a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .configuration_hmoe import HMoEConfig
from .parallel_hmoe import check_tiles_divide


METHODS = ("pairs", "balanced", "contiguous", "round_robin")
Load = Sequence[float]


@dataclass(frozen=True)
class Placement:
    """Experts of one layer by rank; `ranks[r]` are the ids of the experts of rank r."""

    ranks: tuple[tuple[int, ...], ...]

    @property
    def order(self) -> list[int]:
        """Expert ids in the order in which the bank holds them."""
        return [expert for experts in self.ranks for expert in experts]

    def totals(self, values: Sequence[float]) -> list[float]:
        """Per rank, the sum of a value of its experts, such as size or work."""
        return [sum(values[expert] for expert in experts) for experts in self.ranks]


def max_over_mean(values: Sequence[float]) -> float:
    """How much the most loaded rank exceeds the mean; 1 is perfect balance, also of zeros."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def expected_work(sizes: Sequence[int], load: Load | None = None) -> list[float]:
    """Neurons computed per token by each expert: size x share of the tokens (default: equal shares)."""
    load = [1 / len(sizes)] * len(sizes) if load is None else load
    if len(load) != len(sizes):
        raise ValueError(f"`load` has {len(load)} experts, the layer has {len(sizes)}")
    if any(not 0 <= share < float("inf") for share in load):
        raise ValueError(f"`load` must hold shares that are finite and not negative, got {list(load)}")
    return [size * share for size, share in zip(sizes, load)]


def place_experts(
    sizes: Sequence[int], num_ranks: int, method: str = "pairs", *, load: Load | None = None
) -> Placement:
    """Places the experts of one layer.

    | method | what | needs |
    |---|---|---|
    | `pairs` | the smallest with the largest, and so on; pairs to ranks by work (MoDSE) | whole pairs per rank |
    | `balanced` | longest processing time first: the heaviest to the rank with the least so far | |
    | `contiguous` | equal counts in the given order | ranks that divide the experts |
    | `round_robin` | expert e to rank e mod `num_ranks` | |

    Args:
        load: per expert, the share of tokens that activate it, expected or measured. `pairs` and `balanced` then
            balance size x load; by default sizes, which is parameters, and work at equal load.

    Raises:
        ValueError: with the argument, its value and the remedy.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {list(METHODS)}, got {method!r}")
    num_experts = len(sizes)
    if not 1 <= num_ranks <= num_experts:
        raise ValueError(
            f"`num_ranks`={num_ranks}: {num_experts} experts can be placed on 1 to {num_experts} ranks; on more, let "
            "groups of ranks hold copies (`ep_size` below the number of ranks)"
        )
    work = expected_work(sizes, load)
    if method == "pairs":
        return _place_pairs(sizes, num_ranks, work)
    if method == "balanced":
        return _place_longest_first([(expert,) for expert in range(num_experts)], work, num_ranks)
    if method == "round_robin":
        return Placement(tuple(tuple(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)))
    if num_experts % num_ranks:
        raise ValueError(
            f"`num_ranks`={num_ranks} does not divide {num_experts} experts: 'contiguous' needs equal counts, use "
            "'balanced'"
        )
    count = num_experts // num_ranks
    return Placement(tuple(tuple(range(rank * count, (rank + 1) * count)) for rank in range(num_ranks)))


def _place_pairs(sizes: Sequence[int], num_ranks: int, work: Sequence[float]) -> Placement:
    num_experts = len(sizes)
    if num_experts % (2 * num_ranks):
        raise ValueError(
            f"`num_ranks`={num_ranks}: {num_experts} experts do not make the same number of whole pairs for each "
            "rank, use a number of ranks that divides the pairs, or the method 'balanced'"
        )
    by_size = sorted(range(num_experts), key=lambda expert: (-sizes[expert], expert))
    pairs = [(by_size[i], by_size[-1 - i]) for i in range(num_experts // 2)]
    return _place_longest_first(pairs, work, num_ranks, most=len(pairs) // num_ranks)


def _place_longest_first(
    groups: Sequence[tuple[int, ...]], work: Sequence[float], num_ranks: int, most: int | None = None
) -> Placement:
    """Groups of experts, the heaviest first, each to the rank with the least work of those with room for it."""
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for group in sorted(groups, key=lambda group: -sum(work[expert] for expert in group)):
        with_room = [rank for rank in range(num_ranks) if most is None or len(ranks[rank]) < most]
        rank = min(with_room, key=lambda rank: (totals[rank], len(ranks[rank]), rank))
        ranks[rank].append(group)
        totals[rank] += sum(work[expert] for expert in group)
    return Placement(tuple(tuple(expert for group in groups for expert in group) for groups in ranks))


def place_layers(
    layer_sizes: Sequence[Sequence[int]],
    num_ranks: int,
    method: str = "pairs",
    *,
    load: Sequence[Load] | None = None,
) -> list[Placement]:
    """[`place_experts`] for every layer, with `load` per layer.

    With `pairs` and `balanced`, the rank with the least work in the layers before gets the heaviest part of a layer,
    which evens out over layers what a layer cannot.
    """
    if load is not None and len(load) != len(layer_sizes):
        raise ValueError(f"`load` has {len(load)} layers, the model has {len(layer_sizes)}")
    placements = []
    totals = [0.0] * num_ranks
    for layer, sizes in enumerate(layer_sizes):
        layer_load = None if load is None else load[layer]
        placement = place_experts(sizes, num_ranks, method, load=layer_load)
        work = expected_work(sizes, layer_load)
        if method in ("pairs", "balanced"):
            heaviest = sorted(placement.ranks, key=lambda experts: -sum(work[expert] for expert in experts))
            lightest = sorted(range(num_ranks), key=totals.__getitem__)
            placement = Placement(tuple(experts for _, experts in sorted(zip(lightest, heaviest))))
        totals = [total + more for total, more in zip(totals, placement.totals(work))]
        placements.append(placement)
    return placements


@dataclass(frozen=True)
class Balance:
    """Max / mean over the ranks of a cluster.

    Attributes:
        parameters: of expert parameters, all layers together.
        per_layer: of work, where ranks wait for each other in every layer: the sum over layers of the slowest rank's
            work over that of the mean.
        over_layers: of work, where ranks wait only at the end of the step.
    """

    parameters: float
    per_layer: float
    over_layers: float


def simulate(
    layer_sizes: Sequence[Sequence[int]],
    placements: Sequence[Placement],
    loads: Sequence[Sequence[Load]],
    num_ranks: int,
) -> Balance:
    """Balance of a cluster whose expert-parallel groups each hold all experts, placed alike, and see batches of their
    own.

    Args:
        loads: per batch, per layer, per expert; group i sees batch i modulo their number.
        num_ranks: of the cluster, a multiple of the ranks of the placements.
    """
    group_size = len(placements[0].ranks)
    if num_ranks % group_size:
        raise ValueError(f"`num_ranks`={num_ranks} must be a multiple of the {group_size} ranks of the placements")
    parameters = [placement.totals(sizes) for placement, sizes in zip(placements, layer_sizes)]
    batches = [
        [placement.totals(expected_work(sizes, row)) for placement, sizes, row in zip(placements, layer_sizes, load)]
        for load in loads
    ]
    work = np.array(batches)[np.arange(num_ranks // group_size) % len(loads)]  # [groups, layers, ranks of a group]
    slowest = work.max(axis=(0, 2))
    return Balance(
        parameters=max_over_mean(np.sum(parameters, axis=0).tolist()),
        per_layer=float(slowest.sum() * num_ranks / work.sum()) if work.any() else 1.0,
        over_layers=max_over_mean(work.sum(axis=1).ravel().tolist()),
    )


def split_experts(config: HMoEConfig, ep_size: int) -> list[tuple[int, int]]:
    """(layer, expert) of the experts whose tiles lie on several of `ep_size` ranks; none if all are whole.

    Raises:
        ValueError: if `ep_size` does not divide the tiles of a layer.
    """
    check_tiles_divide(config, ep_size)
    split = []
    for layer, sizes in enumerate(config.layer_expert_sizes):
        run = sum(sizes) // ep_size
        start = 0
        for expert, size in enumerate(sizes):
            if start // run != (start + size - 1) // run:
                split.append((layer, expert))
            start += size
    return split


def reorder_config(config: HMoEConfig, orders: Sequence[Sequence[int]]) -> HMoEConfig:
    """A copy of the config whose expert i of layer l is the old expert `orders[l][i]`."""
    if len(orders) != config.num_hidden_layers:
        raise ValueError(f"`orders` has {len(orders)} layers, the model has {config.num_hidden_layers}")
    layer_sizes = []
    for layer, (order, sizes) in enumerate(zip(orders, config.layer_expert_sizes)):
        if sorted(order) != list(range(len(sizes))):
            raise ValueError(
                f"`orders[{layer}]`={list(order)} must name each of the experts 0 to {len(sizes) - 1} once"
            )
        layer_sizes.append([sizes[expert] for expert in order])
    same = all(sizes == layer_sizes[0] for sizes in layer_sizes)
    fields = {"expert_intermediate_sizes": layer_sizes[0] if same else layer_sizes}
    return type(config).from_dict({**config.to_dict(), **fields})


def describe_placement(config: HMoEConfig, num_ranks: int, load: Sequence[Load] | None = None) -> str:
    """A table of all methods on `num_ranks` ranks that together hold the experts once.

    Its figures are of whole experts on the ranks of the method; the last column says whether equal runs of tiles give
    that.

    Args:
        load: per layer, per expert; default: equal.
    """
    layer_sizes = config.layer_expert_sizes
    loads = [load or [[1 / len(sizes)] * len(sizes) for sizes in layer_sizes]]
    lines = [
        f"Experts on {num_ranks} ranks, max / mean over ranks ({'given' if load else 'equal'} load)",
        f"{'method':<12} {'parameters':>10} {'work by layer':>14} {'work over layers':>17}  expert parallelism",
    ]
    for method in METHODS:
        try:
            placements = place_layers(layer_sizes, num_ranks, method, load=load)
        except ValueError as error:
            lines.append(f"{method:<12} {error}")
            continue
        balance = simulate(layer_sizes, placements, loads, num_ranks)
        lines.append(
            f"{method:<12} {balance.parameters:>10.3f} {balance.per_layer:>14.3f} {balance.over_layers:>17.3f}  "
            f"{_describe_cuts(config, placements, num_ranks)}"
        )
    first = place_layers(layer_sizes, num_ranks, best_method(layer_sizes, num_ranks), load=load)[0]
    for rank, experts in enumerate(first.ranks):
        lines.append(f"  layer 0, rank {rank}: sizes {', '.join(str(layer_sizes[0][expert]) for expert in experts)}")
    return "\n".join(lines)


def best_method(layer_sizes: Sequence[Sequence[int]], num_ranks: int) -> str:
    """`pairs` where every rank gets whole ones, else `balanced`."""
    whole_pairs = all(len(sizes) % (2 * num_ranks) == 0 for sizes in layer_sizes)
    return "pairs" if whole_pairs else "balanced"


def _describe_cuts(config: HMoEConfig, placements: Sequence[Placement], num_ranks: int) -> str:
    try:
        split = split_experts(reorder_config(config, [placement.order for placement in placements]), num_ranks)
    except ValueError as error:
        return str(error)
    return f"equal runs cut through {len(split)} experts" if split else "whole experts on every rank"
