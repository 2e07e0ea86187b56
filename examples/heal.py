"""Perplexity of a causal language model on held-out text, before and after a short training on text of the same kind.

    python examples/heal.py smollm2-hmoe                            # evaluate only
    python examples/heal.py smollm2-hmoe --steps 60                 # train all weights
    python examples/heal.py smollm2-hmoe --steps 60 --lora_rank 16  # train adapters on attention, experts and router

Takes any causal LM, so that a converted model can be compared with what it was made from. The last tenth of the text
is held out; calibration text for a conversion should come from the beginning.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hmoe


TEXT = Path(__file__).parent / "data" / "state_of_the_union.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--eval_tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens of context")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--lora_rank", type=int, help="train LoRA adapters of this rank; default: all weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder to save the trained model in")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    train, held_out = read_text(tokenizer, args.text, args.length, args.eval_tokens)
    report = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters())}
    report["perplexity_before"] = perplexity(model, held_out)
    report["activated_before"] = activated_share(model, held_out)
    if args.steps:
        start = time.perf_counter()
        if args.lora_rank:
            model = add_adapters(model, args.lora_rank)
        report["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report["train_tokens"] = args.steps * args.batch * args.length
        heal(model, train, steps=args.steps, batch=args.batch, lr=args.lr)
        report["train_seconds"] = round(time.perf_counter() - start)
        report["perplexity_after"] = perplexity(model, held_out)
        report["activated_after"] = activated_share(model, held_out)
        if args.output:
            model = model.merge_and_unload() if args.lora_rank else model
            model.save_pretrained(args.output)
            tokenizer.save_pretrained(args.output)
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in report.items()}))


def read_text(tokenizer, path: Path, length: int, eval_tokens: int) -> tuple[Tensor, Tensor]:
    """Windows [n, length] for training and for evaluation."""
    text = path.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    windows = []
    for part in (text[:cut], text[cut:]):
        tokens = torch.tensor(tokenizer(part)["input_ids"])
        windows.append(tokens[: len(tokens) // length * length].view(-1, length))
    return windows[0], windows[1][: eval_tokens // length]


@torch.no_grad()
def perplexity(model, windows: Tensor) -> float:
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss for batch in windows.split(4)]
    sizes = torch.tensor([len(batch) for batch in windows.split(4)], dtype=torch.float)
    return float(((torch.stack(losses) * sizes).sum() / sizes.sum()).exp())


@torch.no_grad()
def activated_share(model, windows: Tensor) -> float:
    """Of the expert parameters, the share that a token activates; 1 for a dense model."""
    if model.config.model_type != "hmoe":
        return 1.0
    outputs = model(input_ids=windows[:4], output_router_logits=True)
    used, total = 0.0, 0.0
    for index, sizes in zip(outputs.router_index, model.config.layer_expert_sizes):
        used += float(torch.tensor([*sizes, 0], dtype=torch.float)[index].sum(dim=-1).mean())
        total += sum(sizes)
    return used / total


def add_adapters(model, rank: int):
    from peft import LoraConfig, get_peft_model

    if model.config.model_type == "hmoe":
        config = hmoe.lora_config(rank, router=True, lora_alpha=2 * rank)
    else:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def heal(model, windows: Tensor, *, steps: int, batch: int, lr: float) -> None:
    """AdamW without weight decay; the rate rises over a tenth of the steps and falls linearly to a tenth."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(steps // 10, 1)
    order = torch.randperm(len(windows))
    for step in range(steps):
        rate = min((step + 1) / warmup, 1.0) * (1 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        picks = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        tokens = windows[picks]
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
