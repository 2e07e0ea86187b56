"""What FSDP2, tensor and expert parallelism cost against DDP, on processes of this machine.

    python benchmarks/distributed.py                                   # two gloo processes
    python benchmarks/distributed.py --hidden_size 512 --layers 8 --rounds 5

Every layout trains in processes of its own, and the layouts take turns (A B C D, D C B A, ...), so that a machine that
slows down or is shared slows all; times are medians, printed as ratios to DDP of the same round. Memory is the peak of
resident memory of the rank that has the most, from before the model is made. All ranks together see the same tokens.
Also printed: the time of the slowest rank's experts alone with MoDSE's pairs and in the given order.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hmoe import HMoEConfig, expert_sizes
from hmoe.placement import METHODS, place_experts


LAYOUTS: dict[str, dict[str, int] | None] = {
    "DDP": None,
    "FSDP2": {"fsdp_size": 2},
    "TP": {"tp_size": 2},
    "EP on FSDP2": {"fsdp_size": 2, "ep_size": 2},
    "EP on TP": {"tp_size": 2, "ep_size": 2},
}
NUM_RANKS = 2
_SERVER = multiprocessing.get_context("forkserver")


def make_config(options: argparse.Namespace) -> HMoEConfig:
    sizes = expert_sizes("pairs", 8, total=16 * options.hidden_size, multiple_of=16)
    return HMoEConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 32,
        max_position_embeddings=options.length,
        expert_intermediate_sizes=sizes,
        parameter_penalty_loss_coef=0.0,
        load_balancing_loss_coef=0.01,
    )


def measure_layout(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per step and peak memory of the rank that has the most of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers = _SERVER.SimpleQueue()
    ranks = [
        _SERVER.Process(target=_run_rank, args=(rank, port, LAYOUTS[name], folder, options, answers))
        for rank in range(NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"{name}: a rank failed")
    measured = [answers.get() for _ in ranks]
    return {key: max(answer[key] for answer in measured) for key in measured[0]}


def _run_rank(
    rank: int, port: int, layout: dict[str, int] | None, folder: Path, options: argparse.Namespace, answers: Any
) -> None:
    from transformers.distributed import DistributedConfig

    from hmoe import HMoEForCausalLM

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(NUM_RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    before = _start_peak()
    settings = {} if layout is None else {"distributed_config": DistributedConfig(**layout)}
    model = HMoEForCausalLM.from_pretrained(folder, **settings).train()
    runner = torch.nn.parallel.DistributedDataParallel(model) if layout is None else model
    # Parameters on different meshes cannot share a fused kernel.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    shared = layout is not None and "tp_size" in layout
    rows = options.rows if shared else options.rows // NUM_RANKS
    seed = 0 if shared else rank
    generator = torch.Generator().manual_seed(seed)
    seconds = []
    for _ in range(options.steps):
        batch = torch.randint(0, options.vocabulary, (rows, options.length), generator=generator)
        dist.barrier()
        start = time.perf_counter()
        runner(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    answers.put({"seconds": statistics.median(seconds[1:]), "bytes": _peak() - before})
    dist.barrier()
    dist.destroy_process_group()


def _start_peak() -> int:
    """Resets the peak of resident memory (Linux); returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def print_layouts(options: argparse.Namespace) -> None:
    from hmoe import HMoEForCausalLM

    config = make_config(options)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = HMoEForCausalLM(config)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{num_parameters / 1e6:.1f} M parameters, sizes {config.layer_expert_sizes[0]}")
        model.save_pretrained(folder)
        del model
        for number in range(options.rounds):
            names = list(LAYOUTS) if number % 2 == 0 else list(LAYOUTS)[::-1]
            rounds.append({name: measure_layout(name, Path(folder), options) for name in names})
    print("| layout | time / DDP | lowest - highest | peak memory / DDP | MB |")
    for name in LAYOUTS:
        ratios = [measured[name]["seconds"] / measured["DDP"]["seconds"] for measured in rounds]
        memory = statistics.median(measured[name]["bytes"] for measured in rounds)
        of_ddp = statistics.median(measured["DDP"]["bytes"] for measured in rounds)
        print(
            f"| {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} - {max(ratios):.2f} "
            f"| {memory / of_ddp:.2f} | {memory / 1e6:.0f} |"
        )


def print_slowest_rank(options: argparse.Namespace) -> None:
    """Times the experts of each rank alone, forward and backward, with equal load."""
    hidden, tokens = options.hidden_size, 256
    families = {
        "HMoE's ladder": expert_sizes("arithmetic", 8, total=16 * hidden, multiple_of=2),
        "MoDSE's sizes, sorted": sorted(expert_sizes("pairs", 8, total=16 * hidden, multiple_of=16)),
    }
    print("| sizes | ranks | placement | slowest rank / mean: parameters | time |")
    for family, sizes in families.items():
        for num_ranks in (2, 4):
            placements = {method: place_experts(sizes, num_ranks, method) for method in METHODS}
            times: dict[str, list[float]] = {method: [] for method in METHODS}
            for _ in range(options.rounds * 3):
                seconds = [_time_expert(size, hidden, tokens) for size in sizes]
                for method, placement in placements.items():
                    work = placement.totals(seconds)
                    times[method].append(max(work) * num_ranks / sum(work))
            for method, placement in placements.items():
                parameters = placement.totals(sizes)
                print(
                    f"| {family} | {num_ranks} | {method} | {max(parameters) * num_ranks / sum(parameters):.2f} "
                    f"| {statistics.median(times[method]):.2f} |"
                )


def _time_expert(size: int, hidden: int, tokens: int) -> float:
    from hmoe.experts_hmoe import HMoEExperts

    config = HMoEConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_experts_per_tok=1,
        expert_intermediate_sizes=[size],
        expert_tile_size=size,
    )
    config._experts_implementation = "grouped_mm"
    experts = HMoEExperts(config, 0)
    torch.nn.init.normal_(experts.gate_up_proj)
    torch.nn.init.normal_(experts.down_proj)
    rows = torch.randn(tokens, hidden, requires_grad=True)
    index, weights = torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        experts(rows, index, weights).square().sum().backward()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8, help="sequences per step, all ranks together")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    _SERVER.set_forkserver_preload(["hmoe.modeling_hmoe"])
    torch.set_num_threads(1)
    print_slowest_rank(options)
    print()
    print_layouts(options)


if __name__ == "__main__":
    main()
