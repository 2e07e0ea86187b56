"""The analysis as one HTML file that needs nothing else, with all numbers beside it as JSON and CSV."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import figures, figures_tokens
from .tables import tables


if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-size: 14px; }
th, td { padding: 0.2rem 0.55rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } td.text { white-space: normal; }
.note { color: #555; } code { background: #f3f3f3; padding: 0 0.2rem; }
"""

# Title, picture, and what it shows after which figure of the papers.
SECTIONS: Sequence[tuple[str, Callable[[dict[str, Any]], Figure | None], str]] = (
    (
        "Load and expert size",
        figures.load_figure,
        "Left: share of tokens that activate each expert; a layer adds up to its experts per token. Right: share of "
        "all activations by expert size, beside equal use and use proportional to 1 / size, where HMoE's parameter "
        "penalty is in balance. After HMoE Fig. 3 (right), 6 and 7.",
    ),
    (
        "Activated parameters by layer",
        figures.activation_figure,
        "Experts per token, which varies under Top-P only, and parameters of the activated experts. After HMoE Fig. 5 "
        "(right) and Table 2.",
    ),
    (
        "Load balance",
        figures.balance_figure,
        "Left: tokens of the busiest expert over those of the idlest, for first and second choices apart, after MoDSE "
        "Tables 7 and 8; a layer with a dead expert has no ratio. Right: the busiest expert's load over the mean, and "
        "how many experts get less than a tenth of the mean. A parameter penalty makes load uneven on purpose.",
    ),
    (
        "Router entropy and confidence",
        figures.confidence_figure,
        "Entropy of the router's softmax over all experts, over its maximum, and the probability of the first choice; "
        "means over tokens.",
    ),
    (
        "Co-activation",
        figures.coactivation_figure,
        "How often two experts serve the same token, over what independent choices with the same loads would give. "
        "Above 1 they go together. A fixed number of experts per token pushes the mean below 1.",
    ),
    (
        "Token difficulty and size",
        figures_tokens.loss_and_size_figure,
        "Mean size of the experts chosen for tokens of each loss, after HMoE Fig. 10, which names single tokens. A "
        "token has two positions: the one that predicts it, where the loss arises, and the one that reads it.",
    ),
    (
        "Difficult tokens against the baseline",
        figures_tokens.reduction_figure,
        "After MoDSE Table 5: mean loss of token types above a threshold, baseline minus model; above 0 the model is "
        "better. Selecting by one model's loss also selects its bad luck, so that curve flatters the other model; the "
        "symmetric and the held-out selections do not, and the truth is nearer to them.",
    ),
    (
        "Sizes chosen by difficult tokens",
        figures_tokens.difficult_sizes_figure,
        "After MoDSE Table 6. Only the difference between the two bars of a size speaks of difficulty.",
    ),
    (
        "Single tokens",
        figures_tokens.top_tokens_figure,
        "Shares of a token's activations by expert size, after HMoE Fig. 10: the tokens with the smallest experts on "
        "average (top) and with the widest (bottom).",
    ),
    (
        "Similarity and synergy of experts",
        figures_tokens.similarity_figure,
        "After HMoE Fig. 9. An expert's token distribution is the frequency of each token type among those routed to "
        "it. Left: Wasserstein-1 distance; low is similar. Right: KL divergence of the row's expert from the "
        "column's, each distribution mixed with 1 % of that of all tokens; low means that they share tokens. The "
        "paper defines neither the distribution nor the distance between two tokens.",
    ),
    (
        "Over training",
        figures.training_figure,
        "Activated parameters and activations by size over checkpoints, after HMoE Fig. 5 (left) and 6; max / min "
        "tokens per expert after MoDSE Tables 7 and 8.",
    ),
    (
        "Stability of routes",
        figures.stability_figure,
        "The same tokens, read by each checkpoint. Counts per expert can be stable while tokens change places; this "
        "compares each token's own route. Saturation after OLMoE (arXiv 2409.02060).",
    ),
)


