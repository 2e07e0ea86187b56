"""HMoE to HMoE with other expert sizes: experts lose their least important neurons or gain neurons that add nothing.

Nothing is rescaled. Added neurons have a zero `down` row, so logits do not change, and random `gate` and `up` rows
spread like the expert's own, so that `down` learns from the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration_hmoe import HMoEConfig
from ..costs import count_parameters
from ..routing_hmoe import router_parameter_names
from ..sizes import expert_sizes
from .base import Conversion, Options, Plan, execute
from .calibration import calibration_tokens, run_layers
from .checkpoint import SourceCheckpoint
from .layout import bank_tensors, model_tensors, read_banks, unpack_expert
from .neurons import contributions, default_multiple, layer_generator, top_neurons, weight_importance


@dataclass(frozen=True)
class ResizeSettings:
    """The new sizes, and what decides which neurons stay.

    Attributes:
        sizes: neurons of each expert, in the order of the experts, for all layers or per layer.
        strategy, total, multiple_of: instead of `sizes`, arguments of [`expert_sizes`]; in each layer the most
            important expert gets the largest size. Default total: that of the layer now.
        calibration_text: a text file. With it a neuron's importance is its mean contribution to the layer's output on
            this text, gate weights included, and so measures how much an expert is used; without it, the product of
            the norms of its weights.
        calibration_tokens: how much of the text to use.
    """

    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None
    strategy: str | None = None
    total: int | None = None
    multiple_of: int | None = None
    calibration_text: str | None = None
    calibration_tokens: int = 4096
    seed: int = 0

    def __post_init__(self):
        if (self.sizes is None) == (self.strategy is None):
            raise ValueError(
                f"give either `sizes` or `strategy`, got `sizes`={self.sizes!r}, `strategy`={self.strategy!r}"
            )


def convert_resize(
    source: str | Path, target: str | Path, settings: ResizeSettings, options: Options | None = None
) -> Conversion:
    """An HMoE checkpoint with other expert sizes; exact where no expert shrinks.

    Raises:
        ValueError: sizes that do not fit the model's layers or experts.
    """
    opened = SourceCheckpoint(source, ("hmoe",), "resize")
    config = opened.config
    importance = _importance(opened, settings)
    sizes = new_sizes(config, settings, importance)
    target_config = _with_sizes(config, sizes)
    experts = partial(_experts, opened, target_config, importance, settings.seed)
    plan = Plan(
        source=opened,
        config=target_config,
        tensors=model_tensors(opened, target_config, experts),
        settings={"conversion": "resize", **asdict(settings)},
        exact=all(new >= old for rows in zip(sizes, config.layer_expert_sizes) for new, old in zip(*rows)),
        notes=[_describe_change(config, target_config)],
    )
    return execute(plan, target, options or Options())


def _with_sizes(config: HMoEConfig, sizes: list[list[int]]) -> HMoEConfig:
    same = all(row == sizes[0] for row in sizes)
    changed = {"expert_intermediate_sizes": sizes[0] if same else sizes, "expert_tile_size": None}
    return type(config).from_dict({**config.to_dict(), **changed})


def _describe_change(config: HMoEConfig, target: HMoEConfig) -> str:
    before, after = count_parameters(config), count_parameters(target)
    return (
        f"parameters {before.total:,} -> {after.total:,}, activated per token at equal load "
        f"{before.activated:,.0f} -> {after.activated:,.0f}, tile {config.expert_tile_size} -> "
        f"{target.expert_tile_size}"
    )


def new_sizes(config: HMoEConfig, settings: ResizeSettings, importance: list[list[Tensor]]) -> list[list[int]]:
    """Sizes per layer and expert."""
    if settings.sizes is not None:
        given: list[Any] = list(settings.sizes)
        rows = [list(row) for row in given] if not isinstance(given[0], int) else [given] * config.num_hidden_layers
        counts = [len(row) for row in config.layer_expert_sizes]
        if [len(row) for row in rows] != counts:
            raise ValueError(
                f"`sizes` has {[len(row) for row in rows]} experts by layer, the model has {counts}: resizing "
                "keeps the number of experts"
            )
        return rows
    return [_ranked_sizes(settings, row, scores) for row, scores in zip(config.layer_expert_sizes, importance)]


def _ranked_sizes(settings: ResizeSettings, row: list[int], importance: list[Tensor]) -> list[int]:
    """The strategy's sizes, the largest for the expert whose neurons sum to the largest importance."""
    assert settings.strategy is not None
    total = settings.total or sum(row)
    multiple_of = settings.multiple_of or default_multiple(total, len(row))
    sizes = sorted(expert_sizes(settings.strategy, len(row), total=total, multiple_of=multiple_of))
    weakest_first = sorted(range(len(row)), key=lambda expert: float(importance[expert].sum()))
    ranked = dict(zip(weakest_first, sizes))
    return [ranked[expert] for expert in range(len(row))]


