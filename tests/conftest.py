"""Eight virtual CPU devices, no silent rank promotion, no warning that passes, no hub; in CI, no skipped claim."""

import ctypes
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.runs import FAST_COMPILATION

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *FAST_COMPILATION,
                                    os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# An ahead-of-time compile for TPU looks for no metadata server, and does not mind another one at its side.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What a marker needs. These tests stand for a claim (equal to PyTorch, fits the chip, prepares data): where an extra is
# not installed they are skipped, but in CI, where a skipped one proves nothing, that is a failure.
NEEDS = {"parity": ("torch", "transformers", "trl", "peft", "safetensors"), "aot": ("libtpu",),
         "prep": ("pyarrow", "tokenizers", "zstandard")}


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def released_memory():
    """Compiled programs are dropped at the end of each file; otherwise a worker grows to more than 5 GB."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; other C libraries do without
    if trim:
        trim(0)


@pytest.fixture(scope="session")
def object_store():
    """An object store on loopback, which the clients in this process, and in those that it starts, take for gs://."""
    from tests.object_store import running

    with running() as store:
        yield store


@pytest.fixture
def store(object_store):
    """It, without faults."""
    object_store.heal()
    object_store.requests.clear()
    yield object_store
    object_store.heal()


# Folders and files whose tests take longest come first, so that at the end both workers still have something to do.
LONGEST_FIRST = ("tests/training/", "tests/test_docs.py", "tests/test_faults.py", "tests/cli/", "tests/kernels/",
                 "tests/inference/", "tests/model/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((place for place, start in enumerate(LONGEST_FIRST)
                                      if item.nodeid.startswith(start)), len(LONGEST_FIRST)))
    missing = {marker: [name for name in names if importlib.util.find_spec(name) is None]
               for marker, names in NEEDS.items()}
    for item in items:
        for marker, names in missing.items():
            if names and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(names)}"))


class SkipGuard:
    """Fails a session that skipped a test with a marker of NEEDS, or a whole file, or that ran no test."""

    def __init__(self):
        self.skipped: list[str] = []
        self.executed = 0

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and not report.skipped:
            self.executed += 1
        if report.skipped and not hasattr(report, "wasxfail") and NEEDS.keys() & set(report.keywords):
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report):
        # A file skipped while it is imported has no tests yet, so no markers to look at.
        if report.skipped:
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if session.exitstatus == pytest.ExitCode.OK and (self.skipped or not self.executed):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for nodeid in self.skipped:
            terminalreporter.write_line(f"SKIPPED, and may not be in CI: {nodeid}", red=True)


def pytest_configure(config):
    # The workers of pytest-xdist report to their controller, which counts.
    if os.environ.get("CI") == "true" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipGuard(), "skip-guard")
