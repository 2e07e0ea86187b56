"""Compares the logits of a converted model with those of its source, on real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..errors import CommandError
from ..modeling_hmoe import HMoEForCausalLM
from ..routers import routed_layers
from ..sources import read_beginning, without_progress_bars


# A. Lincoln, Gettysburg, 19 November 1863.
DEFAULT_TEXT = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived \
in Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, \
testing whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great \
battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those who \
here gave their lives that that nation might live. It is altogether fitting and proper that we should do this."""
NUM_TOKENS = 128
TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class ForcedRouting:
    """For the check only: every token goes to the same experts.

    Attributes:
        experts: per layer.
        weight: gate weight of each.
        what: this routing in words.
    """

    experts: Sequence[Sequence[int]]
    weight: float
    what: str


@dataclass(frozen=True)
class CheckResult:
    """Logits of source and target, both in fp32, on the same tokens.

    Attributes:
        largest_difference, largest_logit: over all positions and entries of the vocabulary.
        divergence: mean KL(source || target) over positions, in nats.
        same_choice: share of positions with the same most probable token.
        exact: whether the logits should be equal.
        forced: in words, the routing that makes them equal, if one was forced.
    """

    num_tokens: int
    text: str
    largest_difference: float
    largest_logit: float
    divergence: float
    same_choice: float
    exact: bool
    forced: str | None

    @property
    def passed(self) -> bool:
        return not self.exact or self.largest_difference <= TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        kind = "identity check" if self.exact else "comparison"
        routing = f", {self.forced}" if self.forced else ""
        return (
            f"{kind} on {self.num_tokens} tokens of {self.text}{routing}: largest logit difference "
            f"{self.largest_difference:.2e} (largest logit {self.largest_logit:.1f}), "
            f"KL {self.divergence:.2e} nats, same first choice at {100 * self.same_choice:.1f} % of positions"
        )


class CheckFailed(CommandError):
    """A conversion that should be exact changed the logits."""


def compare_logits(
    source: Path,
    target: Path,
    config: PreTrainedConfig,
    text_file: str | None,
    *,
    exact: bool,
    forced: ForcedRouting | None,
) -> CheckResult:
    """Runs the models in two folders, one after the other, on the same tokens.

    Args:
        config: of the target, whose folder may lack config.json.
        text_file: what to run on; default: a speech, or random ids without a tokenizer.
    """
    tokens, text = _check_tokens(source, config.vocab_size, text_file)
    source_logits = _logits(source, tokens)
    target_logits = _logits(target, tokens, config, forced)
    logs, target_logs = source_logits.double().log_softmax(-1), target_logits.double().log_softmax(-1)
    return CheckResult(
        num_tokens=tokens.numel(),
        text=text,
        largest_difference=float((source_logits - target_logits).abs().max()),
        largest_logit=float(source_logits.abs().max()),
        divergence=float((logs.exp() * (logs - target_logs)).sum(-1).mean()),
        same_choice=float((source_logits.argmax(-1) == target_logits.argmax(-1)).float().mean()),
        exact=exact or forced is not None,
        forced=forced.what if forced is not None else None,
    )


@torch.no_grad()
def _logits(
    folder: Path, tokens: Tensor, config: PreTrainedConfig | None = None, forced: ForcedRouting | None = None
) -> Tensor:
    """Logits [S, V] in fp32 on CPU; the model is freed afterwards."""
    with without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    if forced is not None:
        force_routing(model, forced)
    return model(input_ids=tokens.unsqueeze(0)).logits[0]


def force_routing(model: HMoEForCausalLM, forced: ForcedRouting) -> None:
    """Replaces what the routers choose; for checks and tests."""
    for layer, experts in zip(routed_layers(model), forced.experts, strict=True):

        def hook(module, inputs, output, experts=experts):
            logits = output[0]
            index = torch.tensor(experts).expand(logits.shape[0], -1)
            return logits, torch.full(index.shape, forced.weight), index

        layer.router.register_forward_hook(hook)


def _check_tokens(source: Path, vocab_size: int, text_file: str | None) -> tuple[Tensor, str]:
    """Token ids [S] for the check, and what they are: of `text_file`, of a speech, or random without a tokenizer."""
    text = DEFAULT_TEXT if text_file is None else read_beginning(text_file, 64 * NUM_TOKENS)
    try:
        tokens = encode(source, text)
    except (ImportError, OSError, ValueError):
        if text_file is not None:
            raise
        tokens = None  # a tokenizer that needs what is not installed must not stop a conversion
    if tokens is not None and tokens.numel() >= 2 and int(tokens.max()) < vocab_size:
        return tokens[:NUM_TOKENS], "the Gettysburg Address" if text_file is None else Path(text_file).name
    if text_file is not None:
        raise ValueError(f"{text_file} cannot be read as tokens: {source} holds no tokenizer that fits the model")
    return torch.randint(vocab_size, (64,), generator=torch.Generator().manual_seed(0)), "random ids"


def encode(source: Path, text: str) -> Tensor | None:
    """Token ids [S] of `text` by the checkpoint's tokenizer; None if it has none."""
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return torch.tensor(AutoTokenizer.from_pretrained(source)(text)["input_ids"], dtype=torch.long)


def fits_in_memory(num_parameters: float) -> bool:
    """Whether one fp32 copy fits into the memory that is free now."""
    return 4.5 * num_parameters < psutil.virtual_memory().available
