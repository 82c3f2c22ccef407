"""The arrows between rooms, and the floors of vim2/ops, are those that docs/architecture.md draws."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("vim2", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ".mim" not in path.parts  # configs, which are no modules
}
DOORS = {name for name, path in FILES.items() if path.name == "__init__.py"}
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


@cache
def imports(module: str) -> frozenset[str]:
    """The package's modules that a module's text imports, anywhere in it."""
    package = module.split(".") if module in DOORS else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # a name that a package hands on is an import of the package; a module in it is one of the module
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if {name, f"tools.{name}"} & FILES.keys() else base for name in names}
        elif module == "tools.vim2_cli" and isinstance(node, ast.Constant) and str(node.value).startswith("vim2."):
            # which imports packages by their names
            found.add(node.value)
    if module.startswith("tools."):  # whose commands run with their folder on the path
        found |= {f"tools.{name}" for name in found}
    return frozenset(found & FILES.keys() - {module})


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the document, each row's names in backquotes."""
    section = ARCHITECTURE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[re.findall(r"`([\w./]+)`", cell) for cell in row] for row in rows[2:]]


ROOMS = {room: set(below) for (room,), below in table("Rooms")}


def room_of(module: str) -> str:
    """The most particular room that holds a module."""
    inside = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max((room for room in inside if room != "vim2" or module == "vim2"), key=len)


def test_arrows_are_those_of_the_document():
    arrows = {room: set() for room in ROOMS}
    for module in FILES:
        arrows[room_of(module)] |= {room_of(other) for other in imports(module)} - {room_of(module)}
    assert arrows == ROOMS


def floors(modules: set[str]) -> dict[str, int]:
    """On which floor each module stands: above all that it imports. A circle of imports is an error."""

    known = {}  # by module alone: there are ever more ways down to the lower floors

    def floor(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}"
        if module not in known:
            below = imports(module) & modules
            known[module] = 1 + max((floor(other, (*above, module)) for other in below), default=0)
        return known[module]

    return {module: floor(module) for module in modules}


def test_no_circle():
    floors(
        set(FILES) - {"vim2"}
    )  # the package's own door is imported for the models that it registers, and __version__


def test_floors_of_the_operators_are_those_of_the_document():
    actual = {}
    for module, floor in floors({name for name in FILES if name.startswith("vim2.ops.")} - DOORS).items():
        actual.setdefault(floor, set()).add(module.removeprefix("vim2.ops.").replace(".", "/"))
    drawn = [set(names) for _, names in table("Floors of the operators")]
    assert [actual[floor] for floor in sorted(actual, reverse=True)] == drawn
    assert len(drawn) <= 5


@pytest.mark.parametrize("door", sorted(DOORS))
def test_no_name_hides_a_module(door):
    """What a package hands on under the name of one of its modules would hide that module."""
    inside = {name.removeprefix(f"{door}.") for name in FILES if name.startswith(f"{door}.")}
    tree = ast.parse(FILES[door].read_text())
    handed_on = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module  # not `from . import module`
        for alias in node.names
    }
    assert not inside & handed_on
