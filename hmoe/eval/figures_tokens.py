"""Pictures of tokens and experts: difficulty, sizes chosen, similarity, synergy. See [`hmoe.eval.figures`]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .figures import (
    BLACK,
    BLUE,
    COLOURS,
    MARKERS,
    ORANGE,
    by_size,
    expert_labels,
    from_zero,
    heat_map,
    new_figure,
    set_expert_ticks,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_TYPES = 20  # fewer difficult types make no picture
SELECTION_LABELS = {
    "baseline": "by the baseline's loss (MoDSE)",
    "model": "by the model's loss",
    "both": "by the mean of both (symmetric)",
    "held_out": "by the baseline's loss on the other half",
}


def loss_and_size_figure(result: dict[str, Any]) -> Figure:
    """Size of the chosen experts by the token's loss (HMoE Fig. 10 as a measurement)."""
    figure, (left, right) = new_figure(2)
    data = result["tokens"]["loss_and_size"]
    labels = {"predicting": "position that predicts the token", "reading": "position that reads the token"}
    for number, (name, label) in enumerate(labels.items()):
        rows = [row for row in data[name]["bins"] if row["tokens"] >= 30]
        losses = [row["mean_loss"] for row in rows]
        style: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "label": label}
        left.plot(losses, [row["relative_size"] for row in rows], **style)
        right.plot(losses, [100 * row["activated_share"] for row in rows], **style)
    left.axhline(1, color="black", linestyle=":", label="average size")
    left.set(ylabel="mean size of chosen experts / mean size", title="Size of chosen experts")
    right.set(ylabel="neurons used per layer [%]", title="Activated share of the neurons")
    from_zero(right)
    for axes in (left, right):
        axes.set_xlabel("loss of the token [nats], bins of 30 tokens or more")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    left.ticklabel_format(axis="y", useOffset=False)
    return figure


def reduction_figure(result: dict[str, Any]) -> Figure | None:
    """Loss reduction on difficult token types by threshold (MoDSE Table 5), under four ways to select them."""
    rows = result["tokens"]["difficulty"]["reductions"]
    if not rows:
        return None
    figure, (axes,) = new_figure(1, width=7.5)
    for number, (selection, label) in enumerate(SELECTION_LABELS.items()):
        chosen = [row for row in rows if row["selection"] == selection and row["reduction"] is not None]
        axes.plot(
            [row["threshold"] for row in chosen],
            [row["reduction"] for row in chosen],
            color=COLOURS[number],
            marker=MARKERS[number],
            label=label,
        )
    axes.axhline(0, color=BLACK, linewidth=1)
    axes.set(
        xlabel="threshold on a type's mean loss [nats]",
        ylabel="baseline's loss - model's loss [nats]",
        title="Loss reduction on difficult token types, by how they are selected",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def difficult_sizes_figure(result: dict[str, Any]) -> Figure | None:
    """Sizes that difficult types choose, beside those of all types (MoDSE Table 6)."""
    data = result["tokens"]["difficulty"]
    everything = data["all_types"]
    paper_selection = data["shares"][0]["selection"]
    shares = [row for row in data["shares"] if row["selection"] == paper_selection and row["types"] >= MIN_TYPES]
    if not shares or len(everything["all_choices"]["sizes"]) < 2:
        return None
    hardest = shares[-1]
    figure, axes_row = new_figure(2)
    for axes, kind, title in zip(axes_row, ("all_choices", "first_choice"), ("All choices", "First choice")):
        sizes = everything[kind]["sizes"]
        for number, (row, label) in enumerate(
            ((everything, "all types"), (hardest, f"{hardest['types']} types above {hardest['threshold']:.2f} nats"))
        ):
            total = max(sum(row[kind]["counts"]), 1)
            places = [place + 0.4 * number - 0.2 for place in range(len(sizes))]
            heights = [100 * count / total for count in row[kind]["counts"]]
            axes.bar(places, heights, width=0.38, color=(BLUE, ORANGE)[number], label=label)
        set_expert_ticks(axes, [str(size) for size in sizes])
        axes.set(xlabel="expert size [neurons]", ylabel="share of their activations [%]", title=title)
        axes.legend(frameon=False, fontsize=8)
    return figure


def similarity_figure(result: dict[str, Any]) -> Figure:
    """Wasserstein distance and KL divergence between experts' token distributions (HMoE Fig. 9)."""
    data = result["tokens"]["similarity"]
    chosen = data["mean"] or data["layers"][-1]
    title = "mean over layers" if data["mean"] else f"MoE layer {chosen['layer']}"
    order = by_size(chosen["sizes"])
    labels = expert_labels(chosen["sizes"], order)
    figure, axes_row = new_figure(2, width=6.2, height=5.0)
    for axes, kind, label in zip(
        axes_row,
        ("wasserstein", "kl"),
        ("Wasserstein-1 distance, any two tokens 1 apart", "KL(row || column) [nats]"),
    ):
        if kind == "wasserstein" and data["ground_metric"] == "embedding":
            label = "Wasserstein-1 distance, sliced, on embeddings"
        rows = [[None if i == j else chosen[kind][i][j] for j in order] for i in order]
        heat_map(axes, rows, label, ".2f")
        set_expert_ticks(axes, labels, both=True)
        axes.set(xlabel="expert size [neurons]", ylabel="expert size [neurons]")
    axes_row[0].set_title(f"Distance of token distributions, {title}")
    axes_row[1].set_title(f"Divergence of token distributions, {title}")
    return figure


def top_tokens_figure(result: dict[str, Any]) -> Figure | None:
    """Activation shares by size of the types with the largest and smallest share of large experts (HMoE Fig. 10)."""
    data = result["tokens"]["examples"]
    if not data["tokens"] or len(data["sizes"]) < 2:
        return None
    figure, (axes,) = new_figure(1, width=8.0, height=1.6 + 0.26 * len(data["tokens"]))
    rows = [[100 * share for share in shares] for shares in data["shares"]]
    heat_map(axes, rows, "share of the token's activations [%]", vmin=0)
    set_expert_ticks(axes, [str(size) for size in data["sizes"]])
    axes.set_yticks(range(len(data["tokens"])), [_plain(token) for token in data["tokens"]], fontsize=8)
    axes.set(xlabel="expert size [neurons]", ylabel="token", title="Where single tokens go")
    return figure


def _plain(token: str) -> str:
    """A token that every font can draw and that is no formula."""
    text = token.replace("$", r"\$")
    return text if text.isascii() else ascii(token)[1:-1]
