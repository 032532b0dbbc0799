"""The run of every stage: `prepare_run` builds everything up to the first step, `Run.train` runs the loop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ctllm_jax import sharding
from ctllm_jax.cluster.agreement import open_same
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import to_yaml
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.batch import Batch, Preference
from ctllm_jax.huggingface.tokenizer import keep_settings
from ctllm_jax.model.decoder import Decoder, init_table
from ctllm_jax.model.lora import attach, lora_parameters
from ctllm_jax.model.parameters import decoder_parameters
from ctllm_jax.storage import copy_file, is_remote
from ctllm_jax.training.checkpoints import checkpoint as checkpoints
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer
from ctllm_jax.training.checkpoints.fingerprint import compare_fingerprints, make_fingerprint
from ctllm_jax.training.environment import choose_implementations, describe_environment, warn_of_processors
from ctllm_jax.training.extension import describe_jump
from ctllm_jax.training.loop import Hook, run_loop
from ctllm_jax.training.lora import abstract_base, with_adapters
from ctllm_jax.training.objective import Objective, Opened, next_tokens
from ctllm_jax.training.optimizer import make_optimizer, make_schedule
from ctllm_jax.training.state import State, init_state, like_params
from ctllm_jax.training.step import make_train_step, plan_accumulation
from ctllm_jax.training.supervision.goodput import Ledger
from ctllm_jax.training.supervision.recovery import Recovery, Rollback, restore_state

log = logging.getLogger(__name__)


def make_decoder(config: PretrainConfig, mesh: jax.sharding.Mesh | None = None) -> Decoder:
    """The decoder as the config computes it; with a mesh for batches that its batch axes divide, without for any."""
    decoder = Decoder(config.model, dtype=jnp.dtype(config.compute.dtype),
                      attention=sharding.attention_on(mesh, implementation=config.compute.attention),
                      swiglu=sharding.swiglu_on(mesh, implementation=config.compute.swiglu,
                                                recompute=config.compute.remat == "none",
                                                rings=config.compute.gradient_rings),
                      scan_layers=config.compute.scan_layers, remat=config.compute.remat)
    if mesh is None or mesh.size == 1:
        return decoder
    constrain = partial(jax.lax.with_sharding_constraint,
                        shardings=NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES)))
    return decoder.clone(constrain=constrain,
                         project=partial(sharding.project, mesh=mesh, rings=config.compute.gradient_rings,
                                         keep=config.compute.remat in ("attention", "block")),
                         embed=partial(sharding.embed_tokens, mesh=mesh, dtype=jnp.dtype(config.compute.dtype)))


@dataclass
class Run:
    """A run, ready for its first step.

    Attributes:
      frozen: the base's weights under LoRA, whose adapters are the state's; None where the state has all weights.
      abstract_state: what a checkpoint is restored as.
      recovery: what goes back to one when steps stay bad; None: nothing does.
    """

    config: PretrainConfig
    directory: Path
    mesh: jax.sharding.Mesh
    decoder: Decoder
    data: Any
    state: State
    how: str
    train_step: Callable
    checkpointer: Checkpointer
    micro_rows: int
    accumulation: int
    compile_seconds: float
    start: int
    objective: Objective
    frozen: Any = None
    abstract_state: State | None = None
    recovery: Recovery | None = None

    def weights(self, state: State) -> Any:
        """The parameters of a state as the decoder takes them."""
        return state.params if self.frozen is None else attach(self.frozen, state.params, scale=self.config.lora.scale)

    @property
    def prefix_id(self) -> int | None:
        """The id that preceded documents in training: the end of the one before, unless documents were isolated."""
        return find_prefix_id(self.config, self.data.eod_id)

    def batches(self) -> Iterator[Batch]:
        """Global batches on the devices, from the state's data step on."""
        config = self.config.batch
        rows = sharding.local_rows(self.mesh, config.rows)
        place = partial(place_batch, sharding=sharding.batch_sharding(self.mesh), rows=config.rows)
        for batch in self.data.iterate(int(self.state.data_step), local_rows=rows):
            yield place(batch)

    def train(self, *, record: Callable, hooks: Sequence[Hook], stop_due: Callable[[int], bool] = lambda step: False,
              ledger: Ledger | None = None, dispatched: Callable[[int, Any], None] = lambda step, metrics: None,
              rolled_back: Callable[[Rollback], None] = lambda rollback: None) -> int:
        """Go on to the last step, or until `stop_due`; returns the step reached, which is kept either way.

        Raises:
          Diverged: steps stay bad, and there is nothing left to go back to.
        """
        ledger, recovery = ledger or Ledger(), self.recovery
        judge = recovery.judge if recovery is not None and recovery.watches else None
        try:
            while True:
                begun, batches = int(self.state.data_step), self.batches()
                try:
                    with ledger.phase("step"):
                        self.state = run_loop(
                            self.state, self.train_step, batches, start=self.start, stop=self.config.steps,
                            log_every=self.config.log.every, record=record, hooks=hooks, frozen=self.frozen,
                            stop_due=stop_due, judge=judge, ledger=ledger, dispatched=dispatched)
                finally:
                    batches.close()
                if judge is None or not recovery.due:
                    break
                with ledger.phase("rollback"):
                    self.state = None  # the one that takes its place needs its memory
                    rollback, self.state, self.checkpointer = recovery.go_back(
                        self.checkpointer, self.abstract_state, data_step=begun + recovery.at - self.start)
                    self.start = rollback.to
                    rolled_back(rollback)
            step = int(self.state.step)
            with ledger.phase("checkpoint"):
                self.checkpointer.save(self.state, step=step, last=True)
        finally:
            with ledger.phase("checkpoint"):
                self.checkpointer.close()
        return step


