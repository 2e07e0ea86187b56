"""Pictures of the routing: load, balance, confidence, co-activation, tokens and experts, and their course over
checkpoints.

Every function takes frames of [`hmoe.eval.frames`] and returns a matplotlib figure, or None where there is nothing to
draw; draw within `rc_context(STYLE)`. Colours differ under every kind of colour blindness (Okabe-Ito, cividis);
experts stand in the order of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from hmoe.heat_map import MOST_NUMBERS, draw_load


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_, ORANGE, _, VERMILION, _, SKY, BLACK = COLOURS
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS),
    "axes.formatter.useoffset": False,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "image.aspect": "auto",
    "image.cmap": "cividis",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 110,
    "text.parse_math": False,  # names and tokens may hold $
}
MIN_TYPES = 20  # fewer difficult types make no picture
MIN_TOKENS = 30  # fewer tokens make no point
SELECTION_LABELS = {
    "baseline": "by the baseline's loss (MoDSE)",
    "model": "by the model's loss",
    "both": "by the mean of both (symmetric)",
    "held_out": "by the baseline's loss on the other half",
}


def new_figure(columns: int = 1, width: float = 5.6, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height))
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def set_expert_ticks(axes: Axes, labels: list[str], *, both: bool = False) -> None:
    step = max(1, -(-len(labels) // 24))
    ticks = range(0, len(labels), step)
    rotation = 90 if len(labels) > 8 or max(map(len, labels)) > 5 else 0
    axes.set_xticks(ticks, labels[::step], rotation=rotation, fontsize=8)
    axes.set_xlabel("expert size [neurons]")
    if both:
        axes.set_yticks(ticks, labels[::step], fontsize=8)
        axes.set_ylabel("expert size [neurons]")


def heat_map(axes: Axes, values: np.ndarray, label: str, form: str = ".0f", vmin: float | None = None) -> None:
    """Draws a matrix with a colour bar; NaN is grey and has no number."""
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(values, vmin=vmin)
    axes.figure.colorbar(image, ax=axes, label=label)
    if values.shape[1] > MOST_NUMBERS or len(values) > 2 * MOST_NUMBERS:
        return
    luminance = np.array(image.cmap(image.norm(values)))[..., :3] @ [0.299, 0.587, 0.114]
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if luminance[y, x] < 0.5 else "black"
            axes.text(x, y, format(value, form), ha="center", va="center", fontsize=7, color=colour)


def pair_map(axes: Axes, values: Any, sizes: Sequence[int], label: str, vmin: float | None = None) -> None:
    """Draws a matrix [E, E] of pairs of one layer's experts, smallest first, without its diagonal."""
    experts = sorted(range(len(sizes)), key=lambda expert: sizes[expert])
    labels = [str(sizes[expert]) for expert in experts]
    if len(set(labels)) < len(labels):  # sizes alone do not tell experts apart
        labels = [f"{size} (#{expert})" for size, expert in zip(labels, experts)]
    values = np.array(values, dtype=float)[np.ix_(experts, experts)]
    np.fill_diagonal(values, np.nan)
    heat_map(axes, values, label, ".2f", vmin)
    set_expert_ticks(axes, labels, both=True)


def from_zero(axes: Axes) -> None:
    """Lets the y axis start at 0 and leaves room above the data."""
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)