def _importance(source: SourceCheckpoint, settings: ResizeSettings) -> list[list[Tensor]]:
    """Per layer and expert: importance of each neuron [I]."""
    config = source.config
    if settings.calibration_text is None:
        # Made before the weights are read: small tensors that stay behind large ones keep their pages from the system.
        importance = [[torch.empty(size) for size in sizes] for sizes in config.layer_expert_sizes]
        for layer, scores_of_layer in enumerate(importance):
            for kept, computed in zip(scores_of_layer, _weight_importance(source, layer)):
                kept.copy_(computed)
        return importance
    tokens = calibration_tokens(source.folder, settings.calibration_text, settings.calibration_tokens)
    scores: dict[int, list[Tensor]] = {}

    def on_layer(index: int, mlp: Any, hidden_states: Tensor) -> None:
        scores[index] = _routed_contributions(mlp, hidden_states, config.layer_expert_sizes[index])

    run_layers(source, tokens, on_layer)
    return [scores[layer] for layer in range(config.num_hidden_layers)]


def _weight_importance(source: SourceCheckpoint, layer: int) -> list[Tensor]:
    banks, sizes = read_banks(source, layer), source.config.layer_expert_sizes[layer]
    experts = (unpack_expert(banks, sizes, expert) for expert in range(len(sizes)))
    return [weight_importance(**expert) for expert in experts]


def _routed_contributions(mlp: Any, hidden_states: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Per expert: mean over all tokens of gate weight times contribution of each neuron [I]."""
    _, weights, chosen = mlp.gate(hidden_states)  # [T, K] each
    scores = []
    for expert in range(len(sizes)):
        token, slot = torch.where(chosen == expert)
        parts = unpack_expert((mlp.experts.gate_up_proj, mlp.experts.down_proj), sizes, expert)
        rows = hidden_states[token]
        neurons = mlp.experts.act_fn(rows @ parts["gate"].t()) * (rows @ parts["up"].t())  # [rows, I]
        weighted = contributions(neurons, parts["down"]) * weights[token, slot, None]
        scores.append(weighted.sum(dim=0) / len(hidden_states))
    return scores


def _experts(
    source: SourceCheckpoint, target: HMoEConfig, importance: list[list[Tensor]], seed: int, layer: int
) -> Iterator[tuple[str, Tensor]]:
    for parameter in router_parameter_names(source.config):
        name = f"model.layers.{layer}.mlp.gate.{parameter}"
        yield name, source.tensor(name)
    banks, old_sizes = read_banks(source, layer), source.config.layer_expert_sizes[layer]
    generator = layer_generator(seed, layer)

    def read(expert: int, part: str) -> Tensor:
        rows, size = unpack_expert(banks, old_sizes, expert)[part], target.layer_expert_sizes[layer][expert]
        added = size - len(rows)
        if added <= 0:
            return rows[top_neurons(importance[layer][expert], size)]
        new = torch.zeros(added, rows.shape[1])
        if part != "down":
            new.normal_(0.0, float(rows.float().std()), generator=generator)
        return torch.cat([rows, new.to(rows.dtype)])

    yield from bank_tensors(target, layer, read)
