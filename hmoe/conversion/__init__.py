"""Checkpoints into HMoE, out of it, and to other expert sizes: `hmoe convert` as functions.

| function | from | to |
|---|---|---|
| [`convert_moe`] | Mixtral, Qwen3-MoE, OLMoE | HMoE, exact |
| [`convert_dense`] | Llama, Mistral, Qwen2, Qwen3 | HMoE, by splitting or copying the FFN |
| [`convert_resize`] | HMoE | HMoE with other expert sizes |
| [`convert_export`] | HMoE with Top-K | Mixtral or Qwen3-MoE, exact |
| [`convert_place`] | HMoE | HMoE with the experts ordered for expert parallelism, exact |
"""

from .base import Conversion, Options
from .check import CheckFailed
from .dense import DenseSettings, convert_dense
from .export import convert_export
from .families import CannotConvert
from .moe import convert_moe
from .place import convert_place
from .resize import ResizeSettings, convert_resize


__all__ = [
    "CannotConvert",
    "CheckFailed",
    "Conversion",
    "DenseSettings",
    "Options",
    "ResizeSettings",
    "convert_dense",
    "convert_export",
    "convert_moe",
    "convert_place",
    "convert_resize",
]
