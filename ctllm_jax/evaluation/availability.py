"""List the questions on this machine, and fetch missing ones."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctllm_jax.config.errors import UserError
from ctllm_jax.evaluation.sources import find_source, name_files
from ctllm_jax.evaluation.tasks import DEFAULT_CACHE, Catalog, Leaf


@dataclass(frozen=True)
class Availability:
    """One task or group: its questions, or how to get them."""

    name: str
    questions: int | None
    """None: missing, or not readable."""
    note: str
    """The place of the questions, the missing file or folder, or the problem of one."""
    on_hub: bool = False
    """Whether missing questions can be fetched."""


@dataclass(frozen=True)
class Fetched:
    """One requested dataset."""

    dataset: str
    configuration: str | None
    rows: int | None
    """None: it could not be fetched."""
    note: str


def look(names: Sequence[str], *, data: Path, cache: Path = DEFAULT_CACHE) -> Iterator[Availability]:
    """Yield the local state of each task or group.

    Raises:
      UserError: a name is unknown.
    """
    catalog = Catalog()
    _check(names, catalog)
    for name in names:
        try:
            yield _look_at(name, catalog.leaves(name), data=data, cache=cache)
        except UserError as error:
            yield Availability(name, None, str(error))


def _look_at(name: str, leaves: Sequence[Leaf], *, data: Path, cache: Path) -> Availability:
    questions, places, missing = 0, {}, {}
    for leaf in leaves:
        source = find_source(leaf.dataset, leaf.configuration, data=data, cache=cache)
        if source is None:
            missing.setdefault(leaf.dataset, []).append(leaf.configuration)
        else:
            place = Path(source.place)
            places[str(place.relative_to(data) if place.is_relative_to(data) else place)] = None
            questions += source.rows(leaf.split)
    if not missing:
        return Availability(name, questions, ", ".join(places))
    files = [name_files(dataset) for dataset in missing]
    lacking = sum(map(len, missing.values()))
    part = f"{lacking} of {len(leaves)} subjects: " if lacking < len(leaves) else ""
    return Availability(name, None, part + "; ".join(file for file, _ in files), on_hub=any(hub for _, hub in files))


def fetch(names: Sequence[str], *, data: Path, cache: Path = DEFAULT_CACHE) -> Iterator[Fetched]:
    """Fetch each dataset of the tasks with the datasets client into `data`; existing ones are kept.

    A dataset becomes `DATASET/CONFIGURATION/SPLIT.parquet`, renamed into place when complete. The client itself reads
    HF_ENDPOINT, HF_HOME and a token.

    Raises:
      UserError: a name is unknown, the client is configured as offline, or the hub cannot be reached.
    """
    catalog = Catalog()
    _check(names, catalog)
    wanted = dict.fromkeys((leaf.dataset, leaf.configuration) for name in names for leaf in catalog.leaves(name))
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(switch, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise UserError(f"{switch}={os.environ[switch]} keeps the datasets client offline; fetch needs a network: "
                            f"unset it, or put files into {data} by hand (python launch.py evaluate list says which)")
    for dataset, configuration in wanted:
        files, on_hub = name_files(dataset)
        source = find_source(dataset, configuration, data=data, cache=cache)
        if source is not None and not source.kind.startswith("cache"):
            yield Fetched(dataset, configuration, 0, f"here already: {source.place}")
        elif not on_hub:
            yield Fetched(dataset, configuration, None, f"the hub does not have it; put {files} into {data}")
        else:
            yield _fetch_one(dataset, configuration, data)


def _fetch_one(dataset: str, configuration: str | None, data: Path) -> Fetched:
    import datasets

    target = data / dataset / (configuration or "default")
    try:
        splits = datasets.load_dataset(dataset, configuration)
    except ConnectionError as error:  # the client has retried for half a minute, so the next dataset would fail, too
        raise UserError(f"{endpoint()} cannot be reached for {dataset}: {error}; HF_ENDPOINT names a mirror, and "
                        f"python launch.py evaluate list the files that can be put into {data} by hand") from error
    except Exception as error:  # other errors of the client and the hub
        lines = str(error).strip().splitlines()
        return Fetched(dataset, configuration, None, f"{type(error).__name__}: {lines[0] if lines else ''}")
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.parent / f".half-{secrets.token_hex(4)}"
    half.mkdir()
    try:
        for split, rows in splits.items():
            rows.to_parquet(str(half / f"{split}.parquet"))
        half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return Fetched(dataset, configuration, sum(rows.num_rows for rows in splits.values()), str(target))


def endpoint() -> str:
    """The hub that the datasets client asks."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _check(names: Sequence[str], catalog: Catalog) -> None:
    problems = [problem for name in names if (problem := catalog.unknown(name))]
    if problems:
        raise UserError("; ".join(problems))
