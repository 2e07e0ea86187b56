"""Next-token accuracy and perplexity on held-out text, as metrics of the library `evaluate`.

    metrics = held_out_metrics()
    for batch in batches:  # labels [B, S], -100 where nothing is predicted
        predictions, losses = score_tokens(model(**batch).logits, batch["labels"])
        metrics.add_batch(predictions=predictions, references=predicted_labels(batch["labels"]), losses=losses)
    metrics.compute()  # {"accuracy": 0.41, "perplexity": 17.3, "loss": 2.85}

In a `Trainer`, whose `batch_eval_metrics=True` keeps memory bounded:

    Trainer(..., compute_metrics=NextTokenMetrics(), preprocess_logits_for_metrics=score_tokens)

`evaluate.load` needs the Hub, and its metrics keep every token until `compute`, where each costs about 100 bytes;
these come with the package and keep two sums per batch.

Letters in shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Features, Value
from torch import Tensor


IGNORED_LABEL = -100
_INPUTS = """
Args:
    predictions, losses: what the metric takes of each token, as arrays, tensors or lists of any shape.
    references: ids of the true tokens, of the same shape; -100 where nothing is predicted.
"""


class _TokenMean(evaluate.Metric):
    """Mean over the tokens whose label is not -100; of each batch only a sum and the number of these tokens are kept.

    Everything else is `evaluate.Metric`, with several processes too. One process keeps its rows in memory unless
    `keep_in_memory=False`, and then needs no cache folder. `len(metric)` is the number of batches. A metric gives the
    `_score` of each token and the `_result` of their mean.
    """

    _values: str  # name of the input beside `references`

    def __init__(self, config_name: str | None = None, **options: Any):
        options.setdefault("keep_in_memory", options.get("num_process", 1) == 1)
        super().__init__(config_name, **options)

    def _build_data_dir(self) -> str:
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        features = Features({self._values: Value("float64"), "references": Value("float64")})
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description=_INPUTS, features=features, format="numpy"
        )

    def add(self, **token: Any) -> None:
        """Adds one token, or one sequence: `add_batch` with `prediction`, `reference` and `loss`."""
        self.add_batch(**{"losses" if name == "loss" else f"{name}s": value for name, value in token.items()})

    def add_batch(self, **batch: Any) -> None:
        """Adds the tokens of a batch.

        Raises:
            ValueError: if an input is missing or unknown, or the shapes differ.
        """
        given = {name: _tensor(values) for name, values in batch.items() if values is not None}
        if set(given) != set(self._feature_names()):
            raise ValueError(f"`{self.name}` takes the inputs {self._feature_names()}, got {sorted(given)}")
        values, references = given[self._values], given["references"]
        if values.shape != references.shape:
            shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
            raise ValueError(f"the inputs of `{self.name}` must have one shape, got {shapes}")
        known = references != IGNORED_LABEL
        total = self._score(values[known], references[known]).sum(dtype=torch.float64)
        super().add_batch(**{self._values: [total.item()], "references": [float(known.sum())]})

    def compute(self, **inputs: Any) -> dict[str, float] | None:
        """The metric of all tokens added since the last call, and of `inputs`; None on processes after the first.

        Raises:
            ValueError: if nothing was added.
        """
        if not len(self) and not any(inputs.get(name) is not None for name in self._feature_names()):
            raise ValueError(f"`{self.name}` has nothing to compute: give it tokens with `add_batch` first")
        return super().compute(**inputs)

    def _compute(self, *, references: np.ndarray, **sums: np.ndarray) -> dict[str, float]:
        count = float(references.sum())
        return self._result(float(sums[self._values].sum()) / count if count else math.nan)


def _tensor(values: Any) -> Tensor:
    # By way of NumPy, where a list of floats keeps its precision.
    return values.detach().cpu() if torch.is_tensor(values) else torch.as_tensor(np.asarray(values))


class NextTokenAccuracy(_TokenMean):
    """Share of the predicted tokens whose most probable token, given those before it, is the true one.

    `compute(predictions=..., references=...)`, ids of tokens, gives `{"accuracy": share}`; NaN if no token counts.
    """

    _values = "predictions"

    def _score(self, predictions: Tensor, references: Tensor) -> Tensor:
        return predictions == references

    def _result(self, mean: float) -> dict[str, float]:
        return {"accuracy": mean}


class Perplexity(_TokenMean):
    """Exponential of the mean cross-entropy of a token given those before it (Jelinek et al. 1977).

    `compute(losses=..., references=...)`, cross-entropies in nats and ids, gives `{"perplexity": ..., "loss": nats per
    token}`; NaN if no token counts, infinite above the largest float. Comparable only between models that share a
    tokenizer and read the text in the same windows. The metric of that name on the Hub takes texts and the name of a
    model instead.
    """

    _values = "losses"

    def _score(self, losses: Tensor, references: Tensor) -> Tensor:
        return losses

    def _result(self, mean: float) -> dict[str, float]:
        return {"perplexity": math.inf if mean > math.log(np.finfo(np.float64).max) else math.exp(mean), "loss": mean}


def held_out_metrics(**options: Any) -> Any:
    """Both metrics as one, by `evaluate.combine`; `options` are those of `evaluate.Metric`."""
    return evaluate.combine([NextTokenAccuracy(**options), Perplexity(**options)])


def predicted_labels(labels: Tensor) -> Tensor:
    """`labels` [B, S] with -100 for the first token of each row, which nothing predicts."""
    labels = labels.clone()
    labels[:, 0] = IGNORED_LABEL
    return labels


def score_tokens(logits: Tensor | tuple, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the metrics need of the logits: a `preprocess_logits_for_metrics` of `Trainer`.

    Args:
        logits: [B, S, V], or a tuple of a model's outputs that holds them.
        labels: [B, S], of the tokens themselves: position s is predicted by the logits of position s - 1.

    Returns:
        predictions: [B, S], the most probable id of each token; -100 for the first of a row.
        losses: [B, S], cross-entropy in nats of each token, float32; 0 where the label is -100 and for the first.
    """
    if isinstance(logits, (tuple, list)):  # stock MoE models put a loss before them
        logits = next(output for output in logits if torch.is_tensor(output) and output.dim() == 3)
    predictions = torch.full_like(labels, IGNORED_LABEL)
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    for row in range(labels.shape[0]):  # one row at a time: a float32 copy of all logits can be large
        scores = logits[row, :-1].float()
        predictions[row, 1:] = scores.argmax(-1)
        losses[row, 1:] = F.cross_entropy(scores, labels[row, 1:], reduction="none", ignore_index=IGNORED_LABEL)
    return predictions, losses


class NextTokenMetrics:
    """`compute_metrics` of a `Trainer` whose `preprocess_logits_for_metrics` is [`score_tokens`].

    Reports `eval_accuracy` and `eval_perplexity`. With `TrainingArguments(batch_eval_metrics=True)` two numbers per
    batch and metric are kept; without it `Trainer` keeps predictions, losses and labels of all tokens, 20 bytes for
    each. `Trainer` gathers the tokens of all ranks, so every rank has the same figures.
    """

    def __init__(self) -> None:
        self._metrics = held_out_metrics()

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        predictions, losses = prediction.predictions
        references = predicted_labels(torch.as_tensor(prediction.label_ids))
        self._metrics.add_batch(predictions=predictions, references=references, losses=losses)
        return self._metrics.compute() if compute_result else {}
