"""Checkpoints into HMoE, out of it, and to other expert sizes: `hmoe convert` as functions.

| function | from | to |
|---|---|---|
| [`convert_moe`] | Mixtral, Qwen3-MoE, OLMoE | HMoE, exact |
| [`convert_dense`] | Llama, Mistral, Qwen2, Qwen3 | HMoE, by splitting or copying the FFN |
| [`convert_resize`] | HMoE | HMoE with other expert sizes |
| [`convert_export`] | HMoE with Top-K | Mixtral or Qwen3-MoE, exact |
| [`convert_place`] | HMoE | HMoE with the experts ordered for expert parallelism, exact |
"""

from __future__ import annotations

import importlib
from typing import Any


_MODULE_OF = {
    "CannotConvert": "families",
    "CheckFailed": "check",
    "Conversion": "base",
    "DenseSettings": "dense",
    "Options": "base",
    "ResizeSettings": "resize",
    "convert_dense": "dense",
    "convert_export": "export",
    "convert_moe": "moe",
    "convert_place": "place",
    "convert_resize": "resize",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    # The command line prints its help without waiting for torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
