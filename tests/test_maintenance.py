"""The maintenance page names every private module of a library that the code or the tests import."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def private_modules(text: str) -> set[str]:
    """The modules below a `_src` package that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if "_src" in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom) and node.module and "_src" in node.module.split("."):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_private_module_is_on_the_maintenance_page():
    page = (REPOSITORY / "docs" / "maintenance.md").read_text(encoding="utf-8")
    missing = set()
    for folder in ("ctllm_jax", "data_prep", "tests", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "_src" in text:
                # The page names a module, or one name in it.
                missing |= {f"{name} ({path.relative_to(REPOSITORY)})" for name in private_modules(text)
                            if f"`{name}`" not in page and f"`{name.rpartition('.')[0]}`" not in page}
    assert not missing, f"add to the table in docs/maintenance.md: {sorted(missing)}"


def test_an_import_of_a_private_module_is_found():
    assert private_modules("from jax._src import core") == {"jax._src.core"}
    assert private_modules("def f():\n    import jax._src.api") == {"jax._src.api"}
    assert private_modules("import jax\nfrom jax import numpy") == set()
