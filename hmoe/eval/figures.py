"""Pictures of the routing: load, balance, confidence, co-activation, and their course over checkpoints.

Every function takes the results of [`hmoe.eval.analyze.analyze`] and returns a matplotlib figure, or None where there
is nothing to draw. Colours tell apart under every kind of colour blindness (Okabe-Ito, cividis); experts stand in the
order of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_ANNOTATED = 16  # columns of a heat map beyond which cells have no numbers


def new_figure(columns: int = 1, width: float = 5.6, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def by_size(sizes: Sequence[int]) -> list[int]:
    """Experts, smallest first; equal sizes by id."""
    return sorted(range(len(sizes)), key=lambda expert: (sizes[expert], expert))


def expert_labels(sizes: Sequence[int], order: Sequence[int]) -> list[str]:
    """Sizes; with ids where a size alone does not tell experts apart."""
    unique = len(set(sizes)) == len(sizes)
    return [str(sizes[expert]) if unique else f"{sizes[expert]} (#{expert})" for expert in order]


def set_expert_ticks(axes: Axes, labels: Sequence[str], *, both: bool = False) -> None:
    step = max(1, -(-len(labels) // 24))
    places = range(0, len(labels), step)
    rotation = 90 if len(labels) > 8 or max(map(len, labels)) > 5 else 0
    axes.set_xticks(places, [labels[place] for place in places], rotation=rotation, fontsize=8)
    if both:
        axes.set_yticks(places, [labels[place] for place in places], fontsize=8)


def heat_map(
    axes: Axes, rows: Sequence[Sequence[float | None]], label: str, number: str = ".0f", **style: Any
) -> None:
    """Draws a matrix with a colour bar; None is grey and marked by no number."""
    import numpy as np

    width = max(map(len, rows))
    values = np.full((len(rows), width), np.nan)
    for y, row in enumerate(rows):
        values[y, : len(row)] = [np.nan if value is None else value for value in row]
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(values, aspect="auto", **{"cmap": "cividis", **style})
    axes.figure.colorbar(image, ax=axes, label=label)
    if width > MAX_ANNOTATED or len(rows) > 2 * MAX_ANNOTATED:
        return
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                x, y, format(value, number), ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )


def from_zero(axes: Axes) -> None:
    """Lets the y axis start at 0 and leaves room above the data."""
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)


def plain_log_scale(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def layer_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("MoE layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def uniform(layers: Sequence[dict[str, Any]]) -> bool:
    return all(layer["sizes"] == layers[0]["sizes"] for layer in layers)


def load_figure(result: dict[str, Any]) -> Figure:
    layers = result["model"]["routing"]["layers"]
    rows = [[100 * layer["load"][expert] for expert in by_size(layer["sizes"])] for layer in layers]
    figure, (left, right) = new_figure(2, height=max(3.6, 1.6 + 0.24 * len(rows)))
    heat_map(left, rows, "tokens that activate the expert [%]", vmin=0)
    same = uniform(layers)
    if same:
        set_expert_ticks(left, expert_labels(layers[0]["sizes"], by_size(layers[0]["sizes"])))
    left.set(
        xlabel="expert size [neurons]" if same else "expert, smallest first (sizes differ by layer)",
        ylabel="MoE layer",
        title="Load by layer and expert",
    )
    left.set_yticks(range(0, len(rows), max(1, len(rows) // 16)))
    _draw_sizes(right, result)
    return figure


def _draw_sizes(axes: Axes, result: dict[str, Any]) -> None:
    rows = result["model"]["routing"]["by_size"]
    places = range(len(rows))
    axes.bar(places, [100 * row["share"] for row in rows], color=BLUE, label="measured")
    axes.plot(
        places,
        [100 * row["share_if_even"] for row in rows],
        "k--",
        marker="_",
        markersize=12,
        label="every expert alike",
    )
    if len(rows) > 1:
        inverse = [row["experts"] / row["size"] for row in rows]
        expected = [100 * value / sum(inverse) for value in inverse]
        axes.plot(places, expected, "o-", color=ORANGE, label="proportional to 1 / size")
    set_expert_ticks(axes, [str(row["size"]) for row in rows])
    axes.set(xlabel="expert size [neurons]", ylabel="share of all activations [%]", title="Activations by size")
    axes.legend(frameon=False, fontsize=8)


def activation_figure(result: dict[str, Any]) -> Figure:
    """Experts per token and activated share of the expert parameters, by layer (HMoE Fig. 5, right)."""
    figure, (left, right) = new_figure(2)
    for number, name in enumerate(("model", "baseline")):
        routing = (result.get(name) or {}).get("routing")
        if routing is None:
            continue
        layers = routing["layers"]
        style = {"color": COLOURS[number], "marker": MARKERS[number], "label": result[name]["name"]}
        left.plot([layer["experts_per_token"] for layer in layers], **style)
        right.plot([layer["activated_parameters"] / 1e6 for layer in layers], **style)
    left.set(ylabel="experts per token", title="Experts per token")
    right.set(ylabel="parameters per token [millions]", title="Activated expert parameters")
    for axes in (left, right):
        layer_axis(axes)
        from_zero(axes)
        axes.legend(frameon=False, fontsize=8)
    return figure


def balance_figure(result: dict[str, Any]) -> Figure:
    """Max / min tokens per expert (MoDSE Tables 7-8) and busiest expert over the mean, by layer."""
    layers = result["model"]["routing"]["layers"]
    figure, (left, right) = new_figure(2)
    number_of_choices = min(2, min(len(layer["max_over_min_by_choice"]) for layer in layers))
    for choice in range(number_of_choices):
        values = [layer["max_over_min_by_choice"][choice] for layer in layers]
        label = ("first choice", "second choice")[choice]
        left.plot(_gaps(values), color=COLOURS[choice], marker=MARKERS[choice], label=label)
    values = [layer["max_over_min"] for layer in layers]
    left.plot(_gaps(values), color=GREEN, marker="^", label="all choices")
    left.axhline(1, color="black", linestyle=":", label="even")
    left.set(ylabel="busiest / idlest expert (log scale)", title="Max / min tokens per expert")
    plain_log_scale(left)
    right.plot([layer["load_imbalance"] for layer in layers], color=BLUE, marker="o", label="busiest / mean load")
    right.axhline(1, color="black", linestyle=":", label="even")
    starved = [layer["starved_experts"] for layer in layers]
    right.bar(range(len(layers)), starved, color=ORANGE, alpha=0.6, label="experts below a tenth of the mean [number]")
    right.set(ylabel="ratio; number of experts", title="Imbalance and starved experts")
    from_zero(right)
    for axes in (left, right):
        layer_axis(axes)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def confidence_figure(result: dict[str, Any]) -> Figure:
    """The router's entropy over ln E and the probability of its first choice, by layer."""
    layers = result["model"]["routing"]["layers"]
    figure, (left, right) = new_figure(2)
    left.plot([layer["router_entropy_ratio"] for layer in layers], color=BLUE, marker="o")
    left.set(ylabel="entropy / ln(number of experts)", title="Router entropy (1: undecided)", ylim=(0, 1.05))
    right.plot([layer["router_confidence"] for layer in layers], color=BLUE, marker="o", label="measured")
    even = [1 / len(layer["sizes"]) for layer in layers]
    right.plot(even, "k:", label="undecided: 1 / number of experts")
    right.set(ylabel="mean largest probability", title="Router confidence", ylim=(0, 1.05))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        layer_axis(axes)
    return figure


