"""Llama, Mistral, Qwen2 and Qwen3 to HMoE: the FFN's neurons split over experts, or copied into each.

*split*: each neuron goes to one expert. With all experts active at equal gate weights the model is the dense one. Gate
weights sum to 1, so at equal weights each of n active experts gets 1 / n; `down_proj` is scaled to make up for it
(`output_scale`):
- `"sum"`: by n, the number of active experts: each neuron that runs adds exactly what it adds in the dense FFN;
- `"expected"`: by the number of all experts: the sum over a random choice of n experts is right on average.
Both give the dense FFN when all experts are active.

*upcycle*: each expert is a copy of the FFN's most important neurons, all of them if it is as wide. Gate weights sum
to 1, so nothing is scaled: with Top-1 of a full-width expert, or with full-width experts only, the model is the dense
one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..configuration_hmoe import HMoEConfig
from ..sizes import expert_sizes, find_strategy
from .base import Conversion, Options, Plan, execute
from .calibration import calibration_tokens, run_layers
from .check import ForcedRouting
from .checkpoint import SourceCheckpoint
from .families import DENSE_FAMILIES, shared_fields
from .layout import ReadExpert, bank_tensors, model_tensors
from .neurons import (
    cluster_neurons,
    contributions,
    deal_neurons,
    default_multiple,
    fitted_router,
    layer_generator,
    random_router,
    shuffle_neurons,
    top_neurons,
    weight_importance,
)


METHODS = ("split", "upcycle")
NEURONS = {"split": ("random", "magnitude", "activation", "coactivation"), "upcycle": ("magnitude", "activation")}
OUTPUT_SCALES = ("sum", "expected")
ROUTERS = ("random", "fitted", "balanced")
ROUTER_LOGIT_STD = 0.1


@dataclass(frozen=True)
class DenseSettings:
    """How a dense FFN becomes experts.

    Attributes:
        method: `"split"` or `"upcycle"`.
        sizes: neurons of each expert, for all layers or per layer; None makes them from the next four.
        strategy, num_experts, total, multiple_of: arguments of [`expert_sizes`]. Default total: the dense width
            (split), or as many as make the widest expert as wide as the FFN (upcycle).
        num_experts_per_tok: Top-K.
        neurons: what decides where a neuron goes. Split: `"random"`; `"magnitude"` of the weights or `"activation"`
            on calibration text, dealt evenly; `"coactivation"`, clusters of neurons that fire together. Upcycle:
            `"magnitude"` or `"activation"`, which keeps the most important.
        output_scale: of a split, see above.
        router: `"random"`; or, for a split, fitted to calibration text: `"fitted"` sends a token to the experts that
            contribute most to its output, `"balanced"` to those that contribute more than they usually do, which
            spreads tokens evenly and keeps less. Always, logits have standard deviation 0.1: gate weights start near
            equal.
        noise: upcycle: Gaussian noise on the copies, as a share of the standard deviation of each weight matrix.
        reinit_share: upcycle: share of each expert's neurons drawn anew with the mean and standard deviation of the
            dense weights (drop-upcycling, arXiv 2502.19261).
        calibration_text, calibration_tokens: a text file and how much of it to use.
    """

    method: str = "split"
    sizes: Sequence[int] | Sequence[Sequence[int]] | None = None
    strategy: str = "arithmetic"
    num_experts: int = 8
    total: int | None = None
    multiple_of: int | None = None
    num_experts_per_tok: int = 2
    neurons: str = "magnitude"
    output_scale: str = "sum"
    router: str = "random"
    noise: float = 0.0
    reinit_share: float = 0.0
    calibration_text: str | None = None
    calibration_tokens: int = 4096
    seed: int = 0

    def __post_init__(self):
        choices = {
            "method": METHODS,
            "neurons": NEURONS.get(self.method, ()),
            "output_scale": OUTPUT_SCALES,
            "router": ROUTERS if self.method == "split" else ("random",),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}")
        if self.method == "split" and (self.noise or self.reinit_share):
            raise ValueError(
                f"`noise`={self.noise} and `reinit_share`={self.reinit_share} are for `method`='upcycle': a split "
                "uses each neuron once, there are no copies to tell apart"
            )
        if not 0 <= self.noise < math.inf or not 0 <= self.reinit_share <= 1:
            raise ValueError(
                f"`noise`={self.noise} must be finite and not negative, `reinit_share`={self.reinit_share} in [0, 1]"
            )
        if self.needs_calibration and self.calibration_text is None:
            raise ValueError(
                f"`neurons`={self.neurons!r} with `router`={self.router!r} needs `calibration_text`: give a text file"
            )

    @property
    def needs_calibration(self) -> bool:
        return self.neurons in ("activation", "coactivation") or self.router != "random"


def convert_dense(
    source: str | Path, target: str | Path, settings: DenseSettings | None = None, options: Options | None = None
) -> Conversion:
    """A Llama, Mistral, Qwen2 or Qwen3 checkpoint as HMoE.

    Raises:
        CannotConvert: a config field that HMoE cannot express.
        ValueError: sizes that do not fit the FFN, with the nearest that do.
    """
    settings = settings or DenseSettings()
    opened = SourceCheckpoint(source, DENSE_FAMILIES, "dense")
    target_config = hmoe_config_of(opened.config, settings)
    plan = Plan(
        source=opened,
        config=target_config,
        tensors=_tensors(opened, target_config, settings),
        settings={"conversion": "dense", **asdict(settings)},
        forced=_neutral_routing(target_config, settings, opened.config.intermediate_size),
        factor=_down_scale(target_config, settings),
    )
    return execute(plan, target, options or Options())


def hmoe_config_of(config: PreTrainedConfig, settings: DenseSettings) -> HMoEConfig:
    sizes = choose_sizes(settings, config.intermediate_size)
    rows = sizes if isinstance(sizes[0], list) else [sizes]
    for row in rows:
        _check_row(row, settings.method, config.intermediate_size)
    # The papers' coefficients: balance for equal experts, the parameter penalty for unequal ones.
    uniform = all(len(set(row)) == 1 for row in rows)
    return HMoEConfig(
        **shared_fields(config),
        expert_intermediate_sizes=sizes,
        num_experts_per_tok=settings.num_experts_per_tok,
        load_balancing_loss_coef=0.01 if uniform else 0.0,
        parameter_penalty_loss_coef=0.0 if uniform else 0.1,
    )


def choose_sizes(settings: DenseSettings, width: int) -> list[Any]:
    """Expert sizes for an FFN of `width` neurons, from the settings."""
    if settings.sizes is not None:
        return [row if isinstance(row, int) else list(row) for row in settings.sizes]
    if settings.total is not None or settings.method == "split":
        total = width if settings.total is None else settings.total
        multiple_of = settings.multiple_of or default_multiple(total, settings.num_experts)
        return expert_sizes(settings.strategy, settings.num_experts, total=total, multiple_of=multiple_of)
    # As wide as possible while no expert is wider than the FFN.
    multiple_of = settings.multiple_of or default_multiple(width, settings.num_experts)
    step = multiple_of * find_strategy(settings.strategy).units_step(settings.num_experts)
    for total in range(width * settings.num_experts // step * step, 0, -step):
        sizes = expert_sizes(settings.strategy, settings.num_experts, total=total, multiple_of=multiple_of)
        if max(sizes) <= width:
            return sizes
    raise AssertionError(settings)


def _check_row(row: list[int], method: str, width: int) -> None:
    if method == "split" and sum(row) != width:
        raise ValueError(
            f"`sizes`={row} sum to {sum(row)}, but the dense FFN has {width} neurons (`intermediate_size`) and a "
            f"split uses each once: make them sum to {width}"
        )
    if max(row) > width:
        raise ValueError(
            f"`sizes`={row}: an expert of {max(row)} neurons is wider than the dense FFN of {width} "
            f"(`intermediate_size`): use at most {width}, or widen it afterwards with `hmoe convert resize`"
        )


def _down_scale(config: HMoEConfig, settings: DenseSettings) -> int:
    """Factor on `down_proj` that makes up for gate weights of 1 / n; 1 for copies."""
    if settings.method == "upcycle":
        return 1
    return config.num_experts_per_tok if settings.output_scale == "sum" else config.num_experts


def _neutral_routing(config: HMoEConfig, settings: DenseSettings, width: int) -> ForcedRouting | None:
    """The routing under which the converted model is the dense one; None if there is none."""
    rows = config.layer_expert_sizes
    if settings.method == "split":
        weight = 1 / _down_scale(config, settings)
        return ForcedRouting([list(range(len(row))) for row in rows], weight, "all experts active, neutral gates")
    if settings.noise or settings.reinit_share or any(max(row) < width for row in rows):
        return None
    return ForcedRouting([[row.index(width)] for row in rows], 1.0, "Top-1 of a full-width expert")


def _tensors(source: SourceCheckpoint, target: HMoEConfig, settings: DenseSettings) -> Iterator[tuple[str, Tensor]]:
    calibrated = _calibrate(source, target, settings) if settings.needs_calibration else {}

    def experts(layer: int) -> Iterator[tuple[str, Tensor]]:
        sizes, prefix = target.layer_expert_sizes[layer], f"model.layers.{layer}"
        weights = {part: source.tensor(f"{prefix}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")}
        weights["down"] = weights["down"].t()
        generator = layer_generator(settings.seed, layer)
        parts, router = calibrated.get(layer) or (_choose_neurons(settings, sizes, weights, generator), None)
        if router is None:
            norm_weight = source.tensor(f"{prefix}.post_attention_layernorm.weight")
            router = random_router(norm_weight, len(sizes), ROUTER_LOGIT_STD, generator)
        yield f"{prefix}.mlp.gate.weight", router.to(target.dtype)
        read = _expert_reader(weights, parts, _down_scale(target, settings), settings, generator)
        yield from bank_tensors(target, layer, read)

    yield from model_tensors(source, target, experts)


def _choose_neurons(
    settings: DenseSettings,
    sizes: Sequence[int],
    weights: dict[str, Tensor],
    generator: torch.Generator,
    activations: Tensor | None = None,
) -> list[Tensor]:
    """The neurons of each expert of a layer.

    Args:
        weights: `gate`, `up` and `down` of the FFN, each [I, H].
        activations: of the neurons on calibration text, [T, I], where the settings ask for them.
    """
    if settings.neurons == "random":
        return shuffle_neurons(len(weights["gate"]), sizes, generator)
    if settings.neurons == "magnitude":
        importance = weight_importance(**weights)
    else:
        assert activations is not None
        if settings.neurons == "coactivation":
            return cluster_neurons(activations, sizes, generator)
        importance = contributions(activations, weights["down"]).mean(dim=0)
    if settings.method == "split":
        return deal_neurons(importance, sizes)
    return [top_neurons(importance, size) for size in sizes]


def _calibrate(
    source: SourceCheckpoint, target: HMoEConfig, settings: DenseSettings
) -> dict[int, tuple[list[Tensor], Tensor | None]]:
    """Per layer, the neurons of each expert and, if it is fitted, the router [E, H]."""
    assert settings.calibration_text is not None
    tokens = calibration_tokens(source.folder, settings.calibration_text, settings.calibration_tokens)
    found: dict[int, tuple[list[Tensor], Tensor | None]] = {}

    def on_layer(index: int, mlp: Any, hidden_states: Tensor) -> None:
        activations = mlp.act_fn(mlp.gate_proj(hidden_states)) * mlp.up_proj(hidden_states)  # [T, I]
        weights = {"gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight, "down": mlp.down_proj.weight.t()}
        sizes, generator = target.layer_expert_sizes[index], layer_generator(settings.seed, index)
        parts, router = _choose_neurons(settings, sizes, weights, generator, activations), None
        if settings.router != "random":
            balanced = settings.router == "balanced"
            router = fitted_router(
                hidden_states, activations, weights["down"], parts, ROUTER_LOGIT_STD, balanced=balanced
            )
        found[index] = parts, router

    run_layers(source, tokens, on_layer)
    return found


def _expert_reader(
    weights: dict[str, Tensor],
    parts: list[Tensor],
    down_scale: int,
    settings: DenseSettings,
    generator: torch.Generator,
) -> ReadExpert:
    """Reads experts off a dense FFN: their neurons, scaled, with noise and re-initialised ones if asked for."""
    shuffled = [torch.randperm(len(part), generator=generator) for part in parts]
    renewed = [order[: round(settings.reinit_share * len(order))] for order in shuffled]

    def normal(shape: Sequence[int], std: float) -> Tensor:
        return std * torch.randn(*shape, generator=generator)

    def read(expert: int, part: str) -> Tensor:
        dense, new = weights[part], renewed[expert]
        rows = dense[parts[expert]]
        if part == "down" and down_scale != 1:
            rows = rows * down_scale
        if settings.noise or len(new):
            std, mean = torch.std_mean(dense.float())
            rows = rows + normal(rows.shape, settings.noise * float(std)).to(rows.dtype)
            rows[new] = (mean + normal((len(new), rows.shape[1]), float(std))).to(rows.dtype)
        return rows

    return read
