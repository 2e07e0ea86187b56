"""HMoE to HMoE with the experts in another order, so that equal runs of tiles on the ranks are a balanced placement.

Router rows and tiles move together, so the model computes what it did. The states of an optimizer do not move with
them: place before training, or afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..placement import best_method, place_layers, reorder_config
from .base import Conversion, Options, Plan, execute
from .checkpoint import SourceCheckpoint
from .layout import tile_ranges


_MOE_TENSOR = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(gate|experts)\.(?!act_fn\.)")


def convert_place(
    source: str | Path,
    target: str | Path,
    num_ranks: int,
    *,
    method: str | None = None,
    load: str | Path | None = None,
    options: Options | None = None,
) -> Conversion:
    """An HMoE checkpoint whose experts are ordered for `num_ranks` ranks; exact.

    Args:
        num_ranks: ranks that together hold the experts once (`ep_size`).
        method: one of [`hmoe.placement.METHODS`]; default `pairs` where they are whole, else `balanced`.
        load: the `metrics.jsonl` of a run, to balance by the load it measured; default: by size.

    Raises:
        ValueError: a placement that cannot be; the message names the remedy.
    """
    options = options or Options()
    opened = SourceCheckpoint(source, ("hmoe",), "place")
    config = opened.config
    sizes = config.layer_expert_sizes
    method = method or best_method(sizes, num_ranks)
    measured = None if load is None else read_load(load)
    orders = [placement.order for placement in place_layers(sizes, num_ranks, method, load=measured)]
    notes = [f"experts in the order of a placement on {num_ranks} ranks by {method!r}"]
    if options.check and not any(name.endswith("ForCausalLM") for name in config.architectures or ["HMoEForCausalLM"]):
        options = replace(options, check=False)
        notes.append("not checked: the model has no language model head to compare")
    plan = Plan(
        source=opened,
        config=reorder_config(config, orders),
        tensors=_tensors(opened, orders),
        settings={"conversion": "place", "num_ranks": num_ranks, "method": method, "load": load and str(load)},
        exact=True,
        notes=notes,
    )
    return execute(plan, target, options)


def read_load(path: str | Path) -> list[list[float]]:
    """The last measured load, per layer and expert, in the `metrics.jsonl` of a run.

    Raises:
        ValueError: if no line holds one.
    """
    for line in reversed(Path(path).read_text(encoding="utf-8").splitlines()):
        load = json.loads(line).get("load")
        if load:
            return load
    raise ValueError(f"{path} holds no `load`: train with `router_metrics` 'brief' or 'per_layer'")


def _tensors(source: SourceCheckpoint, orders: Sequence[Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the source, those of routers and experts with their first dimension reordered."""
    config = source.config
    for name in source.names:
        tensor = source.tensor(name)
        if match := _MOE_TENSOR.search(name):
            layer = int(match[1])
            order = list(orders[layer])
            if match[2] == "experts":
                tiles = tile_ranges(config.layer_expert_sizes[layer], config.expert_tile_size)
                order = [tile for expert in order for tile in range(*tiles[expert])]
            tensor = tensor[order]
        yield name, tensor
