"""What the checks of `launch.py doctor` examine, and what they find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ctllm_jax.config.pretrain import PretrainConfig

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """A line of the doctor.

    Attributes:
      check: what was looked at.
      status: ok, warn or fail.
      text: what was found.
      fix: what to do about it; empty where all is well.
    """

    check: str
    status: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Subject:
    """What is examined: a run (None: the machine alone), its stage, and the environment that it would start in."""

    config: PretrainConfig | None
    stage: str
    environment: Mapping[str, str]


def worst(findings: list[Finding]) -> str:
    """fail, warn or ok: the worst of all."""
    return max((each.status for each in findings), key=[OK, WARN, FAIL].index, default=OK)


def as_json(findings: list[Finding]) -> list[dict[str, str]]:
    """Findings as JSON."""
    return [asdict(each) for each in findings]


def late(name: str, seconds: float) -> list[Finding]:
    """What is said of a check that did not end."""
    return [Finding(name, FAIL, f"no answer in {seconds:g} s",
                    "a file system, a name server or a device does not answer; timeout=SECONDS waits longer")]
