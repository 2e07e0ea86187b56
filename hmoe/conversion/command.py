"""The `hmoe convert` command.

    hmoe convert moe mistralai/Mixtral-8x7B-v0.1 mixtral-as-hmoe
    hmoe convert dense HuggingFaceTB/SmolLM2-135M smollm2-hmoe --strategy hybrid --neurons coactivation \
        --router fitted --calibration_text text.txt
    hmoe convert resize mixtral-as-hmoe hmoe-arithmetic --strategy arithmetic --calibration_text text.txt
    hmoe convert export hmoe-arithmetic mixtral-again
    hmoe convert place hmoe-arithmetic placed --num_ranks 4
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

from .. import placement
from ..sizes import SIZE_STRATEGIES
from .base import CAST_DTYPES, Options
from .dense import METHODS, NEURONS, OUTPUT_SCALES, ROUTERS, DenseSettings, convert_dense
from .export import EXPORT_TYPES, convert_export
from .moe import convert_moe
from .place import convert_place, read_load
from .resize import ResizeSettings, convert_resize


def main(argv: list[str]) -> int:
    """Runs `hmoe convert ...`; returns the exit status."""
    args = _parser().parse_args(argv)
    options = Options(
        dtype=args.dtype,
        overwrite=args.overwrite,
        check=not args.no_check,
        check_text=args.check_text,
        command=["convert", *argv],
    )
    if args.conversion == "moe":
        result = convert_moe(args.source, args.target, options)
    elif args.conversion == "dense":
        result = convert_dense(args.source, args.target, _settings(DenseSettings, args), options)
    elif args.conversion == "resize":
        result = convert_resize(args.source, args.target, _settings(ResizeSettings, args), options)
    elif args.conversion == "export":
        result = convert_export(args.source, args.target, to=args.to, options=options)
    else:
        result = convert_place(
            args.source, args.target, args.num_ranks, method=args.method, load=args.load, options=options
        )
        measured = read_load(args.load) if args.load else None
        print(placement.describe_placement(result.config, args.num_ranks, measured))
    print(result)
    return 0


def _settings(settings_class: Any, args: argparse.Namespace) -> Any:
    """The settings object; what was not given keeps its default there."""
    given = {name: value for name, value in vars(args).items() if name in settings_class.__dataclass_fields__}
    return settings_class(**{name: value for name, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hmoe convert",
        description="Convert checkpoints into HMoE, out of it, and to other expert sizes.",
        epilog="The target appears whole or not at all. `hmoe convert CONVERSION --help` shows the options of one.",
    )
    conversions = parser.add_subparsers(dest="conversion", required=True, metavar="{moe,dense,resize,export,place}")
    _add(conversions, "moe", "Mixtral, Qwen3-MoE or OLMoE to HMoE: the same logits")
    dense = "Llama, Mistral, Qwen2 or Qwen3 to HMoE: split the FFN into experts, or copy it"
    _add_dense_options(_add(conversions, "dense", dense))
    resize = _add(conversions, "resize", "HMoE to HMoE with other expert sizes")
    _add_size_options(resize, "strategy's sizes; default: each layer's sum now")
    export = _add(conversions, "export", "HMoE with Top-K to Mixtral or Qwen3-MoE by zero padding: the same logits")
    export.add_argument(
        "--to", choices=["auto", *EXPORT_TYPES], default="auto", help="auto: qwen3_moe if the model has qk_norm"
    )
    place = _add(conversions, "place", "HMoE to HMoE with the experts ordered for expert parallelism: the same logits")
    place.add_argument("--num_ranks", type=int, required=True, help="ranks that hold the experts (ep_size)")
    place.add_argument(
        "--method", choices=placement.METHODS, help="default: pairs where they are whole, else balanced"
    )
    place.add_argument("--load", metavar="FILE", help="metrics.jsonl of a run: balance by the measured load")
    return parser


def _add(conversions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = conversions.add_parser(name, help=text, description=text)
    parser.add_argument(
        "source", metavar="SOURCE", help="a checkpoint's folder, or OWNER/NAME of the Hugging Face Hub"
    )
    parser.add_argument("target", metavar="TARGET", help="the folder to make")
    parser.add_argument("--dtype", choices=list(CAST_DTYPES), help="default: the source's")
    parser.add_argument("--max_shard_gb", action=_Retired, help=argparse.SUPPRESS)
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at TARGET, at the very end")
    parser.add_argument("--no_check", action="store_true", help="do not compare the logits of source and target")
    parser.add_argument("--check_text", metavar="FILE", help="text for the comparison (default: a short speech)")
    return parser


def _add_dense_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, help="default: split")
    parser.add_argument("--num_experts", type=int, help="default: 8")
    parser.add_argument("--num_experts_per_tok", type=int, help="default: 2")
    parser.add_argument(
        "--neurons",
        choices=NEURONS["split"],
        help="what decides where neurons go (default: magnitude); the last two need --calibration_text",
    )
    parser.add_argument("--output_scale", choices=OUTPUT_SCALES, help="scale of a split's output (default: sum)")
    parser.add_argument(
        "--router", choices=ROUTERS, help="the last two: split, with --calibration_text; default: random"
    )
    parser.add_argument(
        "--noise", type=float, help="upcycle: noise on the copies, as a share of the weights' deviation"
    )
    parser.add_argument("--reinit_share", type=float, help="upcycle: share of neurons drawn anew (drop-upcycling)")
    _add_size_options(parser, "strategy's sizes; default: the dense width, or widest expert = dense width (upcycle)")


def _add_size_options(parser: argparse.ArgumentParser, total: str) -> None:
    parser.add_argument("--strategy", choices=list(SIZE_STRATEGIES), help="rule for the sizes")
    parser.add_argument("--total", type=int, help=f"sum of a layer's sizes, for the {total}")
    parser.add_argument("--multiple_of", type=int, help="sizes are multiples of it (default: from the width)")
    parser.add_argument(
        "--sizes", type=_sizes, help="JSON list of sizes, such as [96,160], or a list of such lists, one per layer"
    )
    parser.add_argument("--calibration_text", metavar="FILE", help="text for activation statistics")
    parser.add_argument("--calibration_tokens", type=int, help="tokens of it to use (default 4096)")
    parser.add_argument("--seed", type=int, help="default: 0")


class _Retired(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        parser.error(
            "--max_shard_gb is gone, weights are written in files of about a quarter of a gigabyte: leave it out; "
            "model.save_pretrained(FOLDER, max_shard_size=...) makes files of another size"
        )


def _sizes(text: str) -> Any:
    try:
        sizes = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON list such as [96,160]: {error}") from error
    rows = sizes if isinstance(sizes, list) and sizes and isinstance(sizes[0], list) else [sizes]
    if not all(isinstance(row, list) and row and all(type(size) is int for size in row) for row in rows):
        raise argparse.ArgumentTypeError(f"{text!r} must be a list of whole numbers, or a list of such lists")
    return sizes
