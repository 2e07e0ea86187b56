"""Runs many checks in one group of processes: starting one costs more than any of the checks.

The processes are forked from a server that has imported everything.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


_SERVER = multiprocessing.get_context("forkserver")
# The server does not look for modules in the folder of the tests.
_SERVER.set_forkserver_preload(["hmoe.modeling_hmoe", "hmoe.training.trainer", "hmoe.training.arguments", "datasets"])

BACKENDS = ("grouped_mm", "eager", "batched_mm")


@dataclass(frozen=True)
class Case:
    """One way to distribute a checkpoint; `parallel` are fields of `DistributedConfig`, None for DDP."""

    checkpoint: str
    parallel: dict[str, Any] | None
    data_parallel: int = 1  # ranks, or groups of tensor-parallel ranks, with a batch of their own
    backends: tuple[str, ...] = BACKENDS
    config: dict[str, Any] = field(default_factory=dict)


def run_ranks(world_size: int, target: Callable[..., Any], *args: Any, timeout: float = 300) -> Any:
    """What `target(rank, *args)` returns on rank 0 of `world_size` processes of one gloo group."""
    port = find_port()
    receiver, sender = _SERVER.Pipe(duplex=False)
    processes = [
        _SERVER.Process(target=_run_rank, args=(rank, world_size, port, sender, target, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(timeout) else None
    except EOFError:
        answer = None
    for process in processes:
        process.join(timeout=60)
        process.kill()  # a rank that waits for one that failed
    assert [process.exitcode for process in processes] == [0] * world_size, "see the output of the ranks"
    return torch.load(answer)


def start_command(num_ranks: int, main: Callable[[list[str]], int], argv: list[str], log: Path) -> list[BaseProcess]:
    """What `torchrun --nproc_per_node NUM_RANKS -m MODULE ARGV` starts; output goes to a file."""
    processes = []
    port = find_port()
    for rank in range(num_ranks):
        process = _SERVER.Process(target=_run_command, args=(rank, num_ranks, port, main, argv, log), daemon=True)
        process.start()
        processes.append(process)
    return processes


def finish(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Exit codes; a rank that is still alive after `timeout` is killed."""
    for process in processes:
        process.join(timeout)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_command(
    rank: int, num_ranks: int, port: int, main: Callable[[list[str]], int], argv: list[str], log: Path
) -> None:
    if num_ranks > 1:
        _set_environment(rank, num_ranks, port)
    torch.set_num_threads(1)
    with open(log.with_suffix(f".{rank}.log"), "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = 1
        try:
            code = main(argv)
            if dist.is_initialized():
                dist.destroy_process_group()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # No destructor may wait for a rank that died.
        os._exit(code)


def _set_environment(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _run_rank(rank: int, world_size: int, port: int, sender: Any, target: Callable[..., Any], args: tuple) -> None:
    _set_environment(rank, world_size, port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        answer = target(rank, *args)
    except BaseException:
        traceback.print_exc()
        # No destructor may wait for the other ranks.
        sys.stderr.flush()
        os._exit(1)
    dist.barrier()
    if rank == 0:
        path = Path(args[0]) / f"answer-{world_size}.pt"
        torch.save(answer, path)
        sender.send(path)
    dist.destroy_process_group()


def run_cases(rank: int, folder: Path, cases: dict[str, Case], batch: torch.Tensor, prompt: torch.Tensor) -> dict:
    """Per case: loss and gradients by backend, bytes sent by rank and layer, tokens by expert, generated tokens; each
    model is saved in a folder of the name of its case."""
    answers = {}
    for name, case in cases.items():
        try:
            answers[name] = _run_case(rank, folder, name, case, batch, prompt)
        except Exception as error:
            raise RuntimeError(f"case {name!r}") from error
    return answers


def _run_case(rank: int, folder: Path, name: str, case: Case, batch: torch.Tensor, prompt: torch.Tensor) -> dict:
    model = load(folder / case.checkpoint, case)
    runner = model
    if case.parallel is None:
        runner = torch.nn.parallel.DistributedDataParallel(model)
    # Tensor-parallel ranks are neighbours and share their batch.
    batch = batch[rank * case.data_parallel // dist.get_world_size() :: case.data_parallel]
    answer: dict[str, Any] = {"loss": {}, "gradients": {}}
    for backend in case.backends:
        model.set_experts_implementation(backend)
        model.zero_grad()
        output = runner(input_ids=batch, labels=batch, output_router_logits=True)
        output.loss.backward()
        answer["loss"][backend] = _gathered(output.loss.detach()).mean().item()
        answer["gradients"][backend] = {key: full(parameter.grad) for key, parameter in model.named_parameters()}
    model.set_experts_implementation(case.backends[0])
    experts = [layer.mlp.experts for layer in model.model.layers]
    answer["bytes_sent"] = _gathered(torch.tensor([getattr(module, "bytes_sent", 0) for module in experts]))
    answer["tokens"] = [
        _gathered(torch.bincount(index.flatten(), minlength=model.config.num_experts + 1)[:-1])
        for index in output.router_index
    ]
    config = getattr(model.config, "distributed_config", None)
    answer["ep_implementation"] = getattr(config, "ep_implementation", None)
    answer["num_experts"] = experts[0].num_experts
    answer["local_tiles"] = experts[0].tile_offsets[-1]
    model.eval()
    answer["generated"] = model.generate(prompt, max_new_tokens=5, do_sample=False)
    model.save_pretrained(folder / name)
    dist.barrier()
    return answer


def load(path: Path, case: Case) -> torch.nn.Module:
    from transformers.distributed import DistributedConfig

    from hmoe import HMoEForCausalLM

    options: dict[str, Any] = dict(case.config)
    if case.parallel is not None:
        options["distributed_config"] = DistributedConfig(**case.parallel)
    return HMoEForCausalLM.from_pretrained(path, **options).train()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)
