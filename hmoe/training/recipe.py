"""Reading YAML recipes and merging them with command-line words."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hmoe.errors import did_you_mean


SECTIONS = ("model", "tokenizer", "data", "lora", "training")


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


def read_recipe(path: str | Path, known: Collection[str]) -> dict[str, Any]:
    """The fields a YAML recipe sets, flat, whether it has sections or not; `known` are those there are.

    Raises:
        ValueError: if it is not a mapping, names an unknown key, or sets a key twice.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"cannot read recipe {str(path)!r}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"recipe {str(path)!r} must map keys to values, it holds {type(content).__name__}")
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
    return flat


def nearest(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, known, otherwise="; `hmoe train --help_all` lists the keys")


def take_configs(argv: list[str]) -> tuple[list[str], list[str]]:
    paths, rest, position = [], [], 0
    while position < len(argv):
        word = argv[position]
        if word == "--config":
            if position + 1 == len(argv):
                raise ValueError("`--config` names no file")
            paths.append(argv[position + 1])
            position += 1
        elif word.startswith("--config="):
            paths.append(word.partition("=")[2])
        else:
            rest.append(word)
        position += 1
    return paths, rest


def take_dotted(argv: list[str], mappings: Collection[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Splits `--model_config.hidden_size 64` off: {"model_config": {"hidden_size": 64}}."""
    taken: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    words: Iterator[str] = iter(argv)
    for word in words:
        flag, _, value = word.partition("=")
        name, dot, key = flag.removeprefix("--").partition(".")
        if not (word.startswith("--") and dot and name.replace("-", "_") in mappings):
            rest.append(word)
            continue
        if "=" not in word:
            value = next(words, "")
        taken.setdefault(name.replace("-", "_"), {})[key] = yaml.load(value, _Loader)
    return taken, rest


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
