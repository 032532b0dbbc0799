"""The train step of all stages, which differ only in their loss function.

Legend: B rows of the global batch, S sequence, A micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.reliability import SpikesConfig
from ctllm_jax.training.guard import judge_step
from ctllm_jax.training.state import State

LossFn = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
"""`(params, frozen, batch) -> (sum of loss, sum of weight, {name: sum})`; sums add up over micro-batches and
devices."""
STEP_METRICS = frozenset(("loss", "weight", "grad_norm", "lr", "skipped", "bad_steps", "spikes"))
"""Names of the metrics that the step itself makes; no sum of a loss function may have one of them."""


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: Callable, *,
                    accumulation: int = 1, constrain_grads: Callable = lambda grads: grads,
                    spikes: SpikesConfig | None = None, branches: bool = True) -> Callable:
    """`train_step(state, batch, frozen) -> (state, metrics)`: a pure function, to be jitted with the state donated.

    Args:
      loss_fn: the stage's loss; only `params` is differentiated.
      optimizer: computes the update's direction (`training.optimizer`).
      schedule: `step -> learning rate`.
      accumulation: micro-batches A; must divide the batch's rows.
      constrain_grads: applies the parameters' sharding to the gradients.
      spikes: the criterion of a spike, if the state has `Spikes`.
      branches: skip an update by a conditional instead of a select. On TPU, XLA needs temporaries for a select (16.9 MB
        instead of 11.2 MB in the step of tests/training/test_aot.py; 11.4 MB for a conditional). On a GPU, the host
        evaluates a conditional, and waits for the gradients.

    If loss or gradient norm is not finite, or is a spike, parameters and optimizer state keep their bits, while `step`
    and `data_step` advance. Devices communicate only the norm for this, which clipping needs anyway.

    Metrics: `loss` (mean over the weights of the whole batch), `weight`, `grad_norm` (before clipping), `lr`, each sum
    of the loss function, float32 scalars; `skipped` and the counts of `judge_step`, int32.
    """
    def value_and_sums(params, frozen, batch):
        loss, weight, sums = loss_fn(params, frozen, batch)
        return loss, (weight, sums)

    optimizer = optax.with_extra_args_support(optimizer)
    differentiate = jax.value_and_grad(value_and_sums, has_aux=True)

    def micro_step(params, frozen, batch):
        (loss, (weight, sums)), grads = differentiate(params, frozen, batch)
        if taken := sorted(STEP_METRICS & sums.keys()):
            raise ValueError(f"the loss function returns sums named {', '.join(taken)}, as metrics of the train step"
                             " are named: give them other names")
        return constrain_grads(grads), {"loss": loss, "weight": weight, **sums}

    def train_step(state: State, batch: Any, frozen: Any = None) -> tuple[State, dict[str, jax.Array]]:
        if accumulation == 1:
            grads, sums = micro_step(state.params, frozen, batch)
        else:
            def add(total, micro_batch):
                # The barrier prevents XLA from moving the reduce-scatter of a gradient out of the loop. Without it each
                # device would hold the full sum (1 GiB for the head at CT-LLM's size), reduced by a synchronous
                # all-reduce.
                grads_and_sums = jax.lax.optimization_barrier(micro_step(state.params, frozen, micro_batch))
                return jax.tree.map(jnp.add, total, grads_and_sums), None
            micro_batches = jax.tree.map(lambda x: split_rows(x, accumulation), batch)
            shapes = jax.eval_shape(micro_step, state.params, frozen, jax.tree.map(lambda x: x[0], micro_batches))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, (constrain_grads(zeros[0]), zeros[1]), micro_batches)
        loss, weight = sums.pop("loss"), sums.pop("weight")
        scale = 1.0 / jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        lr = schedule(state.step)
        loss, grad_norm = loss * scale, optax.tree.norm(grads)
        good, bad_steps, counts = judge_step(state.bad_steps, loss, grad_norm, spikes=spikes)

        def update() -> tuple[Any, Any]:
            direction, opt_state = optimizer.update(grads, state.opt_state, state.params, grad_norm=grad_norm)
            return jax.tree.map(lambda param, update: param - lr * update, state.params, direction), opt_state

        kept = state.params, state.opt_state
        params, opt_state = jax.lax.cond(good, update, lambda: kept) if branches else jax.tree.map(
            lambda new, old: jnp.where(good, new, old), update(), kept)
        metrics = {"loss": loss, "weight": weight, "grad_norm": grad_norm, "lr": lr, **sums, **counts}
        return State(params, opt_state, state.step + 1, state.data_step + 1, bad_steps), metrics

    return train_step


def split_rows(x: jax.Array, accumulation: int) -> jax.Array:
    """[B, …] -> [A, B/A, …]: micro-batch i has the rows i, i + A, …, so that each device keeps its own rows."""
    rows = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
    return jnp.moveaxis(rows, 1, 0)


def plan_accumulation(rows: int, *, devices: int, rows_per_device: int | None) -> tuple[int, int]:
    """Return (rows that a device computes at once, micro-batches) for `rows` global rows on `devices` parts of the
    batch.

    Raises:
      UserError: the rows cannot be split over the devices.
    """
    if rows % devices:
        sizes = [size for size in (rows // devices * devices, -(-rows // devices) * devices) if size]
        fitting = " or ".join(f"{size} * batch.sequence_length" for size in sizes)
        raise UserError(f"a batch of {rows} rows cannot be split over {devices} devices (mesh.replica x mesh.data x"
                        f" mesh.fsdp): batch.tokens / batch.sequence_length must be a multiple of {devices}; set"
                        f" batch.tokens to {fitting}, or raise mesh.tensor")
    per_device = rows // devices
    most = min(rows_per_device or per_device, per_device)
    micro = next(size for size in range(most, 0, -1) if per_device % size == 0)
    return micro, per_device // micro
