"""What expert placement and parallelism do on clusters of 2 to 1,024 ranks: arithmetic, no GPU.

    hmoe train --config recipes/cpu/hmoe.yaml --max_steps 300 --logging_steps 1 --output_dir runs/load/hmoe
    hmoe train --config recipes/cpu/modse.yaml --max_steps 300 --logging_steps 1 --output_dir runs/load/modse
    python benchmarks/clusters.py placement --hmoe runs/load/hmoe/metrics.jsonl --modse runs/load/modse/metrics.jsonl
    python benchmarks/clusters.py volume

`placement` simulates the balance of parameters and work, with the routing of trained models (each line of the metrics
is one batch) and with worst cases; `--plot FILE.png` draws it. `volume` models the bytes a GPU sends per step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hmoe import HMoEConfig, count_parameters, expert_sizes
from hmoe.placement import METHODS, Balance, place_layers, simulate


CLUSTERS = (2, 4, 8, 16, 64, 256, 1024)
PRESETS = {"hmoe": "hmoe-3b", "modse": "modse-700m-x8"}
GROUP = 4  # whole pairs of 8 experts: four ranks hold them once
WIDE_LAYERS = 4
Loads = list[list[list[float]]]  # batches, layers, experts


def read_batches(path: Path, num_batches: int = 64) -> Loads:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    batches = [line["load"] for line in lines if "load" in line][-num_batches:]
    if not batches:
        raise SystemExit(f"{path} holds no `load`: train with `router_metrics` 'brief'")
    return batches


def sort_by_size(sizes: list[int], batches: Loads) -> tuple[list[int], Loads]:
    """MoDSE's lists hold pairs side by side, so that even the order as given would be a placement by pairs."""
    order = sorted(range(len(sizes)), key=lambda expert: sizes[expert])
    return [sizes[i] for i in order], [[[load[i] for i in order] for load in batch] for batch in batches]


def stretch_layers(batches: Loads, num_layers: int) -> Loads:
    """A deep model's layers take the loads of a shallow one's in turn."""
    return [[batch[layer % len(batch)] for layer in range(num_layers)] for batch in batches]


def stretch_experts(load: Sequence[float], sizes: Sequence[int], wide: Sequence[int]) -> list[float]:
    """The load of many experts from that of few: by position in size, interpolated, with the same sum."""
    by_size = [load[expert] for expert in sorted(range(len(sizes)), key=lambda expert: sizes[expert])]
    ranks = sorted(range(len(wide)), key=lambda expert: wide[expert])
    stretched = [0.0] * len(wide)
    for rank, expert in enumerate(ranks):
        position = rank * (len(sizes) - 1) / max(len(wide) - 1, 1)
        left = min(int(position), len(sizes) - 2)
        stretched[expert] = by_size[left] + (by_size[left + 1] - by_size[left]) * (position - left)
    scale = sum(load) / sum(stretched)
    return [share * scale for share in stretched]


def mean_load(batches: Loads) -> list[list[float]]:
    return [[sum(shares) / len(batches) for shares in zip(*layers)] for layers in zip(*batches)]


def worst_loads(sizes: Sequence[int]) -> dict[str, list[float]]:
    """All tokens on the two largest, or the two smallest experts."""
    by_size = sorted(range(len(sizes)), key=lambda expert: sizes[expert])
    return {
        "largest two": [1.0 if expert in by_size[-2:] else 0.0 for expert in range(len(sizes))],
        "smallest two": [1.0 if expert in by_size[:2] else 0.0 for expert in range(len(sizes))],
    }


def simulate_groups(layer_sizes: list[list[int]], batches: Loads, num_ranks: int) -> dict[str, Balance]:
    """Groups of up to four ranks that hold all experts; each group has batches of its own."""
    group = min(num_ranks, GROUP)
    measured = mean_load(batches)
    answers = {}
    for method in METHODS:
        answers[method] = simulate(layer_sizes, place_layers(layer_sizes, group, method), batches, num_ranks)
    for method in ("pairs", "balanced"):
        placements = place_layers(layer_sizes, group, method, load=measured)
        answers[f"{method}, measured load"] = simulate(layer_sizes, placements, batches, num_ranks)
    return answers