def place_batch(batch: Batch, *, sharding: NamedSharding, rows: int) -> Batch:
    """This process's rows of a batch as part of the global arrays [rows, S]."""
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), (rows, *x.shape[1:])), batch)


class StepPlan(NamedTuple):
    """A train step and what it is compiled for: nothing here lies on a device.

    Attributes:
      jitted: `(state, batch, frozen) -> (state, metrics)`, the state donated.
      init: `key -> state`, jitted straight to the mesh.
      abstract_state, abstract_batch: shapes, dtypes and shardings.
      abstract_frozen: of the base under LoRA; None where all weights are trained.
      micro_rows, accumulation: rows a device computes at once, and how often.
    """

    jitted: Any
    init: Any
    abstract_state: State
    abstract_batch: Batch
    abstract_frozen: Any
    micro_rows: int
    accumulation: int

    @property
    def abstract_model(self) -> Any:
        """What a whole model is loaded as, to be trained or to stay as it is."""
        return self.abstract_state.params if self.abstract_frozen is None else self.abstract_frozen

    def compile(self, options: dict[str, Any] | None = None) -> Callable:
        """The step for the mesh that it was planned on, which may be of devices that are not here.

        `options` are flags of XLA for this program alone, where the environment's are for other devices.
        """
        lowered = self.jitted.lower(self.abstract_state, self.abstract_batch, self.abstract_frozen)
        return lowered.compile(compiler_options=options)


def plan_step(config: PretrainConfig, mesh: jax.sharding.Mesh, *, objective: Objective | None = None) -> StepPlan:
    """The train step of a config on a mesh. Without an objective it is next-token cross-entropy.

    Raises:
      UserError: a batch or a parameter that the mesh does not divide, an optimizer rule that decides for nothing,
        something that LoRA cannot adapt.
    """
    objective = objective or next_tokens()
    parts = sharding.axis_size(mesh, sharding.BATCH_AXES)
    micro_rows, accumulation = plan_accumulation(config.batch.rows, devices=parts,
                                                 rows_per_device=config.batch.rows_per_device)
    table, frozen = decoder_parameters(config.model), None
    if config.lora is not None:
        frozen = abstract_base(config, sharding.param_shardings(table, mesh))
        table = lora_parameters(config.model, config.lora)
    shardings = sharding.param_shardings(table, mesh)
    abstract_params = jax.eval_shape(partial(init_table, table), jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, abstract_params)

    spikes = config.bad_steps.spikes if config.bad_steps.spikes.deviations is not None else None

    def init(key: jax.Array) -> State:
        return init_state(init_table(table, key), optimizer, spikes=spikes is not None)

    abstract = jax.eval_shape(init, jax.random.key(0))
    replicated, batch_sharding = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    state_shardings = like_params(abstract, abstract_params, shardings, replicated)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, state_shardings)
    loss_fn = objective.make_loss_fn(config, make_decoder(config, mesh), mesh)
    if config.lora is not None:
        loss_fn = with_adapters(loss_fn, scale=config.lora.scale)
    train_step = make_train_step(
        loss_fn, optimizer, make_schedule(config.optimizer, steps=config.steps), accumulation=accumulation,
        constrain_grads=partial(jax.lax.with_sharding_constraint, shardings=shardings), spikes=spikes,
        branches=mesh.devices.flat[0].platform not in ("gpu", "cuda", "rocm"))
    shape = (config.batch.rows, config.batch.sequence_length)
    batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
                    for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
    if objective.num_segments:
        shape = (config.batch.rows, objective.num_segments)
        batch = batch._replace(preference=Preference(*(jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
                                                       for dtype in (jnp.int32, jnp.bool_, jnp.int32, jnp.float32))))
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, replicated))
    return StepPlan(jitted, jax.jit(init, out_shardings=state_shardings), abstract, batch, frozen, micro_rows,
                    accumulation)