def coactivation_figure(result: dict[str, Any]) -> Figure | None:
    """How often pairs of experts are activated together, over independence: first, middle and last layer."""
    layers = result["model"]["routing"]["layers"]
    if max(layer["experts_per_token"] for layer in layers) <= 1:
        return None
    chosen = sorted({0, len(layers) // 2, len(layers) - 1})
    figure, axes_row = new_figure(len(chosen), width=4.6)
    for axes, number in zip(axes_row, chosen):
        layer = layers[number]
        order = by_size(layer["sizes"])
        lift = layer["coactivation_lift"]
        rows = [[None if i == j else lift[i][j] for j in order] for i in order]
        heat_map(axes, rows, "together / if independent", ".2f", vmin=0)
        set_expert_ticks(axes, expert_labels(layer["sizes"], order), both=True)
        axes.set(xlabel="expert size [neurons]", ylabel="expert size [neurons]", title=f"MoE layer {number}")
    return figure


def _checkpoint_axis(axes: Axes, checkpoints: Sequence[dict[str, Any]]) -> list[float]:
    steps = [checkpoint["step"] for checkpoint in checkpoints]
    axes.grid(alpha=0.3)
    if None not in steps:
        axes.set_xlabel("training step")
        return [float(step) for step in steps]
    places = list(range(len(checkpoints)))
    axes.set_xticks(places, [checkpoint["name"] for checkpoint in checkpoints], rotation=20, fontsize=8)
    axes.set_xlabel("checkpoint")
    return [float(place) for place in places]


def training_figure(result: dict[str, Any]) -> Figure | None:
    """Activated parameters, and activations by size, over checkpoints (HMoE Fig. 5 left and 6)."""
    checkpoints = result["checkpoints"]
    if not checkpoints:
        return None
    figure, (left, middle, right) = new_figure(3, width=4.6)
    places = _checkpoint_axis(left, checkpoints)
    activated = [checkpoint["routing"]["activated_parameters"] / 1e6 for checkpoint in checkpoints]
    left.plot(places, activated, color=BLUE, marker="o")
    left.set(ylabel="activated parameters per token [millions]", title="Activated parameters")
    left.ticklabel_format(axis="y", useOffset=False)
    _checkpoint_axis(middle, checkpoints)
    rows = [checkpoint["routing"]["by_size"] for checkpoint in checkpoints]
    from matplotlib import colormaps

    for column, row in enumerate(rows[0]):
        colour = colormaps["cividis"](column / max(len(rows[0]) - 1, 1) * 0.9)
        shares = [100 * entry[column]["share"] for entry in rows]
        label = f"{row['size']:g} neurons"
        middle.plot(places, shares, color=colour, marker=MARKERS[column % len(MARKERS)], label=label)
    middle.set(ylabel="share of all activations [%]", title="Activations by expert size")
    if len(rows[0]) <= 12:
        middle.set_ylim(0, 1.4 * middle.dataLim.ymax)
        middle.legend(frameon=False, fontsize=7, ncols=2, loc="upper right")
    _checkpoint_axis(right, checkpoints)
    ratios = [[layer["max_over_min"] for layer in item["routing"]["layers"]] for item in checkpoints]
    for layer in range(len(ratios[0])):
        right.plot(places, _gaps([row[layer] for row in ratios]), color=SKY, linewidth=1)
    worst = [max((value for value in row if value is not None), default=float("nan")) for row in ratios]
    right.plot(places, worst, color=VERMILION, marker="o", label="worst layer")
    right.plot([], [], color=SKY, label="single layers")
    right.axhline(3, color="black", linestyle=":", label="3 (MoDSE's last epoch)")
    right.set(ylabel="busiest / idlest expert (log scale)", title="Max / min tokens per expert")
    plain_log_scale(right)
    right.legend(frameon=False, fontsize=8)
    return figure


def stability_figure(result: dict[str, Any]) -> Figure | None:
    """Agreement of each token's route between neighbouring checkpoints and with the last, mean over layers."""
    if not result["stability"]:
        return None
    checkpoints = result["checkpoints"]
    figure, (left, right) = new_figure(2)
    for axes, kind, title, entries, shift in (
        (left, "neighbours", "With the checkpoint before", ("first_choice", "jaccard"), 1),
        (right, "with_last", "With the last checkpoint", ("saturation", "first_choice"), 0),
    ):
        places = _checkpoint_axis(axes, checkpoints)
        rows = result["stability"][kind]
        xs = places[shift : shift + len(rows)]
        for number, entry in enumerate((*entries, "first_choice_chance")):
            values = [sum(layer[entry] for layer in row["layers"]) / len(row["layers"]) for row in rows]
            style = ":" if entry.endswith("chance") else "-"
            label = {
                "first_choice": "same first choice",
                "jaccard": "activated by both / by either",
                "saturation": "saturation: last experts already activated",
                "first_choice_chance": "same first choice by chance",
            }[entry]
            colour = BLACK if entry.endswith("chance") else COLOURS[number]
            axes.plot(xs, values, linestyle=style, color=colour, marker=MARKERS[number], label=label)
        axes.set(ylabel="share, mean over layers", title=title, ylim=(0, 1.05))
        axes.legend(frameon=False, fontsize=8)
    return figure
