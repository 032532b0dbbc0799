"""Check that weights match the config, tokenizer or base that they are used with; differences are listed and
refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.model import ModelConfig
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.batch import BatchSource
from ctllm_jax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from ctllm_jax.data.vocabulary import Vocabulary
from ctllm_jax.huggingface.layout import VOCABULARY
from ctllm_jax.huggingface.model import is_huggingface, open_weights
from ctllm_jax.huggingface.tokenizer import PROBES
from ctllm_jax.storage import open_path
from ctllm_jax.training.checkpoints.checkpoint import (
    Kept,
    find_base,
    find_checkpoint,
    list_checkpoints,
    read_model_config,
)
from ctllm_jax.training.checkpoints.streaming import stream_parameters

Data = TypeVar("Data", bound=BatchSource | None)
KEY = "allow_mismatch"
_NO_FUNCTION = {"vocab_multiple", "init_std", "context_length"}
"""Fields of ModelConfig that do not affect outputs: padding, initialization, and the intended length."""
logger = logging.getLogger(__name__)


class Mismatch(UserError):
    """Two things that a command joins would compute something else together than each alone."""


def refuse(differences: Sequence[str], *, what: str, allow: bool | None) -> None:
    """`Mismatch` with these differences, or a warning with them where the key `allow_mismatch` allows them.

    `allow` is its value; None for a command without this key.
    """
    if not differences:
        return
    told = "\n  ".join([f"{what}:", *differences])
    if not allow:
        raise Mismatch(told + f"\nmake them equal, or accept the differences with {KEY}=true" * (allow is not None))
    logger.warning("%s=true: %s", KEY, told)


def model_differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """Fields that change what the same weights compute."""
    theirs, ours = there.model_dump(mode="json"), here.model_dump(mode="json")
    return [f"model.{name}: {theirs[name]} there, {value} here" for name, value in ours.items()
            if name not in _NO_FUNCTION and theirs[name] != value]


def tokenizer_differences(there: Tokenizer, here: Tokenizer) -> list[str]:
    """Differences of two tokenizers. Different files may still give the same ids, as a model and its JSON do."""
    if there.sha256 == here.sha256:
        return []
    theirs, ours = Vocabulary(there).pieces, Vocabulary(here).pieces
    ids = sorted(index for index in theirs.keys() | ours.keys() if theirs.get(index) != ours.get(index))
    if ids:
        first = ids[0]
        return [f"tokenizer: {len(ids):,} ids differ between {there.path} and {here.path}, such as {first}:"
                f" {theirs.get(first)!r} there, {ours.get(first)!r} here"]
    return [f"tokenizer: {there.path} gives {probe!r} other ids than {here.path}" for probe in PROBES
            if there.encode(probe) != here.encode(probe)][:1]


def check_origin(config: PretrainConfig, model: ModelConfig, *, tokenizer: Path | str | None,
                 eod_id: int | None = None) -> Kept:
    """Return the checkpoint that `config.init` names, after checking that `model` and tokenizer match its run.

    Args:
      tokenizer: the data's tokenizer; None: it has none.
      eod_id: id that ends a document of the data; None: it has no documents.

    Raises:
      UserError: there is no such MODEL, or it differs, unless `config.allow_mismatch`.
    """
    run_dir, kept = find_checkpoint(config.init)
    differences = model_differences(read_model_config(run_dir), model)
    found = find_tokenizer(run_dir)
    if found is not None and tokenizer is not None:
        differences += tokenizer_differences(load_tokenizer(found), load_tokenizer(tokenizer))
        ends = [kept.meta.get("eod_id"), *kept.meta.get("stop_ids", ())]
        if eod_id is not None and ends[0] is not None and eod_id not in ends:
            differences.append(f"end of a document: id {ends[0]} there, id {eod_id} here")
    refuse(differences, what=f"init={config.init} would compute something else here than in its own run",
           allow=config.allow_mismatch)
    return kept


def checked_start(config: PretrainConfig, data: Data) -> Data:
    """`data`, after `check_origin` for a pretraining run that has no checkpoint yet; one that has takes no weights."""
    directory = open_path(config.run.dir)
    if config.init and not ((directory / "config.yaml").is_file() and list_checkpoints(directory)):
        check_origin(config, config.model, tokenizer=data and data.tokenizer_path, eod_id=data and data.eod_id)
    return data


def check_base_model(kept: Kept, name: str, *, base: str | None, allow: bool) -> None:
    """Compare the base model that PEFT will load with the one that a run's adapters belong to.

    Args:
      name: a Hugging Face folder, or a name in the cache of `huggingface_hub`.
      base: MODEL that the adapters belong to, if it has moved.

    Raises:
      UserError: it is another model, or not on this machine, unless `allow`.
    """
    folder = _local_folder(name)
    what = f"base_model={name} is not known to be the model that the adapters of {kept.run_dir} belong to"
    if folder is None:
        refuse([f"{name} is neither a Hugging Face folder here nor in the cache of huggingface_hub, so that nothing can"
                " be compared: download it, or give its folder"], what=what, allow=allow)
        return
    try:
        belongs = find_base(kept.meta["init"], run_dir=kept.run_dir, model=base)
    except UserError as error:
        refuse([str(error)], what=what, allow=allow)
        return
    differences = model_differences(read_model_config(folder), read_model_config(kept.run_dir))
    if not differences:
        differences = _weight_differences(belongs, folder)
    if (tokenizer := find_tokenizer(kept.run_dir)) is not None:
        differences += tokenizer_differences(load_tokenizer(folder), load_tokenizer(tokenizer))
    refuse(differences, what=f"base_model={name} is another model than the one that the adapters of {kept.run_dir}"
                             " belong to", allow=allow)


def _local_folder(name: str) -> Path | None:
    if is_huggingface(Path(name)):
        return Path(name)
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _weight_differences(belongs: Kept, folder: Path) -> list[str]:
    """The first parameter that differs, compared in the narrower of both dtypes, because an export may have rounded
    it."""
    weights = open_weights(folder)
    for path, there in stream_parameters(belongs):
        here = weights.read(path)
        if path in VOCABULARY:  # without padding
            rows = weights.config.vocab_size
            there, here = (x[:rows] if path == "embedding" else x[:, :rows] for x in (there, here))
        dtype = here.dtype if here.dtype.itemsize <= there.dtype.itemsize else there.dtype
        if not np.array_equal(there.astype(dtype), here.astype(dtype)):
            return [f"weights: {path} differs"]
    return []