def plain_log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def plot_layers(axes: Axes, layers: pd.DataFrame, column: str, label: str | None = None) -> None:
    axes.plot(layers["layer"], layers[column], label=label)
    axes.set_xlabel("MoE layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True)


def load_figure(experts: pd.DataFrame, sizes: pd.DataFrame) -> Figure:
    """Load by layer and expert, and activations by size (HMoE Fig. 3 right, 6 and 7)."""
    layers = experts.loc[["model"]].groupby("layer")[["load", "size"]].agg(list)
    figure, (left, right) = new_figure(2, height=max(3.6, 1.6 + 0.24 * len(layers)))
    image = draw_load(left, layers["load"].tolist(), layers["size"].tolist())
    figure.colorbar(image, ax=left, label="tokens that activate the expert", format=PercentFormatter(1))
    left.set(ylabel="MoE layer", title="Load by layer and expert")
    sizes = sizes.loc[["model"]]
    places = range(len(sizes))
    right.bar(places, 100 * sizes["share"], label="measured")
    (even,) = right.plot(places, 100 * sizes["share_if_even"], color=BLACK, label="every expert alike")
    even.set(linestyle="--", marker="_", markersize=12)
    if len(sizes) > 1:
        inverse = sizes["experts"] / sizes["size"]
        right.plot(places, 100 * inverse / inverse.sum(), "o-", color=ORANGE, label="proportional to 1 / size")
    set_expert_ticks(right, [str(size) for size in sizes["size"]])
    right.set(ylabel="share of all activations [%]", title="Activations by size")
    return figure


def activation_figure(layers: pd.DataFrame) -> Figure:
    """Experts per token and parameters of the activated experts, by layer (HMoE Fig. 5, right)."""
    figure, (left, right) = new_figure(2)
    for role in ("model", "baseline"):
        if role in layers.index:
            rows = layers.loc[[role]].assign(millions=lambda rows: rows["activated_parameters"] / 1e6)
            plot_layers(left, rows, "experts_per_token", rows["model"].iloc[0])
            plot_layers(right, rows, "millions", rows["model"].iloc[0])
    left.set(ylabel="experts per token", title="Experts per token")
    right.set(ylabel="parameters per token [millions]", title="Activated expert parameters")
    for axes in (left, right):
        from_zero(axes)
    return figure


def balance_figure(layers: pd.DataFrame) -> Figure:
    """Max / min tokens per expert (MoDSE Tables 7-8) and busiest expert over the mean, by layer."""
    layers = layers.loc[["model"]]
    figure, (left, right) = new_figure(2)
    columns = {
        "max_over_min_choice_1": "first choice",
        "max_over_min_choice_2": "second choice",
        "max_over_min": "all choices",
    }
    for column, label in columns.items():
        if column in layers:
            plot_layers(left, layers, column, label)
    left.set(ylabel="busiest / idlest expert (log scale)", title="Max / min tokens per expert")
    plain_log_scale(left)
    plot_layers(right, layers, "load_imbalance", "busiest / mean load")
    label = "experts below a tenth of the mean [number]"
    right.bar("layer", "starved_experts", data=layers, color=ORANGE, alpha=0.6, label=label)
    right.set(ylabel="ratio; number of experts", title="Imbalance and starved experts")
    from_zero(right)
    for axes in (left, right):
        axes.axhline(1, color=BLACK, linestyle=":", label="even")
    return figure


def confidence_figure(layers: pd.DataFrame, experts: pd.DataFrame) -> Figure:
    """The router's entropy over ln E and the probability of its first choice, by layer."""
    layers = layers.loc[["model"]]
    figure, (left, right) = new_figure(2)
    plot_layers(left, layers, "router_entropy_ratio")
    left.set(ylabel="entropy / ln(number of experts)", title="Router entropy (1: undecided)", ylim=(0, 1.05))
    plot_layers(right, layers, "router_confidence", "measured")
    num_experts = experts.loc[["model"]].groupby("layer").size()
    right.plot(1 / num_experts, color=BLACK, linestyle=":", marker="", label="undecided: 1 / number of experts")
    right.set(ylabel="mean largest probability", title="Router confidence", ylim=(0, 1.05))
    return figure


def coactivation_figure(layers: pd.DataFrame, pairs: pd.DataFrame) -> Figure | None:
    """How often pairs of experts are activated together, over independence: first, middle and last layer."""
    layers = layers.loc[["model"]]
    if layers["experts_per_token"].max() <= 1:
        return None
    drawn = sorted({0, len(layers) // 2, len(layers) - 1})
    figure, axes_of_layers = new_figure(len(drawn), width=4.6)
    for axes, layer in zip(axes_of_layers, drawn):
        rows = pairs[pairs["layer"] == layer]
        lift = rows.pivot(index="expert", columns="other", values="coactivation_lift")
        sizes = rows.loc[rows["other"] == 0, "size"].tolist()
        pair_map(axes, lift, sizes, "together / if independent", vmin=0)
        axes.set_title(f"MoE layer {layer}")
    return figure


def loss_and_size_figure(bins: pd.DataFrame) -> Figure:
    """Size of the chosen experts by the token's loss (HMoE Fig. 10 as a measurement)."""
    figure, (left, right) = new_figure(2)
    for position, label in (("predicting", "that predicts the token"), ("reading", "that reads the token")):
        rows = bins[(bins["position"] == position) & (bins["tokens"] >= MIN_TOKENS)]
        left.plot("mean_loss", "relative_size", data=rows, label=f"position {label}")
        right.plot(rows["mean_loss"], 100 * rows["activated_share"], label=f"position {label}")
    left.axhline(1, color=BLACK, linestyle=":", label="average size")
    left.set(ylabel="mean size of chosen experts / mean size", title="Size of chosen experts")
    right.set(ylabel="neurons used per layer [%]", title="Activated share of the neurons")
    from_zero(right)
    for axes in (left, right):
        axes.set_xlabel(f"loss of the token [nats], bins of {MIN_TOKENS} tokens or more")
        axes.grid(True)
    return figure


def reduction_figure(reductions: pd.DataFrame) -> Figure | None:
    """Loss reduction on difficult token types by threshold (MoDSE Table 5), under four ways to select them."""
    if reductions.empty:
        return None
    figure, (axes,) = new_figure(1, width=7.5)
    for selection, label in SELECTION_LABELS.items():
        rows = reductions[reductions["selection"] == selection].dropna(subset="reduction")
        axes.plot("threshold", "reduction", data=rows, label=label)
    axes.axhline(0, color=BLACK, linewidth=1)
    axes.set(
        xlabel="threshold on a type's mean loss [nats]",
        ylabel="baseline's loss - model's loss [nats]",
        title="Loss reduction on difficult token types, by how they are selected",
    )
    axes.grid(True)
    return figure


def difficult_sizes_figure(rows: pd.DataFrame) -> Figure | None:
    """Sizes that difficult types choose, beside those of all types (MoDSE Table 6).

    The types are those of the highest threshold with enough of them, selected as in the paper: by the baseline's loss,
    or by the model's own where there is no baseline.
    """
    columns = [column for column in rows if column.startswith("size_")]
    everything, selected = rows[rows["selection"] == "all"], rows[rows["selection"] != "all"]
    selected = selected[selected["selection"] == selected["selection"].iloc[0]]
    selected = selected[selected["types"] >= MIN_TYPES]
    if selected.empty or len(columns) < 2:
        return None
    hardest = selected[selected["threshold"] == selected["threshold"].max()]
    label = f"{hardest['types'].iloc[0]} types above {hardest['threshold'].iloc[0]:.2f} nats"
    figure, panels = new_figure(2)
    for axes, kind, title in zip(panels, ("all_choices", "first_choice"), ("All choices", "First choice")):
        for shift, types, name in ((-0.2, everything, "all types"), (0.2, hardest, label)):
            counts = types.loc[types["choices"] == kind, columns].iloc[0]
            axes.bar(np.arange(len(columns)) + shift, 100 * counts / max(counts.sum(), 1), width=0.38, label=name)
        set_expert_ticks(axes, [column.removeprefix("size_") for column in columns])
        axes.set(ylabel="share of their activations [%]", title=title)
    return figure


def similarity_figure(similarity: dict[str, Any]) -> Figure:
    """Wasserstein distance and KL divergence between experts' token distributions (HMoE Fig. 9): the mean over layers,
    or the last layer where sizes differ by layer."""
    drawn = similarity["mean"] or similarity["layers"][-1]
    title = "mean over layers" if similarity["mean"] else f"MoE layer {drawn['layer']}"
    discrete = similarity["ground_metric"] == "discrete"
    distance = f"Wasserstein-1 distance, {'any two tokens 1 apart' if discrete else 'sliced, on embeddings'}"
    figure, panels = new_figure(2, width=6.2, height=5.0)
    for axes, kind, name, label in (
        (panels[0], "wasserstein", "Distance", distance),
        (panels[1], "kl", "Divergence", "KL(row || column) [nats]"),
    ):
        pair_map(axes, drawn[kind], drawn["sizes"], label)
        axes.set_title(f"{name} of token distributions, {title}")
    return figure


def top_tokens_figure(examples: pd.DataFrame) -> Figure | None:
    """Activation shares by size of the types with the largest and smallest share of large experts (HMoE Fig. 10)."""
    columns = [column for column in examples if column.startswith("size_")]
    if len(columns) < 2:
        return None
    figure, (axes,) = new_figure(1, width=8.0, height=1.6 + 0.26 * len(examples))
    heat_map(axes, 100 * examples[columns].to_numpy(float), "share of the token's activations [%]", vmin=0)
    set_expert_ticks(axes, [column.removeprefix("size_") for column in columns])
    # Fonts lack many characters: tokens that are not ASCII are written as escapes.
    tokens = [token if token.isascii() else ascii(token)[1:-1] for token in examples["token"]]
    axes.set_yticks(range(len(tokens)), tokens, fontsize=8)
    axes.set(ylabel="token", title="Where single tokens go")
    return figure


def _history(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the checkpoints, in order; the last one is the model."""
    earlier = [role for role in frame.index.unique() if role.startswith("checkpoint")]
    return frame.loc[[*earlier, "model"]]


def _checkpoint_axis(axes: Axes, checkpoints: pd.DataFrame) -> pd.Series:
    """Where on the x axis each checkpoint stands: at its step, where all are known."""
    axes.grid(True)
    if checkpoints["step"].notna().all():
        axes.set_xlabel("training step")
        return checkpoints["step"].astype(float)
    axes.set_xticks(range(len(checkpoints)), checkpoints["model"], rotation=20, fontsize=8)
    axes.set_xlabel("checkpoint")
    return pd.Series(range(len(checkpoints)), index=checkpoints.index, dtype=float)


def training_figure(models: pd.DataFrame, sizes: pd.DataFrame, layers: pd.DataFrame) -> Figure | None:
    """Activated parameters, activations by size and balance over checkpoints (HMoE Fig. 5 left and 6)."""
    checkpoints = _history(models)
    if len(checkpoints) == 1:
        return None
    figure, (left, middle, right) = new_figure(3, width=4.6)
    left.plot(_checkpoint_axis(left, checkpoints), checkpoints["activated_parameters"] / 1e6)
    left.set(ylabel="activated parameters per token [millions]", title="Activated parameters")
    _draw_size_history(middle, _checkpoint_axis(middle, checkpoints), _history(sizes))
    places = _checkpoint_axis(right, checkpoints)
    ratios = _history(layers).pivot(columns="layer", values="max_over_min").loc[checkpoints.index]
    right.plot(places, ratios, color=SKY, linewidth=1, marker="")
    right.plot([], [], color=SKY, marker="", label="single layers")
    right.plot(places, ratios.max(axis=1), color=VERMILION, marker="o", label="worst layer")
    right.axhline(3, color=BLACK, linestyle=":", label="3 (MoDSE's last epoch)")
    right.set(ylabel="busiest / idlest expert (log scale)", title="Max / min tokens per expert")
    plain_log_scale(right)
    return figure


def _draw_size_history(axes: Axes, places: pd.Series, sizes: pd.DataFrame) -> None:
    shares = 100 * sizes.pivot(columns="size", values="share").loc[places.index]
    colours = colormaps["cividis"](np.linspace(0, 0.9, shares.shape[1]))
    for (size, share), colour in zip(shares.items(), colours):
        axes.plot(places, share, color=colour, label=f"{size:g} neurons")
    axes.set(ylabel="share of all activations [%]", title="Activations by expert size")
    if len(colours) <= 12:
        axes.set_ylim(0, 1.4 * axes.dataLim.ymax)
        axes.legend(fontsize=7, ncols=2, loc="upper right")


def stability_figure(stability: pd.DataFrame, models: pd.DataFrame) -> Figure | None:
    """Agreement of each token's route between neighbouring checkpoints and with the last, mean over layers."""
    if stability.empty:
        return None
    labels = {
        "first_choice": "same first choice",
        "jaccard": "activated by both / by either",
        "saturation": "saturation: last experts already activated",
    }
    checkpoints = _history(models)
    figure, (left, right) = new_figure(2)
    for axes, kind, title, columns in (
        (left, "neighbours", "With the checkpoint before", ("first_choice", "jaccard")),
        (right, "with_last", "With the last checkpoint", ("saturation", "first_choice")),
    ):
        places = _checkpoint_axis(axes, checkpoints)
        places = places[1:] if kind == "neighbours" else places[:-1]
        means = stability[stability["kind"] == kind].groupby("pair")[[*columns, "first_choice_chance"]].mean()
        for column in columns:
            axes.plot(places, means[column], label=labels[column])
        chance = means["first_choice_chance"]
        axes.plot(places, chance, color=BLACK, linestyle=":", marker="^", label="same first choice by chance")
        axes.set(ylabel="share, mean over layers", title=title, ylim=(0, 1.05))
    return figure
