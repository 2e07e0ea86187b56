"""YAML recipes and command-line words into the arguments of a run; the command line wins."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hmoe.errors import did_you_mean

from .arguments import OPTION_TYPES, Arguments, known_fields


SECTIONS = ("model", "tokenizer", "data", "lora", "training")
# Mappings that a recipe may hold; one key of them is set with --NAME.KEY VALUE.
MAPPINGS = ("model_config", "distributed", *sorted(TrainingArguments._VALID_DICT_FIELDS))
USAGE = "hmoe train --config RECIPE.yaml [--field value ...]"
DESCRIPTION = (
    "A field stands in the recipe, at the top or in a section, or on the command line, which wins. Every field of "
    "transformers.TrainingArguments is one too; --help_all lists them."
)


def parse_arguments(argv: list[str]) -> Arguments:
    """Arguments from `--config recipe.yaml --field value ...`; later values win, the command line over the recipe.

    Raises:
        ValueError: for an unknown key (with the nearest one), a value of the wrong type, or values that exclude each
            other.
    """
    config_parser = _Parser([], add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", action="append", default=[])
    configs, rest = config_parser.parse_known_args(argv)
    recipe: dict[str, Any] = {}
    for path in configs.config:
        recipe = merge(recipe, read_recipe(path, known_fields()))
    overrides, rest = take_dotted(rest, MAPPINGS)
    recipe = merge(recipe, overrides)
    parser = make_parser()
    parser.set_defaults(**{name: None for name, value in recipe.items() if value is None})
    *parsed, unknown = parser.parse_args_into_dataclasses(
        [*as_argv(recipe), *rest], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(_unknown_argument(unknown))
    model, tokenizer, data, lora, training = parsed
    return Arguments(model, tokenizer, data, lora, training, _given(parsed, recipe, rest))


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def make_parser(option_types: Sequence[type] = OPTION_TYPES) -> HfArgumentParser:
    """The parser of `hmoe train`, for all fields or for those of some classes."""
    return _Parser(option_types, prog="hmoe train", usage=USAGE, description=DESCRIPTION, allow_abbrev=False)


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does, and refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_recipe(path: str | Path, known: Collection[str], extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields a YAML recipe sets, flat, whether it has sections or not; `known` are those there are.

    `extends: other.yaml` takes the fields of another recipe, named relative to this one, which this one overrides.

    Raises:
        ValueError: if it is not a mapping, names an unknown key, sets a key twice, or extends itself.
    """
    path = Path(path)
    content = _read_mapping(path)
    base = content.pop("extends", None)
    flat: dict[str, Any] = {}
    for key, value in content.items():
        entries = value.items() if key in SECTIONS and isinstance(value, dict) else [(key, value)]
        for name, entry in entries:
            if name in flat:
                raise ValueError(f"recipe {str(path)!r} sets `{name}` twice")
            flat[name] = entry
    for name in flat:
        if name not in known:
            raise ValueError(f"recipe {str(path)!r}: unknown key `{name}`{nearest(name, known)}")
    if base is None:
        return flat
    if not isinstance(base, str):
        raise ValueError(f"recipe {str(path)!r}: `extends` must name one recipe file, got {base!r}")
    below = path.parent / base
    if below.resolve() in (path.resolve(), *extended_by):
        raise ValueError(f"recipe {str(path)!r} extends {base!r}, which extends it: remove one of the two `extends`")
    return merge(read_recipe(below, known, (*extended_by, path.resolve())), flat)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"cannot read recipe {str(path)!r}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"recipe {str(path)!r} must map keys to values, it holds {type(content).__name__}")
    return content


def nearest(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, known, otherwise="; `hmoe train --help_all` lists the keys")


def take_dotted(argv: list[str], mappings: Collection[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Splits `--model_config.hidden_size 64` off: {"model_config": {"hidden_size": 64}}."""
    taken: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        mapping, dot, key = flag.partition(".")
        if not (dot and mapping.startswith("--") and _name_of(mapping) in mappings):
            rest.append(word)
            continue
        taken.setdefault(_name_of(mapping), {})[key] = yaml.load(value if equals else next(words, ""), _Loader)
    return taken, rest


def _name_of(word: str) -> str:
    """The field that a word of the command line sets: `--learning-rate=1e-3` sets learning_rate."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            value = {**merged[name], **value}
        merged[name] = value
    return merged


def as_argv(recipe: Mapping[str, Any]) -> list[str]:
    """The recipe as command-line words, so that one parser checks the types of both."""
    words: list[str] = []
    for name, value in recipe.items():
        if isinstance(value, list) and value:
            words += [f"--{name}", *map(_word, value)]
        elif value is not None and value != []:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # an integer field may be written 1e9
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return str(value)


def _unknown_argument(words: list[str]) -> str:
    names = [_name_of(word) for word in words if word.startswith("--")]
    if names:
        return f"unknown argument `--{names[0]}`{nearest(names[0], known_fields())}"
    return f"unexpected words {words}: every argument is `--field value`"


def _given(parsed: list[Any], recipe: Mapping[str, Any], argv: list[str]) -> dict[str, Any]:
    """The final values of all fields that recipe or command line name."""
    flags = {_name_of(word) for word in argv if word.startswith("--")}
    given = {*recipe, *flags, *(flag.removeprefix("no_") for flag in flags)} - {"hub_token"}
    values = {f.name: getattr(options, f.name) for options in parsed for f in fields(options) if f.name in given}
    return {name: getattr(value, "value", value) for name, value in values.items()}
