"""Tests that imports go one way: cli -> api -> {train.run, evaluate, generate, plan, hub} -> {train, methods, objectives} ->
models -> the rest.

Files are parsed, not run, so that imports inside functions count too.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ftjax"

# A package may import itself, the packages listed here, and what those may import.
BELOW = {
    "errors": set(),
    "console": {"errors"},
    "long_steps": {"console"},
    "config": {"console", "errors"},
    "tree": set(),
    "chips": set(),
    "torus": {"chips"},
    "placement": {"torus", "errors"},
    "mesh": {"placement", "torus", "chips", "config", "errors"},
    "page": set(),
    "data": {"page", "config", "errors", "long_steps"},
    "models": {"mesh", "tree", "errors", "chips"},
    "flops": {"chips", "models"},
    "objectives": {"models", "data"},
    "methods": {"models"},
    "hub": {"methods", "objectives", "models"},
    "compile_cache": set(),
    "distributed": {"errors", "cpu_threads"},
    "gpu": set(),
    "cpu_threads": set(),
    "train": {"methods", "objectives", "models", "hub", "data", "flops", "compile_cache", "distributed"},
    "generate": {"objectives", "compile_cache", "distributed", "hub", "methods"},
    "serve": {"generate"},
    "evaluate": {"generate", "train", "hub", "objectives", "version"},
    "rl": {"generate", "train", "evaluate"},
    "report": {"page", "data", "config", "evaluate"},
    "plan": {"train", "generate", "hub", "objectives", "chips", "torus", "version", "out_of_memory"},
    "doctor": {"compile_cache", "console", "version"},
    "version": set(),
    "out_of_memory": set(),
    "api": {
        "config",
        "console",
        "cpu_threads",
        "data",
        "distributed",
        "errors",
        "evaluate",
        "generate",
        "gpu",
        "hub",
        "objectives",
        "plan",
        "report",
        "rl",
        "train",
    },
    "demo": {"api"},
    "tune": {"api", "config", "console", "cpu_threads", "data", "errors", "gpu", "page"},
    "propose": {"plan", "train", "hub", "objectives", "models", "data", "config", "console", "errors", "version"},
    "cli": {
        "api",
        "demo",
        "out_of_memory",
        "version",
        "console",
        "report",
        "serve",
        "evaluate",
        "generate",
        "plan",
        "propose",
        "tune",
        "hub",
        "doctor",
        "distributed",
        "gpu",
        "cpu_threads",
    },
    "lm_eval": {"evaluate"},
    "__main__": {"cli"},
    "ftjax": {"api", "errors", "tune", "version"},
}
NEVER = {"torch", "tensorflow", "keras"}
NOT_IN_DATA = {"jax", "jaxlib", "flax", "optax", "orbax"}
CLI_MAY_IMPORT_AT_TOP = {
    "gc",
    "os",
    "sys",
    "pathlib",
    "typing",
    "typer",
    "typer.core",
    "ftjax.errors",
    "ftjax.version",
}  # quick ones only


def allowed(room: str) -> set[str]:
    found, waiting = set(), [room]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += BELOW[name]
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "ftjax" if first == "__init__" else first


def imported(tree: ast.AST, path: Path) -> list[tuple[int, str]]:
    """Yield line and dotted name of every import, `from a import b` as `a.b`, with relative ones made absolute."""
    package = ("ftjax", *path.relative_to(PACKAGE).with_suffix("").parts[:-1])
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return names


def wrong_imports(source: str, path: Path) -> list[str]:
    room, wrong = room_of(path), []
    for line, name in imported(ast.parse(source), path):
        parts = name.split(".")
        if parts[0] in NEVER or (room == "data" and parts[0] in NOT_IN_DATA):
            wrong.append(f"{path.name}:{line}: {room} imports {name}")
        elif parts[0] == "ftjax" and len(parts) > 1 and parts[1] in BELOW and parts[1] not in allowed(room):
            wrong.append(f"{path.name}:{line}: {room} imports {name}, which stands above it")
    return wrong


def test_every_room_has_its_place():
    assert {room_of(path) for path in files()} <= set(BELOW)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    assert wrong_imports(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    "file, source",
    [
        ("models/llama.py", "def f():\n    from ftjax.methods import lora"),
        ("models/llama.py", "from ..methods import lora"),
        ("models/llama.py", "from .. import methods"),
        ("methods/lora.py", "import ftjax.train.loop"),
        ("objectives/sft.py", "from ftjax.methods.lora import X"),
        ("train/step.py", "from ftjax.generate import sample"),
        ("data/read.py", "import jax.numpy as jnp"),
        ("data/read.py", "from ftjax.models.nn import layers"),
        ("hub/load.py", "import torch.nn"),
        ("config/load.py", "from ftjax import train"),
        ("generate/cache.py", "from ftjax.evaluate import metrics"),
    ],
)
def test_a_wrong_import_is_seen(file, source):
    assert len(wrong_imports(source, PACKAGE / file)) == 1


def test_the_command_line_imports_its_rooms_inside_functions():
    tree = ast.parse((PACKAGE / "cli.py").read_text(encoding="utf-8"))
    top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    top |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert top <= CLI_MAY_IMPORT_AT_TOP, "move the import into the verb that needs it"


def test_no_permission_is_unused():
    """Every import that a package is allowed occurs in one of its files."""
    used = {room: set() for room in BELOW}
    for path in files():
        for _, name in imported(ast.parse(path.read_text(encoding="utf-8")), path):
            used[room_of(path)] |= {name.split(".")[1]} if name.startswith("ftjax.") else set()
    assert {room: below - used[room] for room, below in BELOW.items() if below - used[room]} == {}


def test_a_run_imports_only_what_training_needs():
    """Rooms above `train`, and Pallas, wait until a run needs them: what its files import at their top does not."""
    modules = {".".join(("ftjax", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in files()}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    found, waiting = set(), ["ftjax.api.run", "ftjax.train.run"]
    while waiting:
        name = waiting.pop()
        while name not in modules and name.startswith("ftjax."):
            name = name.rpartition(".")[0]
        if name in found:
            continue
        found.add(name)
        if name in modules:
            tree = ast.parse(modules[name].read_text(encoding="utf-8"))
            top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
            waiting += [one for _, one in imported(top, modules[name])]
    above = ("ftjax.rl.", "ftjax.evaluate.", "ftjax.generate.", "ftjax.plan.", "ftjax.models.nn.attention_splash")
    assert len(found) > 100 and "ftjax.train.loop" in found
    assert [name for name in found if name.startswith(above) or "pallas" in name] == []


def test_no_circles_of_files():
    """No files import each other in a circle, within a package or by imports inside functions."""
    named = {path: ".".join(("ftjax", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in files()}
    modules = {name.removesuffix(".__init__"): path for path, name in named.items()}
    left: dict[str, set[str]] = {}
    for module, path in modules.items():
        left[module] = set()
        for _, name in imported(ast.parse(path.read_text(encoding="utf-8")), path):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            left[module] |= {name} - {"", module}
    while leaves := {module for module, below in left.items() if not below & left.keys()}:
        left = {module: below for module, below in left.items() if module not in leaves}
    assert not left, f"these import each other, or stand on some that do: {sorted(left)}"


def test_no_circles():
    for room in BELOW:
        for below in BELOW[room]:
            assert room not in allowed(below), f"{room} and {below} import each other"
