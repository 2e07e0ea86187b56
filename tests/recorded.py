"""What older versions answered, kept in tests/fixtures, and the same questions put to the version at hand.

tests/fixtures/make_checkpoints.py wrote the answers; test_old_checkpoints.py and test_recorded_answers.py compare.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hmoe
from hmoe_cli import main


FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = FIXTURES / "checkpoints"
EXPECTED = FIXTURES / "expected"
RUN = CHECKPOINTS / "run"  # of `hmoe train`, killed after the checkpoint
TRAINED = "run/output/checkpoint-3"

# The Auto class that each checkpoint is opened with.
AUTO_CLASSES = {
    "top_k": "AutoModelForCausalLM",
    "top_p": "AutoModelForCausalLM",
    "modse": "AutoModelForCausalLM",
    "by_layer": "AutoModelForCausalLM",
    "bfloat16": "AutoModelForCausalLM",
    "sharded": "AutoModelForCausalLM",
    "converted": "AutoModelForCausalLM",
    TRAINED: "AutoModelForCausalLM",
    "body": "AutoModel",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
ADAPTERS = ("lora", "lora_without_task")

COMMANDS = {
    "train": ["train", "--preset", "hmoe-0.4b"],
    "convert": ["convert", "export", "source", "target"],
    "evaluate": ["evaluate", "model"],
    "analyze": ["analyze", "model"],
    "describe": ["describe", "model"],
}


def expected_file(name: str) -> Path:
    """The file of a checkpoint's outputs."""
    return EXPECTED / f"{name.split('/')[0]}.safetensors"


def outputs_of(model: torch.nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Every tensor that the model gives for `input_ids` [B, S] in evaluation, and its last hidden states [B, S, H].

    A causal LM's losses in training, router terms included, are there as `training.loss` and so on.
    """
    with torch.no_grad():
        outputs = model.eval()(input_ids=input_ids, output_hidden_states=True, return_dict=True)
        found = {name: value for name, value in outputs.items() if torch.is_tensor(value)}
        found["hidden_states"] = outputs.hidden_states[-1].clone()
        if "lm_loss" in {field.name for field in dataclasses.fields(outputs)}:
            outputs = model.train()(input_ids=input_ids, labels=input_ids)
            losses = {name: value for name, value in outputs.items() if torch.is_tensor(value) and value.dim() == 0}
            found |= {f"training.{name}": value for name, value in losses.items()}
    return {name: value.float().contiguous() for name, value in found.items()}


def described(arguments: str) -> dict[str, Any]:
    """What `hmoe describe ARGUMENTS --json` prints; a model with a slash in its name is a folder of tests/fixtures."""
    name, *options = arguments.split()
    source = str(FIXTURES / name) if "/" in name else name
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["describe", source, *options, "--json"]) == 0
    answer = json.loads(printed.getvalue())
    assert answer.pop("name") == source
    return shortened(answer)


def counted_parameters(preset: str) -> dict[str, Any]:
    counts = hmoe.count_parameters(hmoe.HMoEConfig.from_preset(preset))
    return shortened({**dataclasses.asdict(counts), "activated_ratio": counts.activated_ratio})


def shortened(value: Any) -> Any:
    """Lists of equal items, such as the sizes of every layer, as {"times": 24, "each": ...}."""
    if isinstance(value, dict):
        return {name: shortened(item) for name, item in value.items()}
    if isinstance(value, list) and len(value) > 1 and all(item == value[0] for item in value):
        return {"times": len(value), "each": shortened(value[0])}
    return [shortened(item) for item in value] if isinstance(value, list) else value


class _Parser(BaseException):
    """Carries a command's parser out of the command."""


def command_line_options(command: str) -> dict[str, dict[str, Any]]:
    """Every option of `hmoe COMMAND` by its first flag (or name), with its flags, default and choices.

    Those of the conversions stand as "moe --dtype". Taken from the parser that the command makes.
    """

    def raise_parser(parser: argparse.ArgumentParser, argv: list[str] | None = None, *args: Any, **kwargs: Any) -> Any:
        if [action.dest for action in parser._actions] == ["config"]:
            return argparse.Namespace(config=[]), argv  # what takes the recipes out of a command line
        raise _Parser(parser)

    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", raise_parser):
            main(COMMANDS[command])
    except _Parser as caught:
        return _options_of(caught.args[0])
    raise AssertionError(f"hmoe {command} parses its arguments without argparse")


def _options_of(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    options = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                options |= {f"{name} {flag}": option for flag, option in _options_of(subparser).items()}
        elif not isinstance(action, argparse._HelpAction):
            default = getattr(action.default, "value", action.default)
            option = {
                "flags": list(action.option_strings),
                "default": default if isinstance(default, int | float | list | None) else str(default),
                "choices": action.choices and [getattr(choice, "value", choice) for choice in action.choices],
            }
            options[action.option_strings[0] if action.option_strings else action.dest] = option
    return options


def names_of_logs(output_dir: Path) -> dict[str, list[str]]:
    """The names in the last log of each kind, and in the files with all logs and all results."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"][::-1]
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()[::-1]]
    return {
        "training": sorted(next(entry for entry in history if "loss" in entry)),
        "evaluation": sorted(next(entry for entry in history if "eval_loss" in entry)),
        "end": sorted(next(entry for entry in history if "train_loss" in entry)),
        "metrics.jsonl": sorted(next(line for line in lines if "loss" in line)),
        "all_results.json": sorted(json.loads((output_dir / "all_results.json").read_text())),
    }