def simulate_wide(sizes: list[int], batches: Loads, num_ranks: int, pairs: bool) -> dict[str, Balance]:
    """One group of all ranks, two experts each: sizes of the same shape, loads stretched to them."""
    count = 2 * num_ranks
    wide = sorted(expert_sizes("pairs" if pairs else "arithmetic", count, total=count * 2048, multiple_of=2))
    loads = [[stretch_experts(layer, sizes, wide) for layer in batches[-1]][:WIDE_LAYERS]]
    layer_sizes = [wide] * len(loads[0])
    return {
        method: simulate(layer_sizes, place_layers(layer_sizes, num_ranks, method), loads, num_ranks)
        for method in METHODS
    }


def print_placement(options: argparse.Namespace) -> None:
    curves = {}
    for family, preset in PRESETS.items():
        config = HMoEConfig.from_preset(preset)
        sizes, measured = sort_by_size(config.layer_expert_sizes[0], read_batches(getattr(options, family)))
        layer_sizes = [sizes] * config.num_hidden_layers
        batches = stretch_layers(measured, len(layer_sizes))
        kinds = {"equal": [[[0.25] * 8] * len(layer_sizes)], "measured": batches}
        kinds |= {name: [[load] * len(layer_sizes)] for name, load in worst_loads(layer_sizes[0]).items()}
        print(f"\n{preset}: 8 experts, groups of {GROUP} ranks (2 on 2), work by layer / over layers, max / mean\n")
        print(f"| load | ranks | {' | '.join(simulate_groups(layer_sizes, batches, 2))} |")
        for kind, loads in kinds.items():
            for num_ranks in CLUSTERS if kind == "measured" else (2, 4):
                row = simulate_groups(layer_sizes, loads, num_ranks)
                curves[family, "groups", kind, num_ranks] = row
                cells = [f"{balance.per_layer:.2f} / {balance.over_layers:.2f}" for balance in row.values()]
                print(f"| {kind} | {num_ranks:,} | {' | '.join(cells)} |")
        row = simulate_groups(layer_sizes, batches, GROUP)
        print(f"| parameters | {GROUP} | {' | '.join(f'{balance.parameters:.3f}' for balance in row.values())} |")
        print(f"\n{preset}: two experts per rank, one group, measured load stretched to them\n")
        print(f"| ranks | {' | '.join(METHODS)} | and parameters")
        for num_ranks in CLUSTERS:
            row = simulate_wide(layer_sizes[0], measured, num_ranks, pairs=family == "modse")
            curves[family, "wide", "measured", num_ranks] = row
            cells = [f"{b.per_layer:.2f} / {b.over_layers:.2f} ({b.parameters:.3f})" for b in row.values()]
            print(f"| {num_ranks:,} | {' | '.join(cells)} |")
    if options.plot:
        draw(curves, options.plot)


