"""The load of every layer and expert as one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter


MOST_NUMBERS = 16  # columns up to which every cell carries its number


def draw_load(axes: Axes, load: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]] | None = None) -> AxesImage:
    """Draws shares of tokens by layer (rows, first on top) and expert (columns, smallest first); cells without expert
    stay white. Colours run from 0 to the largest share.

    Args:
        load: per layer, per expert, the share of tokens that activate it.
        sizes: neurons, alike; without them experts keep their order.
    """
    columns = max(map(len, load))
    shares = np.full((len(load), columns), np.nan)
    for layer, row in enumerate(load):
        order = sorted(range(len(row)), key=lambda expert: sizes[layer][expert] if sizes else expert)
        shares[layer, : len(row)] = [row[expert] for expert in order]
    largest = float(np.nanmax(shares)) or 1.0
    image = axes.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=largest, interpolation="nearest")
    if columns <= MOST_NUMBERS:
        for (layer, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                color = "black" if share > 0.6 * largest else "white"
                axes.text(column, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(columns) if columns <= MOST_NUMBERS else [0, columns - 1])
    if sizes and all(sorted(row) == sorted(sizes[0]) for row in sizes) and columns <= MOST_NUMBERS:
        axes.set_xticklabels(map(str, sorted(sizes[0])))
        axes.set_xlabel("expert size [neurons]")
    else:
        axes.set_xlabel("expert, smallest first" if sizes else "expert")
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def load_figure(load: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]] | None = None) -> Figure:
    """[`draw_load`] with a colour bar, as a figure of its own."""
    columns = min(max(map(len, load)), 2 * MOST_NUMBERS)
    figure = Figure(figsize=(2.5 + 0.45 * columns, 1.6 + 0.3 * min(len(load), 40)), layout="constrained")
    axes = figure.add_subplot()
    figure.colorbar(draw_load(axes, load, sizes), label="share of tokens", format=PercentFormatter(1))
    return figure
