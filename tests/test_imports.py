"""Imports run downwards: every file imports from its own room and from rooms below it, lazy imports included.

``python tests/test_imports.py CHECKOUT`` prints what is wrong in another checkout.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"errors"},
    {"files"},
    {"device"},
    {"models"},
    {"convert"},
    {"bundle"},
    {"engine"},
    {"convert.bundles", "arms"},
    {"train"},
    {"bench"},
    {"evaluate"},
    {"serve"},
    {"cli"},
    {"__main__"},
)
"""From the ground up (docs/development.md); rooms on one floor do not know each other."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TOP_LEVEL_FOLDERS = ("convert", "bench")
"""Install as ``kvp_mlx.convert`` and ``kvp_mlx.bench``."""

Imports = dict[str, set[str]]
"""Module (without ``kvp_mlx.``; the package itself is ``""``) to the modules that it imports."""


def modules_of(root: Path) -> dict[str, Path]:
    """Return all modules of a checkout by name."""
    found = {}
    for folder in ("kvp_mlx", *TOP_LEVEL_FOLDERS):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts[folder == "kvp_mlx" :]
            found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


def imports_of(modules: dict[str, Path]) -> Imports:
    """Return what every module imports of the others, wherever in the file that stands."""
    return {name: set(imported(name, path, modules)) for name, path in modules.items()}


def imported(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Yield the modules that one file imports; of ``from package import module`` the module."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [(alias.name.split("."), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["kvp_mlx", *package][: len(package) + 2 - node.level] if node.level else []
            start = [*above, *(node.module.split(".") if node.module else [])]
            wanted = [(start, alias.name) for alias in node.names]
        else:
            continue
        for (top, *rest), member in wanted:
            whole = ".".join([*rest, *([member] if member else [])])
            if top == "kvp_mlx":
                yield whole if whole in modules else ".".join(rest)


def room_of(module: str) -> str:
    """Return a module's room: the longest name of one that it begins with, or its folder, or the package itself."""
    parts = module.split(".")
    places = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((place for place in places if place in FLOOR), parts[0] if len(parts) > 1 else "")


def upward(imports: Imports) -> list[str]:
    """Return the imports that do not run downwards; the package itself (its version) may be imported by all."""
    wrong = []
    for name, targets in imports.items():
        for target in targets - {""}:
            one, other = room_of(name), room_of(target)
            if name and one != other and not FLOOR.get(other, 99) < FLOOR.get(one, -1):
                wrong.append(f"{name} imports {target}")
    return sorted(wrong)


def cycles(imports: Imports) -> list[str]:
    """Return one cycle of modules through each module that lies on any."""
    found = []
    for start in sorted(imports):
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop()
            for target in imports.get(path[-1], set()) - {""}:
                if target == start:
                    found.append(" -> ".join([*path, start]))
                    paths = []
                    break
                if target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
    return found


def between_rooms(imports: Imports) -> Imports:
    """Return the same between rooms."""
    rooms: Imports = {}
    for name, targets in imports.items():
        own = rooms.setdefault(room_of(name) or "(top)", set())
        own |= {room_of(target) or "(top)" for target in targets if target} - {room_of(name) or "(top)"}
    return rooms


def test_imports_run_downwards() -> None:
    imports = imports_of(modules_of(ROOT))
    assert len(imports) > 80
    assert upward(imports) == []


def test_no_module_and_no_room_imports_itself_in_a_circle() -> None:
    imports = imports_of(modules_of(ROOT))
    assert cycles(imports) == []
    assert cycles(between_rooms(imports)) == []


def test_every_module_has_a_room() -> None:
    assert {name for name in modules_of(ROOT) if name and room_of(name) not in FLOOR} == set()


def test_every_room_says_what_belongs_there() -> None:
    for room in FLOOR:
        path = modules_of(ROOT).get(room)
        if path is not None:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), room


def test_finds_lazy_upward_imports_and_cycles(tmp_path: Path) -> None:
    files = {
        "kvp_mlx/__init__.py": "from .device.blas import load\n",
        "kvp_mlx/device/blas.py": "def load():\n    from ..engine import reply\n",
        "kvp_mlx/engine/reply.py": "from kvp_mlx.device.blas import load\nimport kvp_mlx.bundle.config\n",
        "kvp_mlx/bundle/config.py": "from .. import __version__\n",
        "convert/gguf.py": "if True:\n    from ..bundle import config\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    imports = imports_of(modules_of(tmp_path))
    assert imports["engine.reply"] == {"device.blas", "bundle.config"}
    assert upward(imports) == ["convert.gguf imports bundle.config", "device.blas imports engine.reply"]
    assert cycles(imports) == [
        "device.blas -> engine.reply -> device.blas",
        "engine.reply -> device.blas -> engine.reply",
    ]


if __name__ == "__main__":
    everything = imports_of(modules_of(Path(sys.argv[1])))
    print("\n".join(["upward:", *upward(everything), "cycles:", *cycles(everything)]))
    print("\n".join(["cycles of rooms:", *cycles(between_rooms(everything))]))
