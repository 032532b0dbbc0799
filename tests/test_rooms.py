"""The house keeps its order: who imports whom, what a room needs, and what is nowhere."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Top floor to ground; a room imports those that stand after it.
ROOMS = ["__main__", "cli", "trainer", "evaluation", "preflight", "inference", "training", "huggingface", "data",
         "model", "sharding", "cluster", "dataset", "kernels", "losses", "gathered", "ring_copies", "report",
         "storage", "config"]

# What data_prep may use of the package, and who may use data_prep.
DATA_PREP_USES = ("ctllm_jax.dataset", "ctllm_jax.config", "ctllm_jax.report", "ctllm_jax.data.tokenizer")
DATA_PREP_USERS = ("cli",)

# Rooms that another project can take: what they may import besides the standard library and rooms below.
ARRAYS = {"jax", "jaxlib", "numpy"}
MAY_IMPORT = {"kernels": ARRAYS, "losses": ARRAYS, "gathered": ARRAYS, "ring_copies": ARRAYS,
              "model": ARRAYS | {"flax"}}
HEAVY = ["grain", "tensorflow_datasets", "sentencepiece", "orbax", "optax", "omegaconf", "pydantic", "rich"]

WITHOUT_JAX = ["ctllm_jax.config", "ctllm_jax.storage", "ctllm_jax.report", "ctllm_jax.dataset",
               "ctllm_jax.data.tokenizer", "data_prep"]
JAX_AND_FRIENDS = {"jax", "jaxlib", "flax", "optax", "orbax"}

CODE = [path for folder in ("ctllm_jax", "data_prep", "benchmarks", "tests") for path in
        sorted((REPOSITORY / folder).rglob("*.py"))] + sorted(REPOSITORY.glob("*.py"))
LIBRARY = [path for path in CODE if path.relative_to(REPOSITORY).parts[0] in ("ctllm_jax", "data_prep")]


def module_name(path: Path) -> str:
    """`ctllm_jax/data/batch.py` -> `ctllm_jax.data.batch`; a package's `__init__` is the package."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module of ours: `ctllm_jax.data.batch` -> `data`; `data_prep` is a room of its own."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "ctllm_jax" else first


def imports(tree: ast.AST, module: str, *, is_package: bool = False, typing: bool = True) -> Iterator[tuple[int, str]]:
    """Every `(line, module)` that a file imports, in functions too; `typing=False` skips what checkers alone see."""
    for node in tree.body if isinstance(tree, ast.Module) else ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and not typing and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*anchor, *([base] if base else [])])
            # `from a import b` may name a module b of a, or something in a: both are reported as a.b.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)
            yield from imports(node, module, is_package=is_package, typing=typing)
        else:
            yield from imports(node, module, is_package=is_package, typing=typing)