def prepare_run(opened: Opened, *, directory: Path, stage: Callable[[str], None] = log.info,
                ledger: Ledger | None = None) -> Run:
    """Everything from open data to the first step: mesh, weights or checkpoint, compiled step.

    Args:
      directory: the run directory; made if absent, resumed if it holds a checkpoint.
      stage: called with a line that says what is being done.
      ledger: receives the time to compile.

    Raises:
      UserError: whatever in the config, data or checkpoint does not fit, before the model is compiled.
    """
    config, data, objective, meta, _ = opened
    choose_implementations(config)
    mesh = sharding.make_mesh(config.mesh.model_dump())
    if jax.default_backend() == "cpu" and config.compute.remat != "none" and not config.compute.scan_layers:
        log.warning("compute.remat=%s saves no memory here: XLA's CPU compiler merges the recomputation of unrolled"
                    " blocks away; compute.scan_layers=true keeps it", config.compute.remat)
    plan = plan_step(config, mesh, objective=objective)
    if not is_remote(directory):
        directory.mkdir(parents=True, exist_ok=True)
    fingerprint = make_fingerprint(config, data.fingerprint)
    checkpointer = Checkpointer(
        directory, config.checkpoint, tokens_per_step=config.batch.tokens, tokens_at=data.tokens_at,
        meta={"fingerprint": fingerprint, "steps": config.steps, "eod_id": data.eod_id,
              "prefix_id": find_prefix_id(config, data.eod_id),
              "spikes": config.bad_steps.spikes.deviations is not None,
              **({} if config.lora is None else {"lora": config.lora.model_dump(mode="json")}), **meta})
    # Where a run begins: its own newest checkpoint, else the weights it was told to take, else random ones.
    newest, base, known = checkpointer.latest(), None, {}
    if newest is not None:
        how = "resume"
        known = checkpointer.read_meta(newest)
        compare_fingerprints(known["fingerprint"], fingerprint, schema=type(config), run_dir=directory)
        if newest > config.steps:
            raise UserError(f"steps={config.steps}: {directory} is at step {newest} already")
        warn_of_processors(directory)
        if jax.process_index() == 0 and (jump := describe_jump(config, run_dir=directory, step=newest,
                                                               before=known.get("steps", config.steps))):
            checkpointer.warn(jump)
        stage(f"resuming {directory} at step {newest}")
        state = restore_state(checkpointer, plan.abstract_state, step=newest)
        checkpointer.meta["init"] = origin = known.get("init")
        if config.lora is not None:
            base = checkpoints.find_base(origin, run_dir=directory, model=config.init)
    else:
        how = "init" if config.init else "scratch"
        state = plan.init(jax.random.key(config.seed))
        if config.init:
            base = open_same(lambda: checkpoints.find_checkpoint(config.init)[1], checkpoints.identify_model,
                             what="weights to start from")
            checkpointer.meta["init"] = checkpoints.describe_origin(base, run_dir=directory)
    # The ids that end a text, and how it is drawn, belong to the weights.
    inherited = known or ({} if base is None else base.meta)
    checkpointer.meta |= {name: inherited[name] for name in ("stop_ids", "generation") if name in inherited}
    frozen = None
    if base is not None:
        stage(f"taking the weights of {base.run_dir} at step {base.step}")
        weights = checkpoints.load_params(base, plan.abstract_model)
        if config.lora is None:
            state = state.replace(params=weights)
        else:
            frozen = weights
    _write_run_files(config, directory, data.tokenizer_path, template=meta.get("template"))
    stage("compiling the train step")
    began = time.perf_counter()
    with (ledger or Ledger()).phase("compile"):
        compiled = plan.compile()
    recovery = Recovery(config.bad_steps, meta=checkpointer.meta, known=known.get("recovery"))
    return Run(config, directory, mesh, make_decoder(config, mesh), data, state, how, compiled, checkpointer,
               plan.micro_rows, plan.accumulation, time.perf_counter() - began, int(state.step),
               objective, frozen=frozen, abstract_state=plan.abstract_state, recovery=recovery)


def find_prefix_id(config: PretrainConfig, eod_id: int | None) -> int | None:
    """The id that precedes a document in training, where attention can see it."""
    return None if config.isolated else eod_id


def _write_run_files(config: PretrainConfig, directory: Path, tokenizer: Path | None, *,
                     template: dict[str, Any] | None) -> None:
    if jax.process_index() != 0:
        return
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (directory / "environment.json").write_text(json.dumps(describe_environment(config), indent=1), encoding="utf-8")
    if tokenizer is not None:
        target = directory / ("tokenizer" + tokenizer.suffix)
        if not target.exists() or target.read_bytes() != tokenizer.read_bytes():
            copy_file(tokenizer, target)
        keep_settings(directory, tokenizer=tokenizer, template=template and template["config"]["path"])
