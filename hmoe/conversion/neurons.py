"""Which neurons matter, and which go to which expert.

Shapes: I neurons of an FFN, T calibration tokens, H hidden size, E experts. `gate`, `up` and `down` are [I, H], a row
per neuron.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


CLUSTER_FEATURES = 128


def layer_generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 100_003 + layer)


def weight_importance(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[I]: product of the norms of a neuron's three weight rows."""
    return gate.float().norm(dim=1) * up.float().norm(dim=1) * down.float().norm(dim=1)


def contributions(neurons: Tensor, down: Tensor) -> Tensor:
    """[T, I]: norm of what each neuron adds to the output of each token. `neurons` [T, I] are the activations."""
    return neurons.float().abs() * down.float().norm(dim=1)


def top_neurons(importance: Tensor, size: int) -> Tensor:
    """Ids of the `size` most important neurons, in their original order."""
    return importance.topk(size).indices.sort().values


def deal_neurons(importance: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Neurons dealt by falling importance, so that every expert has a like share of strong and weak ones.

    The next neuron goes to the expert that is furthest behind its share. Each neuron is used once.
    """
    order = importance.argsort(descending=True, stable=True)
    # Expert e takes its j-th neuron at position (j + 1/2) / I_e of the deal.
    turns = [((j + 0.5) / size, expert) for expert, size in enumerate(sizes) for j in range(size)]
    owner = torch.tensor([expert for _, expert in sorted(turns)])
    return _by_owner(order, owner, len(sizes))


def shuffle_neurons(num_neurons: int, sizes: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """A random partition; each neuron is used once."""
    order = torch.randperm(num_neurons, generator=generator)
    return [part.sort().values for part in order.split(list(sizes))]


def cluster_neurons(neurons: Tensor, sizes: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Neurons that are active for the same tokens go to the same expert; each neuron is used once.

    The rows of a neuron's activations over the tokens, of unit length and projected at random to 128 dimensions, are
    clustered by k-means (scikit-learn). Clusters have other sizes than experts: the larger cluster stands for the
    larger expert, and neurons take the nearest centre that has room, those first that have most to lose.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("`neurons`='coactivation' needs scikit-learn: pip install scikit-learn") from error

    patterns = neurons.float().abs().t()  # [I, T]
    patterns = patterns / patterns.norm(dim=1, keepdim=True).clamp_min(1e-12)
    num_features = min(CLUSTER_FEATURES, patterns.shape[1])
    projection = torch.randn(patterns.shape[1], num_features, generator=generator) / num_features**0.5
    features = (patterns @ projection).numpy()  # [I, F]
    seed = int(torch.randint(2**31, (1,), generator=generator))
    means = KMeans(n_clusters=len(sizes), n_init=2, random_state=seed).fit(features)
    by_population = torch.bincount(torch.from_numpy(means.labels_).long(), minlength=len(sizes)).argsort(stable=True)
    by_size = sorted(range(len(sizes)), key=lambda expert: sizes[expert])
    distance = torch.empty(len(features), len(sizes))
    distance[:, by_size] = torch.from_numpy(means.transform(features)).float()[:, by_population]
    return assign_with_capacity(distance, sizes)


def assign_with_capacity(distance: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Partition of neurons by `distance` [I, E] to experts with room for `sizes`, greedily.

    The neuron that would lose most by its second choice is placed first.
    """
    if len(sizes) == 1:
        return [torch.arange(len(distance))]
    nearest = distance.topk(2, dim=1, largest=False).values
    order = (nearest[:, 1] - nearest[:, 0]).argsort(descending=True, stable=True)
    preferences = distance.argsort(dim=1, stable=True).tolist()
    room = list(sizes)
    owner = torch.empty(len(distance), dtype=torch.long)
    for neuron in order.tolist():
        expert = next(expert for expert in preferences[neuron] if room[expert])
        room[expert] -= 1
        owner[neuron] = expert
    return _by_owner(torch.arange(len(distance)), owner, len(sizes))


def _by_owner(neurons: Tensor, owner: Tensor, num_experts: int) -> list[Tensor]:
    return [neurons[owner == expert].sort().values for expert in range(num_experts)]


def random_router(norm_weight: Tensor, num_experts: int, logit_std: float, generator: torch.Generator) -> Tensor:
    """[E, H]: random directions whose logits have standard deviation `logit_std`.

    The router reads the output of an RMSNorm with weight `norm_weight` [H]: entries of unit mean square times it.
    """
    scale = logit_std / norm_weight.float().norm().clamp_min(1e-12)
    return scale * torch.randn(num_experts, len(norm_weight), generator=generator)


def fitted_router(
    hidden_states: Tensor,
    neurons: Tensor,
    down: Tensor,
    parts: Sequence[Tensor],
    logit_std: float,
    *,
    balanced: bool = False,
) -> Tensor:
    """[E, H]: ridge regression, on the token, of each expert's share in the FFN's output for it.

    The share of an expert is the norm of its output over the sum of all experts' norms, so that the few tokens with
    huge activations do not decide the fit.

    Args:
        hidden_states: [T, H], inputs of the FFN.
        neurons: [T, I], activations.
        parts: neurons of each expert.
        balanced: fit the deviation from each expert's mean share, so that about equally many tokens choose each.
    """
    neurons, down, hidden_states = neurons.float(), down.float(), hidden_states.float()
    norms = torch.stack([(neurons[:, part] @ down[part]).norm(dim=1) for part in parts], dim=1)  # [T, E]
    share = norms / norms.sum(dim=1, keepdim=True).clamp_min(1e-12)
    share = share - (share.mean(dim=0) if balanced else 1 / len(parts))
    gram = hidden_states.t() @ hidden_states  # [H, H]
    gram.diagonal().add_(0.1 * gram.diagonal().mean())
    router = torch.linalg.solve(gram, hidden_states.t() @ share).t()  # [E, H]
    logits = hidden_states @ router.t()
    return router * (logit_std / logits.std().clamp_min(1e-12))


def default_multiple(total: int, num_experts: int) -> int:
    """The largest power of two, up to 64, that divides `total` and leaves about 8 steps per expert."""
    return max(m for m in (1, 2, 4, 8, 16, 32, 64) if total % m == 0 and (m == 1 or total // m >= 8 * num_experts))
