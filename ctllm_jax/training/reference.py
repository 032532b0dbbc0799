"""Log-probabilities of all answers under the reference model: computed once, stored, and checked.

The weights are on the devices only for this pass, before the run's state exists, so there are never two models in
memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ctllm_jax import sharding
from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.batch import Batch, stack_rows
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.losses.preference import sequence_logps
from ctllm_jax.model.decoder import Decoder, head_weights
from ctllm_jax.training.checkpoints.checkpoint import (
    Kept,
    find_checkpoint,
    identify_model,
    list_checkpoints,
    load_params,
)
from ctllm_jax.training.checkpoints.fingerprint import compare_fingerprints, make_fingerprint
from ctllm_jax.training.objective import Objective
from ctllm_jax.training.run import make_decoder, place_batch, plan_step

FOLDER = ".reference"
"""Suffix of the folder next to the pairs that stores a file for each reference, tokenizer, template and length."""
TOLERANCE = 1e-4
"""Tolerance in nats per token, in float32; other packings and meshes differ by less than a tenth of it."""
_CHECKED = 8  # number of rows that are recomputed at each start
_MEASURED = 16  # number of pairs that are computed separately, to measure the effect of packing
logger = logging.getLogger(__name__)


def answer_logps(decoder: Decoder, params: Any, batch: Batch, *, config: DPOConfig,
                 mesh: jax.sharding.Mesh | None) -> tuple[jax.Array, jax.Array]:
    """(sum of log p, tokens) of each answer of a batch, float32 [B, M]."""
    hidden_BSD, _ = decoder.apply({"params": params}, batch.tokens, batch.segment_ids, batch.positions)
    return sequence_logps(hidden_BSD, head_weights(params), batch.targets, batch.loss_weights, batch.segment_ids,
                          num_segments=batch.preference.pair_ids.shape[1], chunk_size=config.compute.loss_chunk,
                          vocab_size=config.model.vocab_size, mesh=mesh,
                          rings=config.compute.gradient_rings)


def attach_reference(config: DPOConfig, data: PreferenceData, objective: Objective, *, directory: Path,
                     stage: Callable[[str], None] = logger.info,
                     beat: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Set the reference log-probabilities of `data`: stored ones, after some are recomputed as a check, or new ones.

    Args:
      config: with its model; `config.init` is the reference.
      directory: the run directory. A run with another reference is not resumed. The file is stored there if the folder
        of the pairs is not writable.
      stage: called with a line that says what is being done.
      beat: called for each batch, as a sign of life.

    Returns:
      A summary: `file`, `how` ("computed" or "kept"), `answers`, `tolerance` and the largest `difference` seen,
      both in nats a token.

    Raises:
      UserError: the file belongs to another reference, tokenizer, template, length or data (the message names them), is
        damaged, or contradicts the model; or the run was started with another reference.
    """
    _, checkpoint = find_checkpoint(config.init)
    identity = identify(config, data, checkpoint)
    data.reference_identity = identity["reference"]
    begun = [kept for kept in list_checkpoints(directory) if kept.kind == "resumable" and kept.meta] if _is_run(
        directory) else []
    if begun:  # before any computation
        compare_fingerprints(begun[-1].meta["fingerprint"], make_fingerprint(config, data.fingerprint),
                             schema=type(config), run_dir=directory)
    places = reference_files(config, identity, directory)
    # All processes must decide alike: a file is used only if all of them see it.
    seen = multihost_utils.process_allgather(np.array([path.exists() for path in places])).reshape(-1, len(places))
    path = next((path for path, by_all in zip(places, seen.all(axis=0), strict=True) if by_all), None)
    kept = read_reference(path, identity) if path else None
    mesh = sharding.make_mesh(config.mesh.model_dump())
    plan = plan_step(config, mesh, objective=objective)
    stage(f"taking the reference from {path}" if kept else f"computing the reference log-probabilities of {len(data)}"
          " pairs")
    params = load_params(checkpoint, plan.abstract_model)
    compute = _make_compute(config, mesh, params, rows=plan.micro_rows * sharding.axis_size(mesh, sharding.BATCH_AXES),
                            beat=beat)
    lengths = np.add.reduceat(data.answers.weights > 0, data.answers.offsets[:-1])
    rows = data.all_rows()
    draws = np.random.default_rng([config.seed, len(rows)])
    if kept is None:
        logps = _logps_of(data, compute, rows)
        alone = [[int(pair)] for pair in draws.permutation(len(data))[:_MEASURED]]
        difference = _largest_difference(data, compute, alone, logps, lengths)
        exact = jnp.dtype(config.compute.dtype) == jnp.float32
        tolerance = TOLERANCE if exact else max(TOLERANCE, 2 * difference)
        how = "computed"
    else:
        logps, tolerance = kept
        checked = [rows[place] for place in draws.permutation(len(rows))[:_CHECKED]]
        difference = _largest_difference(data, compute, checked, logps, lengths)
        how = "kept"
    if not difference <= tolerance:
        where = f"{path}: the" if path else "the"
        raise UserError(f"{where} reference log-probabilities differ by up to {difference:.2g} nats a token from those"
                        f" that init={config.init} gives now, more than {tolerance:.2g}: other weights, or a damaged"
                        " file; remove it, and they are computed anew")
    if kept is None:
        path = _write(places, logps, identity, tolerance) if jax.process_index() == 0 else places[0]
    data.reference_logps = logps
    return {"file": str(path), "how": how, "answers": len(logps), "tolerance": tolerance, "difference": difference}


