"""The analysis as one HTML file that needs nothing else, with all numbers beside it as JSON and CSV."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from . import figures
from .frames import frames


TEMPLATE = Path(__file__).parent / "report.html.jinja"
# Columns of the tables in the report: heading, column of the frame, format of a value.
MODEL_COLUMNS = (
    ("name", "model", "{}"),
    ("role", "role", "{}"),
    ("loss [nats]", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("next-token accuracy", "accuracy", "{:.2%}"),
    ("parameters", "parameters", "{:,}"),
    ("activated per token", "activated_parameters", "{:,.0f}"),
    ("of expert parameters", "activated_ratio", "{:.2%}"),
    ("experts per token", "experts_per_token", "{:.2f}"),
    ("dead experts", "dead_experts", "{:.0f}"),
)
REDUCTION_COLUMNS = (
    ("types selected", "selection", "{}"),
    ("threshold [nats]", "threshold", "{:.2f}"),
    ("types", "types", "{:,}"),
    ("occurrences", "occurrences", "{:,}"),
    ("reduction, by type", "reduction", "{:+.3f}"),
    ("by occurrence", "reduction_by_occurrence", "{:+.3f}"),
)
TOKEN_COLUMNS = (("expert size [neurons]", "size", "{}"), ("tokens", "tokens", "{}"))


def write_report(result: dict[str, Any], folder: str | Path) -> Path:
    """Writes report.html, report.json and one CSV file per frame into `folder`; returns the path of the first.

    Text that a spreadsheet would take for a formula gets an apostrophe in the CSV files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    tables = frames(result)
    for name, frame in tables.items():
        if not frame.empty:
            frame.replace(r"^(?=[=+@-])", "'", regex=True).to_csv(folder / f"{name}.csv", index=False)
    path = folder / "report.html"
    path.write_text(render(result, tables), encoding="utf-8")
    return path


def headline(result: dict[str, Any]) -> str:
    """The few numbers that the command prints."""
    lines = []
    for run in filter(None, (result["model"], result["baseline"])):
        line = f"{run['name']}: loss {run['loss']:.4f} nats, perplexity {run['perplexity']:.2f}"
        line += f", next-token accuracy {run['accuracy']:.1%}"
        if run["routing"]:
            routing = run["routing"]
            line += (
                f", {routing['experts_per_token']:.2f} experts per token, {routing['activated_parameters']:,.0f} of "
                f"{run['parameters']:,} parameters activated ({routing['activated_ratio']:.1%} of the experts')"
            )
        lines.append(line)
    return "\n".join(lines)


def render(result: dict[str, Any], tables: dict[str, pd.DataFrame]) -> str:
    """The report as HTML; `tables` as [`hmoe.eval.frames.frames`] makes them."""
    with rc_context(figures.STYLE):
        drawn = draw({name: frame.infer_objects() for name, frame in tables.items()}, result["tokens"]["similarity"])
        pictures = {name: _png(figure) for name, figure in drawn.items() if figure is not None}
    models = tables["models"].assign(dead_experts=tables["layers"].groupby("role")["dead_experts"].sum())
    routed = models["activated_parameters"].notna()  # a dense model activates all its parameters
    models["activated_parameters"] = models["activated_parameters"].where(routed, models["parameters"])
    selections = tables["difficult_tokens"].replace({"selection": figures.SELECTION_LABELS})
    top_tokens = [
        {"size": row["size"], "tokens": "   ".join(f"{t} ({s:.0%})" for t, s in zip(row["tokens"], row["shares"]))}
        for row in result["tokens"]["top_tokens"]
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True).render(
        result,
        sources=[Path(path).name for path in result["settings"]["data"]],
        pictures=pictures,
        models=_html(models.reset_index(), MODEL_COLUMNS),
        reductions=_html(selections, REDUCTION_COLUMNS),
        top_tokens=_html(pd.DataFrame(top_tokens), TOKEN_COLUMNS),
    )


def draw(tables: dict[str, pd.DataFrame], similarity: dict[str, Any]) -> dict[str, Figure | None]:
    """Every figure by the name that the template knows it by; None where there is nothing to draw."""
    models, layers, experts, sizes = (tables[name] for name in ("models", "layers", "experts", "sizes"))
    return {
        "load": figures.load_figure(experts, sizes),
        "activation": figures.activation_figure(layers),
        "balance": figures.balance_figure(layers),
        "confidence": figures.confidence_figure(layers, experts),
        "coactivation": figures.coactivation_figure(layers, tables["expert_pairs"]),
        "loss_and_size": figures.loss_and_size_figure(tables["loss_and_size"]),
        "reduction": figures.reduction_figure(tables["difficult_tokens"]),
        "difficult_sizes": figures.difficult_sizes_figure(tables["difficult_token_sizes"]),
        "example_tokens": figures.top_tokens_figure(tables["example_tokens"]),
        "similarity": figures.similarity_figure(similarity),
        "training": figures.training_figure(models, sizes, layers),
        "stability": figures.stability_figure(tables["stability"], models),
    }


def _png(figure: Figure) -> str:
    """The figure as base64, with a legend wherever something has a label."""
    for axes in figure.axes:
        if axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _html(frame: pd.DataFrame, columns: tuple[tuple[str, str, str], ...]) -> Markup:
    """An HTML table of some columns of a frame, `-` where a value is missing; nothing for an empty frame."""
    if frame.empty:
        return Markup("")
    text = {
        heading: [form.format(value) if pd.notna(value) else "-" for value in frame[column]]
        for heading, column, form in columns
    }
    with pd.option_context("display.max_colwidth", None):
        return Markup(pd.DataFrame(text).to_html(index=False, border=0))
