"""Pictures of tokens and experts: difficulty, sizes chosen, similarity, synergy. See [`hmoe.eval.figures`]."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .figures import BLACK, expert_labels, from_zero, heat_map, new_figure, set_expert_ticks


MIN_TYPES = 20  # fewer difficult types make no picture
MIN_TOKENS = 30  # fewer tokens make no point
SELECTION_LABELS = {
    "baseline": "by the baseline's loss (MoDSE)",
    "model": "by the model's loss",
    "both": "by the mean of both (symmetric)",
    "held_out": "by the baseline's loss on the other half",
}


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
    experts = pd.DataFrame({"expert": range(len(drawn["sizes"])), "size": drawn["sizes"]})
    experts = experts.sort_values(["size", "expert"])
    discrete = similarity["ground_metric"] == "discrete"
    distance = f"Wasserstein-1 distance, {'any two tokens 1 apart' if discrete else 'sliced, on embeddings'}"
    figure, panels = new_figure(2, width=6.2, height=5.0)
    for axes, kind, name, label in (
        (panels[0], "wasserstein", "Distance", distance),
        (panels[1], "kl", "Divergence", "KL(row || column) [nats]"),
    ):
        values = np.array(drawn[kind], dtype=float)[np.ix_(experts["expert"], experts["expert"])]
        np.fill_diagonal(values, np.nan)
        heat_map(axes, values, label, ".2f")
        set_expert_ticks(axes, expert_labels(experts), both=True)
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
