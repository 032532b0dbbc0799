"""The pages for those who read and extend the code name files, symbols and layers that exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_rooms import ROOMS

REPOSITORY = Path(__file__).resolve().parent.parent
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"
PAGES = [ARCHITECTURE, *(REPOSITORY / "docs" / name for name in ("extending.md", "glossary.md"))]
TOUR = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \| ([^|]+) \|", ARCHITECTURE.read_text(encoding="utf-8"), re.M)


def top_level_names(path: Path) -> set[str]:
    """Functions, classes and constants of a module."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_the_tour_follows_the_code_in_its_order():
    files = [Path(file).stem for file, *_ in TOUR]
    order = ["model", "parameters", "decoder", "cross_entropy", "step", "optimizer", "loop", "batch", "packing",
             "sharding", "run", "trainer"]
    assert [file for file in files[:files.index("prepare")] if file in order][:len(order)] == order


@pytest.mark.parametrize(("file", "lines", "symbols"), TOUR, ids=[file for file, *_ in TOUR])
def test_a_file_of_the_tour_has_its_symbols_and_about_its_lines(file, lines, symbols):
    path = REPOSITORY / file
    assert set(re.findall(r"`(\w+)`", symbols)) <= top_level_names(path)
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert abs(count - int(lines)) <= 0.2 * count, f"docs/architecture.md says {lines} lines of {file}: {count}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_folders_of_a_page_exist(page):
    for name in re.findall(r"`((?:ctllm_jax|data_prep|tests|configs|benchmarks)/[\w./]*)`",
                           page.read_text(encoding="utf-8")):
        assert (REPOSITORY / name).exists(), f"{page.name}: {name}"


def test_the_picture_of_the_layers_has_every_layer_in_its_order():
    picture = re.search(r"```mermaid\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.S).group(1)
    shown = [word for word in re.findall(r"\b\w+\b", re.sub(r'".*?"', "", picture)) if word in ROOMS]
    assert list(dict.fromkeys(shown)) == [room for room in ROOMS if room != "__main__"]
