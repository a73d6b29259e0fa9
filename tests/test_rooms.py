"""Who may import whom: the dependency rule of the repository, held by reading every import statement."""

import ast
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent
ROOMS = {"nodes", "patches", "techniques", "networks", "models_config", "formats", "scenes", "training"}
HOST = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "server",
    "node_helpers",
    "latent_preview",
    "execution",
}
ALLOWED_ROOMS = {
    "nodes": {"nodes", "patches", "techniques", "formats", "scenes"},
    "patches": {"patches", "techniques", "networks", "models_config"},
    "techniques": {"techniques"},
    "networks": {"networks", "techniques"},
    "formats": {"formats", "techniques"},
    "scenes": {"scenes"},
    "training": {"training", "scenes", "techniques", "networks", "formats", "models_config"},
}
SEES_HOST = {"nodes", "patches"}
# techniques/ is mathematics: torch, numpy and einops, and the few others that one of them needs, imported where they
# are used.
TECHNIQUE_PACKAGES = {"torch", "numpy", "einops"}
LATE_PACKAGES = {
    "techniques/effects.py": {"scipy"},
    "techniques/matting.py": {"pymatting", "scipy"},
    "techniques/metrics.py": {"scipy", "skimage"},
    "techniques/transparency.py": {"scipy"},
}
TOOLS = {path.stem for path in (PACK / "tools").glob("*.py")}
STANDARD = __import__("sys").stdlib_module_names


def sources():
    return [path for room in sorted(ALLOWED_ROOMS) for path in sorted((PACK / room).rglob("*.py"))]


def imports(path: Path):
    """(module, line, at module level) of every import, relative ones as `room.module`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(tree.body)
    here = path.relative_to(PACK).with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module:
                yield module, node.lineno, node in top
            else:  # from .. import room
                yield from ((alias.name, node.lineno, node in top) for alias in node.names)


def problems(path: Path) -> list[str]:
    name = path.relative_to(PACK).as_posix()
    room = name.split("/")[0]
    found = []
    for module, line, at_top in imports(path):
        first = module.split(".")[0]
        where = f"{name}:{line}: {room}/ imports {module}"
        if first in ROOMS and first not in ALLOWED_ROOMS[room]:
            found.append(where)
        if first in HOST and room not in SEES_HOST:
            found.append(f"{where}, which only nodes/ and patches/ may")
        if "." not in module and module in TOOLS:
            found.append(f"{where}, a tool")
        late = not at_top and first in LATE_PACKAGES.get(name, ())
        if room == "techniques" and first not in TECHNIQUE_PACKAGES | STANDARD | ROOMS | {"__future__"} and not late:
            found.append(f"{where}; techniques are torch, numpy and einops only")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(PACK).as_posix())
def test_imports_stay_in_their_room(path):
    assert problems(path) == []


def modules_imported(path: Path) -> set[str]:
    """The pack's modules that a file imports anywhere, as paths without .py."""
    here, found = path.relative_to(PACK).with_suffix("").parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            found |= {"/".join(base), *("/".join([*base, alias.name]) for alias in node.names)}
    return found


def test_no_module_imports_itself_through_others():
    known = {path.relative_to(PACK).with_suffix("").as_posix(): path for path in sources()}
    left = {name: modules_imported(path) & known.keys() - {name} for name, path in known.items()}
    while free := [name for name, others in left.items() if not others]:
        left = {name: others - set(free) for name, others in left.items() if name not in free}
    assert left == {}


def test_the_rule_catches_an_upward_import(tmp_path, monkeypatch):
    folder = tmp_path / "techniques"
    folder.mkdir()
    bad = folder / "bad.py"
    bad.write_text(
        "import comfy.utils\nfrom ..nodes import depth\nfrom .. import patches\nimport PIL\ndef f():\n    import "
        "pymatting\n"
    )
    monkeypatch.setitem(globals(), "PACK", tmp_path)
    assert len(problems(bad)) == 6  # comfy breaks two rules


def test_the_entrypoint_is_short_and_imports_nothing_heavy():
    text = (PACK / "__init__.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 20
    assert [node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))] == []
