"""The checks of `launch.py doctor` that look at the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.stages import STAGES
from ctllm_jax.preflight.findings import FAIL, OK, WARN, Finding, Subject


def check_dataset(subject: Subject) -> list[Finding]:
    """Every source: there, whole by its sizes, of one tokenizer, of a sequence length that fits. In its own process."""
    config = subject.config
    if config is None:
        return []
    if getattr(config.data, "kind", "") == "synthetic":
        return [Finding("dataset", OK, "synthetic tokens")]
    missing = [(name, source.path) for name, source in config.data.sources.items() if not Path(source.path).exists()]
    if missing:
        shown = ", ".join(f"{name}={path}" for name, path in missing)
        return [Finding("dataset", FAIL, f"not there: {shown}", "data.sources.NAME.path=DIR, mounted on every machine")]
    if not STAGES[subject.stage].plans_without_data:
        return [Finding("dataset", OK, f"{len(config.data.sources)} sources are there; {subject.stage} … --dry-run "
                                       "reads them")]
    from ctllm_jax.dataset.manifest import find_dataset

    folders = {name: find_dataset(source.path) for name, source in config.data.sources.items()}
    text = [name for name, folder in folders.items() if folder is None]
    if text:
        if config.data.tokenizer is None:
            return [Finding("dataset", FAIL, f"still text: {', '.join(text)}, and no data.tokenizer",
                            "data.tokenizer=FILE, or python launch.py prepare")]
        return [Finding("dataset", WARN, f"still text: {', '.join(text)}, tokenized at the start of the run",
                        "python launch.py prepare input=… makes it once for all")]
    return _check_folders(subject, folders)


def _check_folders(subject: Subject, folders: dict[str, Any]) -> list[Finding]:
    from ctllm_jax.data.pretrain import open_training_data
    from ctllm_jax.dataset.manifest import read_manifest

    config = subject.config
    damaged = []
    for folder in folders.values():
        for split in read_manifest(folder).splits.values():
            for shard in split.shards:
                path = folder / shard.file
                if not path.exists() or path.stat().st_size != shard.size:
                    damaged.append(str(path))
    if damaged:
        return [Finding("dataset", FAIL, f"missing or of another size: {', '.join(damaged[:3])}"
                        + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""),
                        "copy it again; python launch.py data verify DIR checks every record")]
    try:
        data = open_training_data(config.data, sequence_length=config.batch.sequence_length, rows=config.batch.rows,
                                  seed=config.seed, vocab_size=config.model.vocab_size)
        epochs = data.epochs(config.steps)
    except UserError as error:
        return [Finding("dataset", FAIL, str(error), _dataset_fix(str(error)))]
    shown = ", ".join(f"{name} {passes:.2f} epochs" for name, passes in epochs.items())
    return [Finding("dataset", OK, f"{len(folders)} sources, tokenizer {data.tokenizer_path.name}: {shown}")]


def _dataset_fix(message: str) -> str:
    if "tokenizer" in message and "vocab_size" not in message:
        return "prepare the sources with one tokenizer: python launch.py prepare … tokenizer=FILE, and name that one"
    if "record_tokens" in message:
        return "choose batch.sequence_length so that one divides the other"
    if "vocab_size" in message:
        return "set model.vocab_size to what the message asks for"
    return "as the message says"


def check_tokenizer(subject: Subject) -> list[Finding]:
    """The tokenizer of the config, if it names one."""
    path = None if subject.config is None else subject.config.data.tokenizer if hasattr(
        subject.config.data, "tokenizer") else None
    if path is None:
        return []
    from ctllm_jax.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        return [Finding("tokenizer", FAIL, str(error), "data.tokenizer=FILE: a SentencePiece .model or tokenizer.json")]
    model = subject.config.model
    if model is not None and tokenizer.vocab_size > model.vocab_size:
        return [Finding("tokenizer", FAIL, f"{path} has {tokenizer.vocab_size:,} ids, model.vocab_size="
                        f"{model.vocab_size:,}", f"model.vocab_size={tokenizer.vocab_size}")]
    return [Finding("tokenizer", OK, f"{path}: {tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256[:12]}")]
