"""Interleaved timing, memory, and the tables and JSON files of the benchmarks.

Contenders of one comparison take turns: every round runs each of them once, in shuffled order, and a figure is the
median over rounds of the ratio within a round, so that a machine that slows down or is shared slows all of them. The
spread given is that of the quartiles.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm


Row = dict[str, Any]
Samples = dict[str, list[float]]  # seconds by contender, one entry per round

MIN_ROUNDS, SLOW = 3, 5
_SERVER = multiprocessing.get_context("forkserver")


def interleave(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    *,
    max_seconds: float = math.inf,
    min_sample_seconds: float = 0.02,
) -> Samples:
    """Seconds per call of every contender, round by round; one sample repeats a quick call until it is long enough.

    After `max_seconds` the round at hand is the last, but there are `MIN_ROUNDS` (or `rounds`, if fewer) in any case.
    Contenders that take `SLOW` times as long as the median one rest after those, and leave the time to the others.
    """
    repetitions = {name: _repetitions(call, min_sample_seconds) for name, call in contenders.items()}
    samples: Samples = {name: [] for name in contenders}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.perf_counter() - start > max_seconds:
            break
        if number == MIN_ROUNDS:
            medians = {name: statistics.median(values) for name, values in samples.items()}
            limit = SLOW * statistics.median(medians.values())
            contenders = {name: call for name, call in contenders.items() if medians[name] <= limit}
        for name in shuffled(contenders, number):
            samples[name].append(_seconds(contenders[name], repetitions[name]))
    return samples


def shuffled(names: Iterable[str], number: int) -> list[str]:
    """The order of round `number`, the same in every run."""
    order = list(names)
    random.Random(number).shuffle(order)
    return order


def _repetitions(call: Callable[[], object], min_sample_seconds: float) -> int:
    """Warms up too; the second call counts, because the first may compile or allocate."""
    call()
    return max(1, math.ceil(min_sample_seconds / max(_seconds(call, 1), 1e-9)))


def _seconds(call: Callable[[], object], repetitions: int) -> float:
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - start) / repetitions


def ratios(samples: Samples, baseline: str) -> dict[str, dict[str, float]]:
    """Per contender: median, low and high (quartiles) of the ratios to `baseline` within each round that both ran."""
    return {
        name: spread([value / base for value, base in zip(values, samples[baseline])])
        for name, values in samples.items()
    }


def speedups(samples: Samples, baseline: str) -> dict[str, dict[str, float]]:
    """As `ratios`, the other way round: how many times as fast as `baseline` each contender is."""
    return {
        name: spread([base / value for value, base in zip(values, samples[baseline])])
        for name, values in samples.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; low and high are the extremes where there are fewer than four values."""
    if len(values) < 4:
        low, high = min(values), max(values)
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high}


def fastest(samples: Samples, names: Sequence[str]) -> str | None:
    """The one of `names` with the lowest median time; None if none of them ran."""
    ran = [name for name in names if name in samples]
    return min(ran, key=lambda name: statistics.median(samples[name]), default=None)


def saved_bytes(forward: Callable[[], object], parameters: Sequence[Tensor]) -> int:
    """Bytes of the distinct storages that `forward` saves for its backward, those of `parameters` excluded.

    Whole storages count, whatever part of them a saved view shows.
    """
    excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(make: Callable[..., tuple[Callable[[], object], Callable[[], object]]], *arguments: Any) -> int:
    """Growth of resident memory, at its highest, while a callable runs once in a process of its own (Linux).

    `make(*arguments)` returns a small call that loads libraries and starts threads, and the call to measure; what both
    need (weights, inputs) is made before the count begins. `make` is a function of a module.
    """
    return in_own_process(_measure_peak, make, arguments)


def _measure_peak(make: Callable[..., Any], arguments: tuple) -> int:
    warm_up, call = make(*arguments)
    warm_up()
    before = restart_peak()
    kept = call()  # gradients that a step leaves behind belong to its peak
    peak = resident_bytes("VmHWM") - before
    del kept
    return peak


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a module's function, computed in a new process that has little more than imports in memory."""
    _SERVER.set_forkserver_preload(["hmoe.modeling_hmoe"])
    receiver, sender = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_answer, args=(sender, torch.get_num_threads(), function, arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} ended with {process.exitcode} in its own process") from None
    process.join()
    return answer


def _answer(sender: Any, num_threads: int, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(num_threads)
    sender.send(function(*arguments))


def restart_peak() -> int:
    """Starts the peak of resident memory anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def resident_bytes(field: str = "VmHWM") -> int:
    """Resident memory of this process: `VmHWM` its peak, `VmRSS` now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def environment() -> Row:
    """Where figures were measured."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short hash, with `+` if tracked files of the package or the benchmarks differ from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--", "hmoe", "benchmarks")
    return (commit + ("+" if changed else "")) or None


def write_json(path: Path, benchmark: str, options: argparse.Namespace, rows: list[Row], **more: Any) -> None:
    """One file per benchmark: its options, its environment and its rows, a line each."""
    shown = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    content = {"benchmark": benchmark, "options": shown, "environment": environment(), **more, "rows": rows}
    fields = []
    for name, value in _rounded(content).items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in value) + "\n]"
        fields.append(f"{json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Floats with five significant digits: files that are read and compared."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value


def markdown_table(rows: Sequence[Row], columns: dict[str, str | Callable[[Row], str]]) -> str:
    """A Markdown table; `columns` maps a heading to a key of the rows or to a function of a row."""

    def cell(row: Row, column: str | Callable[[Row], str]) -> str:
        value = column(row) if callable(column) else row.get(column)
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row, column) for column in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def show_spread(value: dict[str, float] | None, digits: int = 2) -> str:
    """`median (low-high)`."""
    if value is None:
        return "-"
    median, low, high = (f"{value[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Only errors are logged, without bars for the loading of weights; as a decorator too. Ends as it was found."""
    library = transformers.utils.logging
    hmoe_logger, verbosity, bars = (
        logging.getLogger("hmoe"),
        library.get_verbosity(),
        library.is_progress_bar_enabled(),
    )
    level = hmoe_logger.level
    library.set_verbosity_error()
    library.disable_progress_bar()
    hmoe_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
        hmoe_logger.setLevel(level)


def progress(items: Sequence[Any], description: str) -> tqdm:
    return tqdm(items, desc=description, file=sys.stderr, dynamic_ncols=True)


def make_parser(docstring: str | None, *, rounds: int, seconds: float | None = None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive_int, default=rounds, help="samples of each contender")
    if seconds is not None:
        parser.add_argument(
            "--seconds",
            type=positive_float,
            default=seconds,
            help=f"a comparison that takes longer ends early, after {MIN_ROUNDS} rounds or more",
        )
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return parser


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value
