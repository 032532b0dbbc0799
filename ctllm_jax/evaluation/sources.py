"""Find the questions of a dataset on this machine, and read them without a network."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.evaluation.archives import convert, find_official

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_SPLIT_FILE = re.compile(r"(?P<split>[A-Za-z_]+)(-\d+-of-\d+)?\.parquet")
_CACHED_SPLIT = re.compile(r".+-(?P<split>[A-Za-z_]+)(-\d+-of-\d+)?\.arrow")


@dataclass(frozen=True)
class Source:
    """A dataset on this machine. Calling it returns its splits, as lm-eval's `custom_dataset` requires."""

    dataset: str
    configuration: str | None
    kind: str
    """`official file`, `folder` or `cache of the datasets client`."""
    place: str
    """The file or folder that a user put there."""
    folder: str
    """The folder to read: `place`, or the converted files."""

    def __call__(self, **_: Any) -> DatasetDict:
        """Return every split. lm-eval passes a task's metadata, which is ignored."""
        from datasets import Dataset, DatasetDict

        files = self._files()
        if not files:
            return _load_with_client(Path(self.folder), self.configuration)
        return DatasetDict({split: _read(Dataset, paths) for split, paths in files.items()})

    def rows(self, split: str) -> int:
        """Number of rows of a split, from the files' footers if they have them.

        Raises:
          UserError: there is no such split.
        """
        files = self._files().get(split)
        if files and all(path.suffix == ".parquet" for path in files):
            from pyarrow import parquet

            return sum(parquet.read_metadata(path).num_rows for path in files)
        splits = self()
        if split not in splits:
            raise UserError(f"{self.place}: no split {split}, which the task asks; there are {', '.join(splits)}")
        return splits[split].num_rows

    @property
    def has_split_files(self) -> bool:
        """Whether there is `CONFIGURATION/SPLIT.parquet` to read, without the datasets client."""
        return bool(self._files())

    def _files(self) -> dict[str, list[Path]]:
        """Files of each split; empty for a layout that the datasets client reads."""
        pattern = _CACHED_SPLIT if self.kind.startswith("cache") else _SPLIT_FILE
        folder = Path(self.folder)
        if not self.kind.startswith("cache"):
            folder = folder / (self.configuration or "default")
        found: dict[str, list[Path]] = {}
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            if match := pattern.fullmatch(path.name):
                found.setdefault(match["split"], []).append(path)
        return found


def find_source(dataset: str, configuration: str | None, *, data: Path, cache: Path) -> Source | None:
    """Find a dataset: a folder of its name below `data`, its official file there, or the client's cache.

    Args:
      dataset: name on the hub, such as `cais/mmlu`.
      configuration: of the dataset, such as `anatomy`.
      data: directory that the user fills.
      cache: directory where official files are kept once converted.

    Raises:
      UserError: an official file is there, but is not in its layout.
    """
    for folder in _folders(dataset, data):
        source = Source(dataset, configuration, "folder", str(folder), str(folder))
        if source.has_split_files or _is_for_client(folder):
            return source
    official = find_official(dataset)
    for file in (data / name for name in official.names) if official else ():
        if file.is_file():
            return Source(dataset, configuration, "official file", str(file), str(convert(official, file, cache=cache)))
    if (prepared := _client_cache(dataset, configuration)) is not None:
        return Source(dataset, configuration, "cache of the datasets client", str(prepared), str(prepared))
    return None


def name_files(dataset: str) -> tuple[str, bool]:
    """Description of the files that the folder of questions needs for a dataset; and whether the hub has it, too."""
    official = find_official(dataset)
    if official is None:
        return f"folder {dataset}", True
    file = f"{official.names[0]} ({official.origin})"
    return (f"{file}, or folder {dataset}", True) if official.on_hub else (file, False)


def _folders(dataset: str, data: Path) -> Iterator[Path]:
    """Folders of a dataset's name: `OWNER/NAME`, or a snapshot in the hub's own layout."""
    if (data / dataset).is_dir():
        yield data / dataset
    snapshots = data / f"datasets--{dataset.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir():
        main = snapshots.parent / "refs" / "main"
        named = [snapshots / main.read_text().strip()] if main.is_file() else []
        yield from (path for path in (*named, *sorted(snapshots.iterdir())) if path.is_dir())


def _is_for_client(folder: Path) -> bool:
    """Whether a folder contains more than fetched configurations, which hold only their own questions."""
    return (folder / "data").is_dir() or any(child.is_file() for child in folder.iterdir())


def _client_cache(dataset: str, configuration: str | None) -> Path | None:
    """Data that the datasets client prepared earlier: `OWNER___NAME/CONFIGURATION/VERSION/HASH`."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    root = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    found = sorted((root / dataset.replace("/", "___") / (configuration or "default")).glob("*/*/dataset_info.json"),
                   key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def _read(dataset_class: type[Dataset], paths: list[Path]) -> Dataset:
    from datasets import concatenate_datasets
    from pyarrow import parquet

    def read_one(path: Path) -> Dataset:
        if path.suffix == ".arrow":
            return dataset_class.from_file(str(path))
        return dataset_class(parquet.read_table(path))

    parts = [read_one(path) for path in paths]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _load_with_client(folder: Path, configuration: str | None) -> DatasetDict:
    """A folder in a layout of the datasets client (a snapshot with its README, CSV or JSONL files)."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    try:
        return datasets.load_dataset(str(folder), configuration)
    except Exception as error:  # the client raises what its readers raise
        raise UserError(f"{folder}: the datasets client cannot read this folder"
                        f"{f' (configuration {configuration})' if configuration else ''}: {error}") from error
