"""docker/Dockerfile, read: what it copies and installs is there, it is pinned, and no process of it is root's."""

import fnmatch
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"


def instructions():
    """(instruction, the rest) of every line, continuations joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M)
    joined = re.sub(r"\\\n\s*", "", text)
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages():
    """Name -> (what it is from, its instructions)."""
    found = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
        elif found:
            found[name][1].append((word, rest))
    return found


def defaults():
    """The values of ARG."""
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)


def lineage(name):
    """The instructions of a stage behind those of the stages that it is from."""
    base, own = stages()[name]
    return [*(lineage(base) if base in stages() else [("FROM", base)]), *own]


def copied():
    return [path for word, rest in instructions() if word == "COPY" and not rest.startswith("--from")
            for path in rest.split()[:-1]]


def is_ignored(path):
    """As Docker reads .dockerignore: the last pattern that matches decides."""
    ignored = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip().lstrip("!")
        if not pattern or line.startswith("#"):
            continue
        top = path.split("/")[0]
        if pattern == "*" or path == pattern or top == pattern or (
                pattern.startswith("**/") and fnmatch.fnmatch(Path(path).name, pattern[3:])):
            ignored = not line.startswith("!")
    return ignored


def test_what_is_copied_is_there_and_reaches_docker():
    assert len(copied()) > 10
    for path in copied():
        assert (REPOSITORY / path).exists(), path
        assert not is_ignored(path.rstrip("/")), path


@pytest.mark.parametrize("path", [".git", ".venv", "runs", "data_cache", "shared", "key.json", ".env", "tests", "docs",
                                  "ctllm_jax/__pycache__"])
def test_nothing_else_does(path):
    assert is_ignored(path)


def test_the_package_needs_nothing_that_is_not_copied():
    """What setup.cfg and setup.py name: the files of the description and the licence, the packages and the configs."""
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    described = setup["metadata"]["long_description"].removeprefix("file:").strip()
    assert {described, setup["metadata"]["license_files"], "pyproject.toml", "setup.py", "setup.cfg", "configs/",
            "ctllm_jax/", "data_prep/"} <= set(copied())


def extras(name):
    """The extras that a stage installs."""
    values = defaults()
    words = next(rest for word, rest in stages()[name][1] if word == "RUN" and "pip install" in rest)
    inside = re.search(r'"\.\[(.+?)\]"', words)[1]
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], inside).split(",")


@pytest.mark.parametrize("name", ["build-tpu", "build-cuda"])
def test_extras_exist_and_are_pinned(name):
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    known = setup["options.extras_require"]
    pins = (REPOSITORY / "constraints" / f"py{defaults()['PYTHON'].replace('.', '')}.txt").read_text()
    pinned = {line.partition("==")[0] for line in pins.splitlines()}
    required = setup["options"]["install_requires"].split("\n") + [
        line for extra in extras(name) for line in known[extra].split("\n")]
    assert "train" in extras(name)  # the extras that have it in them ask for no more than it does
    for line in filter(None, required):
        package = re.match(r"[\w-]+", line)[0].lower().replace("_", "-")
        if package == "ctllm-jax":
            continue
        assert package in pinned, f"{package} of {name} has no exact version"
    installs = next(rest for word, rest in stages()[name][1] if word == "RUN")
    assert "--constraint" in installs and ("libtpu" in pinned or name != "build-tpu")


@pytest.mark.parametrize("target", ["tpu", "cuda"])
def test_an_image_is_small_and_not_roots(target):
    lines = lineage(target)
    assert lines[0] == ("FROM", "python:${PYTHON}-slim-bookworm${DIGEST}"), "pinned, slim; no compiler, no source"
    assert [rest for word, rest in lines if word == "USER"] == ["1000:1000"]
    # After it became the user's: its environment, readable by all, and no command.
    after = lines[lines.index(("USER", "1000:1000")):]
    assert {word for word, _ in after} <= {"USER", "ENTRYPOINT", "CMD", "ENV", "COPY"}
    assert [rest for word, rest in lines if word == "COPY"] == [f"--from=build-{target} /venv /venv"]
    assert ("ENTRYPOINT", '["tini", "--", "ctllm"]') in lines


def test_one_digest_pins_every_base():
    """A build argument: a tag has another digest after each rebuild of the base, so it is looked up for a build."""
    bases = [rest.partition(" AS ")[0] for word, rest in instructions() if word == "FROM"]
    assert len(bases) == 6 and {base for base in bases if base not in stages()} == {
        "python:${PYTHON}-slim-bookworm${DIGEST}"}
    assert defaults()["DIGEST"] == "" and "imagetools inspect" in DOCKERFILE.read_text()


def test_the_entry_point_is_a_command_of_the_package():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="ctllm")
    assert [script.value for script in scripts] == ["ctllm_jax.cli:entry"]


def test_it_knows_no_secret():
    assert not [rest for word, rest in instructions() if word in ("ARG", "ENV") and
                re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", rest, re.I)]


def test_hadolint():
    """The linter of Dockerfiles, where there is one for this machine."""
    command = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if command is None:
        pytest.skip("not installed: hadolint")
    done = subprocess.run([command, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
