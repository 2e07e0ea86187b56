"""Peak memory and time of converting a random Mixtral that is several times larger than the memory it may use.

    python benchmarks/conversion.py
    python benchmarks/conversion.py --layers 96 --output results.json

Writes the source checkpoint tensor by tensor, converts it to HMoE, to other expert sizes and back to Mixtral, each in
a process of its own, and prints the peak resident memory of each beside that of a process that only imports what a
conversion needs. Exits with 1 if a conversion needs more than a quarter of the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import MixtralConfig

from hmoe.conversion.checkpoint import write_checkpoint


# ru_maxrss of a child starts from its parent's memory, so the peak is read from the kernel's own count.
MEASURED = """
import re, sys
import hmoe.conversion.moe, hmoe.conversion.resize, hmoe.conversion.export
from hmoe.conversion.command import main
status = main(sys.argv[1:]) if sys.argv[1:] else 0
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print("PEAK", peak * 1024)
sys.exit(status)
"""
SIZES = [896, 1152, 1408, 1664, 1920, 2176, 2432, 2688]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where to work (about 4 times the model's size is needed)")
    parser.add_argument("--output", type=Path, help="write the results here as JSON too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        results = measure(Path(work), args.layers, args.hidden)
    print(
        f"model {results['model_bytes'] / 1e6:,.0f} MB, largest tensor {results['largest_tensor_bytes'] / 1e6:,.0f} MB"
    )
    print(f"process that converts nothing: {results['baseline_bytes'] / 1e6:,.0f} MB")
    print("| conversion | peak memory MB | above the idle process MB | share of the model | MB/s | s |")
    print("|---|---|---|---|---|---|")
    for name, row in results["conversions"].items():
        print(
            f"| {name} | {row['peak_bytes'] / 1e6:,.0f} | {row['above_idle'] / 1e6:,.0f} | {row['share']:.3f} | "
            f"{results['model_bytes'] / 1e6 / row['seconds']:,.0f} | {row['seconds']:.1f} |"
        )
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return int(any(row["share"] > 0.25 for row in results["conversions"].values()))


def measure(work: Path, layers: int, hidden: int) -> dict:
    model_bytes, largest = write_mixtral(work / "mixtral", layers, hidden)
    baseline, _ = run([])
    sizes = json.dumps(SIZES)
    steps = {
        "moe": ["moe", work / "mixtral", work / "hmoe"],
        "resize": ["resize", work / "hmoe", work / "resized", "--sizes", sizes],
        "export": ["export", work / "resized", work / "again"],
    }
    conversions = {}
    for name, arguments in steps.items():
        peak, seconds = run([*map(str, arguments), "--no_check"])
        above = peak - baseline
        conversions[name] = {
            "peak_bytes": peak,
            "above_idle": above,
            "share": above / model_bytes,
            "seconds": seconds,
        }
    return {
        "model_bytes": model_bytes,
        "largest_tensor_bytes": largest,
        "baseline_bytes": baseline,
        "conversions": conversions,
    }


def run(arguments: list[str]) -> tuple[int, float]:
    """Peak resident memory in bytes and seconds of one conversion in a fresh process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split("PEAK")[-1]), time.perf_counter() - start


def write_mixtral(folder: Path, layers: int, hidden: int) -> tuple[int, int]:
    """A random bf16 Mixtral of 8 experts; returns its bytes and those of the largest HMoE tensor made from it."""
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=sum(SIZES) // len(SIZES),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        num_local_experts=len(SIZES),
        dtype=torch.bfloat16,
    )
    config.architectures = ["MixtralForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    width = config.intermediate_size
    shapes = {
        "model.embed_tokens.weight": (32000, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (32000, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (len(SIZES), hidden)
        for expert in range(len(SIZES)):
            experts = f"{prefix}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{experts}.w1.weight": (width, hidden), f"{experts}.w3.weight": (width, hidden)}
            shapes[f"{experts}.w2.weight"] = (hidden, width)
    tensors = ((name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)) for name, shape in shapes.items())
    return write_checkpoint(folder, tensors, progress=False), 2 * sum(SIZES) * hidden * 2


if __name__ == "__main__":
    sys.exit(main())
