"""The pictures of `docs/performance.md`, from the rows of the benchmarks.

Every function takes rows and returns a figure, or None where there is nothing to draw. Colours tell apart under every
kind of colour blindness (Okabe-Ito), and so do the markers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from timing import Row


STYLES = {
    "hmoe grouped_mm": ("#0072B2", "o"),
    "mixtral grouped_mm": ("#D55E00", "s"),
    "mixtral eager": ("#E69F00", "^"),
    "mixtral batched_mm": ("#CC79A7", "v"),
    "module_list": ("#009E73", "D"),
    "hmoe": ("#0072B2", "o"),
    "llama": ("#009E73", "D"),
}
DENSE = {"color": "black", "linestyle": ":", "label": "dense, equal FLOPs"}
PASSES = ("forward", "forward+backward")


def experts_figure(rows: Sequence[Row]) -> Figure | None:
    """Time over dense, by number of experts; one panel per pass and number of tokens."""
    rows = [row for row in rows if is_plain(row) and "ratio" in row]
    tokens = sorted({row["tokens"] for row in rows})
    if not rows:
        return None
    figure, grid = plt.subplots(
        2, len(tokens), figsize=(3 * len(tokens), 6), sharex=True, squeeze=False, layout="constrained"
    )
    for line, direction in zip(grid, PASSES):
        for axes, count in zip(line, tokens):
            chosen = [row for row in rows if row["pass"] == direction and row["tokens"] == count]
            _draw_ratios(axes, chosen, lambda row: row["experts"])
            axes.set_title(f"{direction}, {count} token{'s' if count > 1 else ''}", fontsize=10)
        line[0].set_ylabel("time / dense FFN of equal FLOPs")
    for axes in grid[-1]:
        axes.set_xlabel("experts")
    _legend(figure, grid.flat)
    return figure


def growth_figure(rows: Sequence[Row], against: str) -> Figure | None:
    """Time over dense against one factor; a panel per pass."""
    rows = [row for row in rows if row["against"] == against and "ratio" in row]
    passes = [direction for direction in PASSES if any(row["pass"] == direction for row in rows)]
    if not rows:
        return None
    labels: dict[str, tuple[str, Callable[[Row], float]]] = {
        "experts": ("experts", lambda row: row["experts"]),
        "tokens": ("tokens", lambda row: row["tokens"]),
        "spread": ("largest / smallest expert", lambda row: row["widest"] / row["narrowest"]),
    }
    label, place = labels[against]
    figure, line = plt.subplots(1, len(passes), figsize=(5 * len(passes), 4), squeeze=False, layout="constrained")
    for axes, direction in zip(line[0], passes):
        _draw_ratios(axes, [row for row in rows if row["pass"] == direction], place)
        axes.set_title(direction, fontsize=10)
        axes.set_xlabel(label)
    line[0][0].set_ylabel("time / dense FFN of equal FLOPs")
    _legend(figure, line[0])
    return figure


def memory_figure(rows: Sequence[Row]) -> Figure | None:
    """Bytes saved for backward and peak memory at the largest number of tokens, by number of experts."""
    rows = [row for row in rows if is_plain(row) and "peak_mib" in row]
    tokens = max((row["tokens"] for row in rows), default=0)
    rows = [row for row in rows if row["tokens"] == tokens]
    if not rows:
        return None
    names = list(dict.fromkeys(row["contender"] for row in rows))
    experts = sorted({row["experts"] for row in rows})
    colours = ("#0072B2", "#E69F00", "#009E73")
    figure, panels = plt.subplots(
        1, 2, figsize=(10, 0.45 * len(names) + 1.6), sharey=True, layout="constrained", squeeze=False
    )
    titles = {"saved_mib": "kept for backward", "peak_mib": "peak over weights and inputs"}
    height = 0.8 / len(experts)
    for axes, (key, title) in zip(panels[0], titles.items()):
        for number, count in enumerate(experts):
            values = {row["contender"]: row[key] for row in rows if row["experts"] == count}
            places = [names.index(name) + (number - (len(experts) - 1) / 2) * height for name in values]
            axes.barh(places, values.values(), height, color=colours[number % 3], label=f"{count} experts")
        axes.set_xlabel(f"{title} [MiB]")
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    panels[0][1].legend(fontsize=8)
    figure.suptitle(f"forward+backward, {tokens} tokens", fontsize=10)
    return figure


def generate_figure(rows: Sequence[Row]) -> Figure | None:
    """Tokens/s over the fastest stock backend of Mixtral, by batch; a panel per stage."""
    rows = [row for row in rows if row.get("speed_to_stock")]
    if not rows:
        return None
    figure, line = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, stage in zip(line, ("prefill", "decode")):
        chosen = [row for row in rows if row["stage"] == stage]
        _draw(axes, chosen, lambda row: row["batch"], "speed_to_stock")
        axes.axhline(1, color="black", linestyle=":", label="fastest stock backend")
        axes.set_title(stage, fontsize=10)
        axes.set_xlabel("batch [sequences]")
        axes.grid(alpha=0.3)
        batches = sorted({row["batch"] for row in chosen})
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
    line[0].set_ylabel("tokens/s over Mixtral's fastest backend")
    _legend(figure, line)
    return figure


def is_plain(row: Row) -> bool:
    """Whether a row of `experts.py` has the usual dtype, sizes and routing."""
    return (row["dtype"], row["sizes"], row["routing"]) == ("float32", "arithmetic", "uniform")


def _draw_ratios(axes: Axes, rows: Sequence[Row], place: Callable[[Row], float]) -> None:
    _draw(axes, rows, place, "ratio")
    axes.axhline(1, **DENSE)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = sorted({place(row) for row in rows})
    axes.set_xticks(places, [f"{value:.0f}" for value in places])
    low, high = axes.get_ylim()
    subs = (1, 1.2, 1.5, 2, 3, 5) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _draw(axes: Axes, rows: Sequence[Row], place: Callable[[Row], float], key: str) -> None:
    for name, (colour, marker) in STYLES.items():
        chosen = sorted((row for row in rows if row["contender"] == name), key=place)
        if chosen:
            axes.errorbar(
                [place(row) for row in chosen],
                [row[key]["median"] for row in chosen],
                yerr=[
                    [max(0, row[key]["median"] - row[key]["low"]) for row in chosen],
                    [max(0, row[key]["high"] - row[key]["median"]) for row in chosen],
                ],
                color=colour,
                marker=marker,
                markersize=5,
                capsize=2,
                label=name,
            )


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles = {}
    for axes in panels:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found))
    columns = int(figure.get_figwidth() // 2.5)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9)
