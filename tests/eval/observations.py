"""Random observations with padding, and the literal form of their routes."""

import torch
from torch import Tensor

from hmoe.eval.observe import Observation
from hmoe.routers import Architecture
from hmoe.routing_hmoe import route_top_k, route_top_p


VOCABULARY = 20
SIZES = [[8, 32, 16, 24], [40, 8, 16]]
ARCHITECTURE = Architecture(SIZES, [[10 * size for size in row] for row in SIZES], parameters=5000)


def random_observation(routing: str, rows: int = 3, length: int = 12, seed: int = 0) -> Observation:
    """Left and right padding; layers of four and three experts; Top-2, or Top-P with 0.6."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[0, :4] = False
    mask[-1, -3:] = False
    loss = torch.rand(rows, length, generator=generator) * 14
    predictions = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed + 1))
    known = mask.clone()
    known[:, 0] = False
    known[:, 1:] &= mask[:, :-1]
    logits, index = [], []
    for sizes in SIZES:
        scores = 1.5 * torch.randn(rows * length, len(sizes), generator=generator)
        probability = scores.softmax(-1)
        logits.append(scores)
        index.append((route_top_k(probability, 2) if routing == "top_k" else route_top_p(probability, 0.6))[1])
    return Observation(ids, mask, predictions, loss.masked_fill(~known, torch.nan), logits, index)


def tokens_of(observation: Observation) -> list[int]:
    """Places of the tokens that are no padding."""
    return [place for place, real in enumerate(observation.mask.flatten().tolist()) if real]


def chosen_experts(index: Tensor, place: int, num_experts: int) -> list[int]:
    return [expert for expert in index[place].tolist() if expert < num_experts]
