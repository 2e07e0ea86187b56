"""What may import what: travelling files each other, the ground floor no wing, wings the ground floor."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hmoe


PACKAGE = Path(hmoe.__file__).parent
WINGS = ("conversion", "training", "eval")
# The command that reads recipes stands above the wings, though it is one file.
COMMANDS = ("describe.py", "__main__.py")
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def own_imports(name: str) -> set[str]:
    """Modules of the package that a file imports anywhere, such as `hmoe.training.data`."""
    package = ["hmoe", *Path(name).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module.split(".")[0] == "hmoe"}


def wing(module: str) -> str | None:
    part = module.split(".")[1] if "." in module else ""
    return part if part in WINGS else None


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_its_place_allows(name):
    own = Path(name).parts[0] if len(Path(name).parts) > 1 else None
    wings = {wing(module) for module in own_imports(name)} - {None, own}
    assert name in COMMANDS or not wings, f"{name} imports {wings}"


def test_nothing_imports_itself_in_a_circle():
    modules = {"hmoe." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name for name in FILES}
    graph = {module: own_imports(name) & set(modules) - {module, "hmoe"} for module, name in modules.items()}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in sorted(graph):
        visit(module, ())
    assert done == set(modules)


def test_the_map_in_contributing_names_every_file():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    heads = {"conversion": "| `conversion/` |", "training": "| `training/` |", "eval": "| `eval/` |"}
    places = sorted(text.index(head) for head in heads.values())
    for name in FILES:
        part, _, file = name.rpartition("/")
        if (
            file in ("__init__.py", "__main__.py") or name == "training/placement.py"
        ):  # the last: an alias of a command
            continue
        start = text.index(heads[part]) if part in heads else text.index("## The map")
        end = min([place for place in places if place > start], default=text.index("## Adding an expert backend"))
        assert part not in heads or f"`{file}`" in text[start:end], f"{name} is not in its part of the map"
        assert f"`{file}`" in text[start:], f"{name} is not on the map"


@pytest.mark.parametrize("name", FILES)
def test_functions_take_at_most_eight_parameters(name):
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef) or node.name == "forward" or node.name.endswith("_kernel"):
            continue  # Transformers' interface, and Triton's kernels
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        own = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        assert len(own) <= 8, f"{node.name}({', '.join(own)})"