def misplaced(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a file of ours imports that it may not: a room above, jax without leave, more than its room is to need."""
    found, tree, room = [], ast.parse(source), room_of(module)
    for line, name in imports(tree, module, is_package=is_package):
        target = room_of(name)
        ours = name.partition(".")[0] == "ctllm_jax" and target in ROOMS
        if module == "ctllm_jax":
            found.append(f"{module}:{line} imports {name}; it imports nothing")
        elif room == "data_prep" and ours and not name.startswith(DATA_PREP_USES):
            found.append(f"{module}:{line} imports {name}; data_prep may use {', '.join(DATA_PREP_USES)}")
        elif room in ROOMS and ours and ROOMS.index(target) < ROOMS.index(room):
            found.append(f"{module}:{line} imports {name}; {target} stands above {room}")
        elif room in ROOMS and target == "data_prep" and room not in DATA_PREP_USERS:
            found.append(f"{module}:{line} imports {name}; only {', '.join(DATA_PREP_USERS)} may use data_prep")
        if module.startswith(tuple(WITHOUT_JAX)) and name.partition(".")[0] in JAX_AND_FRIENDS:
            found.append(f"{module}:{line} imports {name}; nothing of jax comes here")
        if re.match(r"jax\.experimental\.(pjit|shard_map)\b", name):
            found.append(f"{module}:{line} imports {name}; it is deprecated")
    for line, name in imports(tree, module, is_package=is_package, typing=False):
        top = name.partition(".")[0]
        allowed = MAY_IMPORT.get(room)
        if allowed is not None and top not in allowed | {"ctllm_jax"} and top not in sys.stdlib_module_names:
            found.append(f"{module}:{line} imports {name}; {room} needs only {', '.join(sorted(allowed))}")
    return found


def run_python(program: str) -> subprocess.CompletedProcess:
    """A fresh interpreter at the root of the repository, on the CPU."""
    return subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300)


IMPORT_ALL = """
import importlib, pkgutil
def import_all(name):
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
"""


@pytest.mark.parametrize(("module", "source", "complaint"), [
    ("ctllm_jax.losses.x", "def f():\n    from ctllm_jax.training import step", "training stands above losses"),
    ("ctllm_jax.model.x", "from ..data import batch", "data stands above model"),
    ("ctllm_jax.training.x", "import importlib\nimportlib.import_module('ctllm_jax.cli')", "cli stands above"),
    ("ctllm_jax.model.x", "import optax", "model needs only"),
    ("ctllm_jax.report.x", "def f():\n    import jax", "nothing of jax"),
    ("data_prep.x", "from ctllm_jax.data import pretrain", "data_prep may use"),
    ("ctllm_jax.data.x", "import data_prep.commits", "may use data_prep"),
    ("ctllm_jax.training.x", "from jax.experimental import shard_map", "deprecated"),
    ("ctllm_jax", "import os", "imports nothing"),
])
def test_a_misplaced_import_is_found(module, source, complaint):
    assert any(complaint in line for line in misplaced(source, module))


@pytest.mark.parametrize(("module", "source"), [
    ("ctllm_jax.training.x", "from ctllm_jax import losses\nfrom ctllm_jax.model import decoder\nimport optax"),
    ("ctllm_jax.model.x", "import typing\nif typing.TYPE_CHECKING:\n    import pydantic\nimport flax.linen"),
    ("data_prep.x", "from ctllm_jax.data import tokenizer\nfrom ctllm_jax.config.errors import UserError"),
    ("ctllm_jax.cli.x", "from data_prep import pipeline\nfrom ctllm_jax import __version__"),
])
def test_a_rightful_import_is_not(module, source):
    assert misplaced(source, module) == []


def test_rooms_import_downwards_and_need_little():
    found = [line for path in LIBRARY for line in misplaced(path.read_text(encoding="utf-8"), module_name(path),
                                                            is_package=path.name == "__init__.py")]
    assert not found, "\n".join(found)


def test_no_imports_form_a_circle():
    modules, graph = {module_name(path): path for path in LIBRARY}, {}
    for module, path in modules.items():
        found = imports(ast.parse(path.read_text(encoding="utf-8")), module, is_package=path.name == "__init__.py")
        # `a.b` is the module, or something in the module a; a package does not import itself by importing its parts.
        targets = {name if name in modules else name.rpartition(".")[0] for _, name in found}
        graph[module] = targets & set(modules) - {module}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_every_room_has_its_floor():
    there = {room_of(module_name(path)) for path in LIBRARY} - {"", "data_prep"}
    assert there <= set(ROOMS), f"in ctllm_jax/, but on no floor: {', '.join(sorted(there - set(ROOMS)))}"


@pytest.mark.parametrize("room", ["kernels", "losses", "model"])
def test_a_room_to_take_away_imports_where_little_is_installed(room):
    blocked = [name for name in [*HEAVY, "flax"] if name not in MAY_IMPORT[room]]
    if "flax" in MAY_IMPORT[room]:
        blocked.remove("rich")  # Flax itself draws its tables with it.
    program = IMPORT_ALL + f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)
sys.meta_path.insert(0, Blocker())
import_all("ctllm_jax.{room}")
"""
    result = run_python(program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_jax_stays_out(name):
    result = run_python(IMPORT_ALL + f"import sys\nimport_all({name!r})\n"
                        "sys.exit(', '.join(m for m in ('jax', 'jaxlib', 'flax') if m in sys.modules) or 0)")
    assert result.returncode == 0, f"importing {name} brings in {result.stderr}"


def test_no_file_is_long():
    long = {str(path.relative_to(REPOSITORY)): lines for path in CODE
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, f"over 400 lines: {long}"


def test_library_code_prints_nothing():
    prints = [f"{path.relative_to(REPOSITORY)}:{node.lineno}" for path in LIBRARY
              if room_of(module_name(path)) != "cli"
              for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not prints, f"log instead: {prints}"


def test_importing_changes_no_environment():
    found = []
    for path in LIBRARY:
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if re.search(r"os\.environ\[[^]]*\] =|os\.(environ\.(setdefault|update|pop)|putenv)\(|config\.update\(",
                         ast.unparse(statement)):
                found.append(f"{path.relative_to(REPOSITORY)}:{statement.lineno}")
    assert not found, f"do it in a function: {found}"


def test_no_file_names_a_machine():
    # Home folders and temporary environments of whoever wrote a file, and the hosts of package registries.
    machine = re.compile(r"(?<![\w.\-/])/(?:work|root|home|Users|opt/wheels|tmp/(?:venvs|bash_jobs))/"
                         r"|\b(?:pypi|pythonhosted|npmjs|download\.pytorch)\.(?:org|com)\b")
    found = []
    for path in sorted(REPOSITORY.rglob("*")):
        parts = path.relative_to(REPOSITORY).parts
        if not path.is_file() or parts[0].startswith(".") and parts != (".ci", "run"):
            continue
        if parts[0] in ("runs", "data_cache", "build", "dist") or "__pycache__" in parts or "egg-info" in parts[0]:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1):
            if match := machine.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {match.group()}")
    assert not found, "\n".join(found)
