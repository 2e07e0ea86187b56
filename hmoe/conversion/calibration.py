"""What the layers of a model see on calibration text, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from ..sources import read_beginning
from .check import encode
from .checkpoint import SourceCheckpoint


SEQUENCE_LENGTH = 256

# on_layer(layer index, the FFN or MoE block with its weights, its input [T, H])
OnLayer = Callable[[int, Any, Tensor], None]


def calibration_tokens(source: Path, text_file: str, num_tokens: int) -> Tensor:
    """Token ids [B, S] of the beginning of `text_file`.

    Raises:
        ValueError: no tokenizer, or too little text.
    """
    tokens = encode(source, read_beginning(text_file, 16 * num_tokens))
    if tokens is None:
        raise ValueError(f"{source} holds no tokenizer, so {text_file} cannot be used for calibration")
    length = min(SEQUENCE_LENGTH, num_tokens)
    rows = min(num_tokens, len(tokens)) // length
    if not rows:
        raise ValueError(
            f"{text_file} has {len(tokens)} tokens, calibration needs at least {length}: give a longer text"
        )
    return tokens[: rows * length].view(rows, length)


@torch.no_grad()
def run_layers(source: SourceCheckpoint, tokens: Tensor, on_layer: OnLayer) -> None:
    """Runs the decoder in fp32 on `tokens` [B, S] and calls `on_layer` for each layer; a layer's weights are loaded
    when it runs and dropped after."""
    with torch.device("meta"):
        model = AutoModel.from_config(source.config, dtype=torch.float32).eval()
    model.rotary_emb = type(model.rotary_emb)(source.config)
    model.norm = nn.Identity()
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(partial(_load, source, f"model.layers.{index}."))
        layer.register_forward_hook(_unload)
        layer.mlp.register_forward_hook(partial(_report, on_layer, index))
    embedding = source.tensor("model.embed_tokens.weight")
    hidden_states = F.embedding(tokens, embedding).float()
    del embedding
    model(inputs_embeds=hidden_states, use_cache=False)


def _load(source: SourceCheckpoint, prefix: str, layer: nn.Module, inputs: tuple) -> None:
    state = {name: source.tensor(prefix + name).float() for name in layer.state_dict()}
    layer.load_state_dict(state, assign=True)


def _unload(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
    layer.to("meta")


def _report(on_layer: OnLayer, index: int, mlp: nn.Module, inputs: tuple, output: Tensor) -> None:
    on_layer(index, mlp, inputs[0].flatten(0, -2))