def reference_files(config: DPOConfig, identity: dict[str, Any], directory: Path) -> list[Path]:
    """Possible files of the log-probabilities with this identity, in order of preference.

    Only `config.data.reference` if it is given; else a file named by a hash of `identity` in the folder NAME.reference
    next to the first source of pairs, which all runs share, or in `directory`.
    """
    if config.data.reference:
        return [Path(config.data.reference)]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16] + ".npz"
    source = Path(next(iter(config.data.sources.values())).path)
    return [source.with_name(source.name + FOLDER) / name, directory / f"reference-{name}"]


def _is_run(directory: Path) -> bool:
    return (directory / "config.yaml").is_file()


def identify(config: DPOConfig, data: PreferenceData, checkpoint: Kept) -> dict[str, Any]:
    """What the log-probabilities depend on, as JSON. The reference is identified by its step and a hash of its run."""
    # With allow_mismatch the architecture may differ from that of the checkpoint.
    other = {"model": config.model.model_dump(mode="json")} if config.allow_mismatch else {}
    return {"reference": identify_model(checkpoint), **data.identity, "dtype": config.compute.dtype, **other}


def read_reference(path: Path, identity: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Read (log-probabilities float32 [2N], tolerance in nats per token) from a file. Raises UserError as in
    `attach_reference`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            logps, found = file["logps"], json.loads(str(file["identity"]))
            tolerance = float(file["tolerance"])
    except Exception as error:  # zipfile, zlib, numpy and json each raise their own errors
        raise UserError(f"{path}: the reference log-probabilities cannot be read ({error}); remove the file, and they"
                        " are computed anew") from None
    differing = [f"{_flat(name)}: {found.get(name)} in the file, {value} now" for name, value in identity.items()
                 if found.get(name) != value]
    if differing:
        raise UserError("\n  ".join([f"{path}: the reference log-probabilities are stale:", *differing])
                        + "\nremove the file, and they are computed anew, or give another data.reference")
    return logps, tolerance


def _flat(name: str) -> str:
    return {"reference": "reference model", "tokenizer_sha256": "tokenizer", "pairs_sha256": "pairs"}.get(name, name)


def _write(places: Sequence[Path], logps: np.ndarray, identity: dict[str, Any], tolerance: float) -> Path:
    """Store them in the first of `places` that is writable, and return that path."""
    for path in places:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, logps=logps, identity=json.dumps(identity), tolerance=tolerance)
            os.replace(temporary, path)
        except OSError as error:
            if path == places[-1]:
                raise UserError(f"{path}: the reference log-probabilities cannot be written ({error})") from None
            logger.info("%s: the reference log-probabilities cannot be written there (%s)", path, error)
        else:
            return path
    raise AssertionError("no place given")


def _make_compute(config: DPOConfig, mesh: jax.sharding.Mesh, params: Any, *,
                  rows: int, beat: Callable[[], None]) -> Callable[[list[Batch]], np.ndarray]:
    """Return `rows of [S] arrays -> log p of their answers [n, M]`, which computes `rows` rows at once on all
    devices."""
    decoder = make_decoder(config, mesh).clone(remat="none")
    step = jax.jit(lambda params, batch: answer_logps(decoder, params, batch, config=config, mesh=mesh)[0],
                   out_shardings=sharding.replicated(mesh))
    local = sharding.local_rows(mesh, rows)
    place = partial(place_batch, sharding=sharding.batch_sharding(mesh), rows=rows)

    def compute(packed: list[Batch]) -> np.ndarray:
        padding = jax.tree.map(np.zeros_like, packed[0])
        found = []
        for start in range(0, len(packed), rows):
            beat()
            together = packed[start:start + rows]
            together += [padding] * (rows - len(together))
            found.append(np.asarray(step(params, place(stack_rows([together[row] for row in local])))))
        return np.concatenate(found)[:len(packed)]

    return compute


def _logps_of(data: PreferenceData, compute: Callable, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """log p float32 [2N] of the answers of the pairs of these rows; NaN for others."""
    logps = np.full(2 * len(data), np.nan, np.float32)
    found = compute([data.pack(pairs) for pairs in rows])
    for pairs, logps_M in zip(rows, found, strict=True):
        answers = [answer for pair in pairs for answer in (2 * pair, 2 * pair + 1)]
        logps[answers] = logps_M[:len(answers)]
    return logps


def _largest_difference(data: PreferenceData, compute: Callable, rows: Sequence[Sequence[int]], logps: np.ndarray,
                        lengths: np.ndarray) -> float:
    """The largest difference, in nats per token, between these log-probabilities and those computed from these rows."""
    again = _logps_of(data, compute, rows)
    differences = np.abs(again - logps)[~np.isnan(again)] / lengths[~np.isnan(again)]
    return float(differences.max())