def write_report(result: dict[str, Any], folder: str | Path) -> Path:
    """Writes report.html, report.json and one CSV file per table into `folder`; returns the path of the first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, rows in tables(result).items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    path = folder / "report.html"
    path.write_text(render(result), encoding="utf-8")
    return path


def headline(result: dict[str, Any]) -> str:
    """The few numbers that the command prints."""
    lines = []
    for name in ("model", "baseline"):
        run = result[name]
        if run is None:
            continue
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


def render(result: dict[str, Any]) -> str:
    """The report as HTML."""
    settings = result["settings"]
    parts = [
        f"<h1>Routing of {html.escape(result['model']['name'])}</h1>",
        f"<p class='note'>{result['model']['predicted_tokens']:,} predicted tokens of "
        f"{html.escape(', '.join(Path(path).name for path in settings['data']))}, in windows of {settings['window']}. "
        "Made by <code>hmoe analyze</code>; every number is in <code>report.json</code> and the CSV files beside this "
        "file.</p>",
        _models_table(result),
    ]
    for title, draw, text in SECTIONS:
        figure = draw(result)
        if figure is None:
            continue
        parts.append(f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(text)}</p>\n{_picture(figure, title)}")
        if draw is figures_tokens.reduction_figure:
            parts.append(_reductions_table(result))
        elif draw is figures_tokens.loss_and_size_figure:
            parts.append(_correlation_text(result))
    parts.append(_top_tokens_table(result))
    title = html.escape(f"Routing of {result['model']['name']}")
    return (
        f"<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n<title>{title}</title>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n<link rel='icon' href='data:,'>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _picture(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"<img alt='{html.escape(title, quote=True)}' src='data:image/png;base64,{data}'>"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = [
        "".join(
            f"<td{' class=text' if column in text_columns else ''}>{html.escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        for row in rows
    ]
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(f"<tr>{row}</tr>" for row in body) + "\n</table>"


def _models_table(result: dict[str, Any]) -> str:
    runs = [("model", result["model"]), ("baseline", result["baseline"])]
    runs += [("checkpoint", run) for run in result["checkpoints"][:-1]]
    rows = []
    for role, run in runs:
        if run is None:
            continue
        routing = run["routing"]
        dead = sum(layer["dead_experts"] for layer in routing["layers"]) if routing else None
        rows.append(
            [
                run["name"],
                role,
                f"{run['loss']:.4f}",
                f"{run['perplexity']:.2f}",
                f"{run['accuracy']:.2%}",
                f"{run['parameters']:,}",
                f"{routing['activated_parameters']:,.0f}" if routing else "all",
                f"{routing['activated_ratio']:.2%}" if routing else "-",
                f"{routing['experts_per_token']:.2f}" if routing else "-",
                str(dead) if routing else "-",
            ]
        )
    header = ["name", "role", "loss [nats]", "perplexity", "next-token accuracy", "parameters", "activated per token"]
    return _html_table([*header, "of expert parameters", "experts per token", "dead experts"], rows)


def _reductions_table(result: dict[str, Any]) -> str:
    data = result["tokens"]["difficulty"]
    rows = [
        [
            figures_tokens.SELECTION_LABELS[row["selection"]],
            f"{row['threshold']:.2f}",
            f"{row['types']:,}",
            f"{row['occurrences']:,}",
            "-" if row["reduction"] is None else f"{row['reduction']:+.3f}",
            "-" if row["reduction_by_occurrence"] is None else f"{row['reduction_by_occurrence']:+.3f}",
        ]
        for row in data["reductions"]
    ]
    note = (
        f"<p class='note'>Mean loss: model {data['model_loss']:.3f}, baseline {data['baseline_loss']:.3f} nats. Only "
        f"the {data['frequent_types']:,} types with {data['min_count']} occurrences or more are judged.</p>"
    )
    header = ["types selected", "threshold [nats]", "types", "occurrences", "reduction, by type", "by occurrence"]
    return note + _html_table(header, rows)


def _correlation_text(result: dict[str, Any]) -> str:
    values = {name: data["correlation"] for name, data in result["tokens"]["loss_and_size"].items()}
    said = [f"{value:+.3f} at the {name} position" for name, value in values.items() if value is not None]
    if not said:
        return "<p class='note'>All experts of a layer have one size, so loss and size cannot go together.</p>"
    return f"<p class='note'>Correlation of a token's loss with the size chosen: {'; '.join(said)}.</p>"


def _top_tokens_table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["tokens"]["top_tokens"]:
        listed = [f"{token} ({share:.0%})" for token, share in zip(row["tokens"], row["shares"])]
        rows.append([str(row["size"]), "   ".join(listed)])
    text = (
        "After HMoE Table 3: the tokens with the largest share of their activations in experts of each size, with "
        f"that share. Tokens with fewer than {result['settings']['min_count']} occurrences are left out; _ stands for "
        "a leading space."
    )
    table = _html_table(["expert size [neurons]", "tokens"], rows, text_columns=(1,))
    return f"<h2>Top tokens by expert size</h2>\n<p>{html.escape(text)}</p>\n{table}"
