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
