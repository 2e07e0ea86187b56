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
from collections.abc import Callable
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
    {inputs}
    references: ids of the true tokens, of the same shape; -100 where nothing is predicted.

Arrays, tensors and lists of any shape are taken, a batch or a whole text at once. A batch is stored as one row of two
sums; `len(metric)` is the number of batches.

Returns:
    {returns}
"""


class _SumsOfTokens(evaluate.Metric):
    """A metric that is a ratio of sums over tokens, and so keeps one row per batch: a sum and the number of tokens.

    Everything else is `evaluate.Metric`: `add`, `add_batch`, `compute`, `evaluate.combine`, and several processes with
    `num_process`, `process_id`, `experiment_id` and a shared `cache_dir`. One process keeps its rows in memory unless
    `keep_in_memory=False`, and then touches no cache folder.
    """

    _numerator: Callable[[np.ndarray, np.ndarray], float]  # of the values and labels of the tokens that count

    def __init__(
        self, config_name: str | None = None, keep_in_memory: bool | None = None, num_process: int = 1, **kwargs: Any
    ):
        keep_in_memory = num_process == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(config_name, keep_in_memory=keep_in_memory, num_process=num_process, **kwargs)

    def _build_data_dir(self) -> str:
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def add(self, **token: Any) -> None:
        """Adds one token, or one sequence: [`add_batch`] with singular names."""
        plural = {"prediction": "predictions", "reference": "references", "loss": "losses"}
        self.add_batch(**{plural.get(name, name): [value] for name, value in token.items()})

    def add_batch(self, **batch: Any) -> None:
        """Adds the tokens of a batch.

        Raises:
            ValueError: if an input is missing or unknown, or the shapes differ.
        """
        wanted = self._feature_names()
        given = {name: values for name, values in batch.items() if values is not None}
        if set(given) != set(wanted):
            raise ValueError(f"`{self.name}` takes the inputs {wanted}, got {sorted(given)}")
        arrays = {name: _array(values) for name, values in given.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"the inputs of `{self.name}` must have one shape, got {shapes}")
        known = arrays.pop("references")
        (values,) = arrays.values()
        counted = known != IGNORED_LABEL
        total = self._numerator(values[counted], known[counted])
        row = dict(zip(wanted, (total, float(np.count_nonzero(counted)))))
        super().add_batch(**{name: [value] for name, value in row.items()})

    def compute(self, **inputs: Any) -> dict[str, float] | None:
        """The metric of all tokens added since the last call, and of `inputs`; None on processes after the first.

        Raises:
            ValueError: if nothing was added.
        """
        if not len(self) and all(inputs.get(name) is None for name in self._feature_names()):
            raise ValueError(f"`{self.name}` has nothing to compute: give it tokens with `add_batch` first")
        ours = {name: values for name, values in inputs.items() if name in self._feature_names()}
        return super().compute(**ours)


def _array(values: Any) -> np.ndarray:
    if not torch.is_tensor(values):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16


def _mean(totals: Any, counts: Any) -> float:
    """Sum over sum; NaN if no token counted."""
    number = float(np.sum(counts))
    return float(np.sum(totals)) / number if number else math.nan


def _number_right(predictions: np.ndarray, references: np.ndarray) -> float:
    return float(np.count_nonzero(predictions == references))


def _total_loss(losses: np.ndarray, references: np.ndarray) -> float:
    return float(losses.sum(dtype=np.float64))


class NextTokenAccuracy(_SumsOfTokens):
    """Share of the predicted tokens whose most probable token is the true one.

    `compute(predictions=..., references=...)` gives `{"accuracy": share}`; labels of -100 do not count.
    """

    _numerator = staticmethod(_number_right)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of tokens that a language model predicts rightly: the most probable token, given those "
            "before it, is the true one. Micro-averaged over all tokens whose label is not -100.",
            citation="",
            inputs_description=_INPUTS.format(
                inputs="predictions: ids of the most probable tokens, each beside the token that it predicts.",
                returns="accuracy: from 0 to 1; NaN if no token counts.",
            ),
            features=Features({"predictions": Value("float64"), "references": Value("float64")}),
            format="numpy",
        )

    def _compute(self, *, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": _mean(predictions, references)}


class Perplexity(_SumsOfTokens):
    """Exponential of the mean cross-entropy of a predicted token.

    `compute(losses=..., references=...)` gives `{"perplexity": ..., "loss": nats per token}`; labels of -100 do not
    count. Unlike the metric of that name on the Hub it takes losses, not texts and the name of a model.
    """

    _numerator = staticmethod(_total_loss)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exponential of the mean cross-entropy, in nats, of the tokens of a text given those before "
            "them. Micro-averaged over all tokens whose label is not -100. Comparable only between models that share "
            "a tokenizer and read the text in the same windows.",
            citation="@article{jelinek1977perplexity, title={Perplexity: a measure of the difficulty of speech "
            "recognition tasks}, author={Jelinek, Fred and Mercer, Robert L and Bahl, Lalit R and Baker, James K}, "
            "journal={The Journal of the Acoustical Society of America}, volume={62}, number={S1}, year={1977}}",
            inputs_description=_INPUTS.format(
                inputs="losses: cross-entropy of each token in nats; whatever stands where the label is -100.",
                returns="perplexity: infinite above the largest float. loss: nats per token. NaN if no token counts.",
            ),
            features=Features({"losses": Value("float64"), "references": Value("float64")}),
            format="numpy",
            reference_urls=["https://huggingface.co/docs/transformers/perplexity"],
        )

    def _compute(self, *, losses: np.ndarray, references: np.ndarray) -> dict[str, float]:
        loss = _mean(losses, references)
        return {"perplexity": math.inf if loss > math.log(np.finfo(np.float64).max) else math.exp(loss), "loss": loss}


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
