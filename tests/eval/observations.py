"""Random observations with padding, their tables, and the literal form of their routes."""

import torch
from torch import Tensor

from hmoe import HMoEConfig
from hmoe.costs import ModelCosts, model_costs
from hmoe.eval.observe import Observation
from hmoe.eval.tokens import TokenLosses, TokenRoutes
from hmoe.routing_hmoe import route_top_k, route_top_p


VOCABULARY = 20
SIZES = [[8, 32, 16, 24], [40, 8, 16]]
NEURON = 3 * 4  # parameters: gate, up and down, for each of the hidden size


def costs_of(sizes: list[list[int]]) -> ModelCosts:
    """Of a model with experts of these sizes, per layer."""
    return model_costs(
        HMoEConfig(
            vocab_size=VOCABULARY,
            hidden_size=4,
            num_attention_heads=2,
            num_hidden_layers=len(sizes),
            expert_intermediate_sizes=sizes,
        )
    )


ARCHITECTURE = costs_of(SIZES)


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


def observations(routing: str, number: int = 3):
    return [random_observation(routing, seed=seed) for seed in range(number)]


def filled(routing: str, number: int = 3) -> tuple[TokenLosses, TokenRoutes]:
    losses, routes = TokenLosses(VOCABULARY), TokenRoutes(ARCHITECTURE, VOCABULARY)
    for observation in observations(routing, number):
        losses.update(observation)
        routes.update(observation)
    return losses, routes