def draw(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4.2), sharey=True)
    titles = {"groups": "8 experts, groups of 4 ranks", "wide": "2 experts per rank"}
    styles = {
        "contiguous": ("#777777", "^--", 5),
        "round_robin": ("#b2182b", "v:", 5),
        "balanced": ("#e08214", "s-", 8),
        "pairs": ("#1b6ca8", "o-", 4),
    }
    panels = [(family, layout) for family in PRESETS for layout in titles]
    for axis, (family, layout) in zip(axes, panels):
        for method, (color, style, size) in styles.items():
            balances = [curves[family, layout, "measured", num_ranks][method] for num_ranks in CLUSTERS]
            label = f"{method.replace('_', ' ')} (parameters {balances[-1].parameters:.2f})"
            work = [balance.per_layer for balance in balances]
            axis.plot(CLUSTERS, work, style, color=color, label=label, markersize=size)
        axis.set_xscale("log", base=2)
        axis.set_xticks(CLUSTERS, [f"{num_ranks:,}" for num_ranks in CLUSTERS])
        axis.set_xlabel("ranks")
        axis.set_title(f"{PRESETS[family]}: {titles[layout]}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    axes[0].set_ylabel("work of the slowest rank / mean, by layer")
    axes[0].set_ylim(0.95, 2.95)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Assumptions:
    """Of the model of communication volume.

    Attributes:
        tokens: per GPU and step.
        gathered, reduced, activation: bytes per parameter gathered, per gradient reduced, per activation sent.
        flops, bandwidth: per second and GPU, as reached, not as printed.
    """

    tokens: int = 8192
    gathered: int = 2
    reduced: int = 4
    activation: int = 2
    flops: float = 0.4 * 312e12
    bandwidth: float = 25e9


def remote_ranks_per_token(ranks: int = GROUP, experts: int = 8) -> float:
    """Other ranks a token of a Top-2 layer goes to: equal load, two experts of a pair on one rank."""
    same_rank = (experts / ranks - 1) / (experts - 1)
    return (2 - same_rank) * (1 - 1 / ranks)


def step_volumes(config: HMoEConfig, num_gpus: int, assume: Assumptions) -> dict[str, float]:
    """Bytes that one GPU sends in one step of training, by layout; ring collectives."""
    counts = count_parameters(config)
    experts = sum(map(sum, counts.experts))
    dense = counts.total - experts
    layers, hidden = config.num_hidden_layers, config.hidden_size
    sharding = 2 * assume.gathered + assume.reduced  # gathered forward and backward, gradients reduced

    def share(ranks: int) -> float:
        return (ranks - 1) / ranks

    row = assume.tokens * hidden * assume.activation
    # There and back, forward and backward, in every layer.
    dispatch = layers * 4 * row * remote_ranks_per_token()
    # Attention and experts, forward and backward; the group shares the tokens of its GPUs.
    tensor = layers * 4 * 2 * share(GROUP) * row * GROUP
    replicas = num_gpus // GROUP
    return {
        "DDP": 2 * share(num_gpus) * assume.reduced * counts.total,
        "FSDP2": share(num_gpus) * sharding * counts.total,
        "EP 4 x FSDP2": share(num_gpus) * sharding * dense + share(replicas) * sharding * experts / GROUP + dispatch,
        "TP 4 x FSDP2": share(replicas) * sharding * counts.total / GROUP + tensor,
    }


def print_volume(options: argparse.Namespace) -> None:
    assume = Assumptions(tokens=options.tokens)
    print(assume)
    for preset in PRESETS.values():
        config = HMoEConfig.from_preset(preset)
        compute = 6 * count_parameters(config).activated * assume.tokens / assume.flops
        print(
            f"\n{preset}: GB sent per GPU and step (seconds at {assume.bandwidth / 1e9:.0f} GB/s); "
            f"computing takes {compute:.2f} s\n"
        )
        print(f"| GPUs | {' | '.join(step_volumes(config, 8, assume))} |")
        for num_gpus in (8, 16, 64, 256, 1024):
            volumes = step_volumes(config, num_gpus, assume).values()
            cells = [f"{volume / 1e9:.1f} ({volume / assume.bandwidth:.2f})" for volume in volumes]
            print(f"| {num_gpus:,} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    placement = commands.add_parser("placement")
    placement.add_argument("--hmoe", type=Path, required=True, help="metrics.jsonl of a run of eight ladder sizes")
    placement.add_argument("--modse", type=Path, required=True, help="metrics.jsonl of a run of eight paired sizes")
    placement.add_argument("--plot", type=Path)
    placement.set_defaults(run=print_placement)
    volume = commands.add_parser("volume")
    volume.add_argument("--tokens", type=int, default=8192, help="per GPU and step")
    volume.set_defaults(run=print_volume)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
