"""Some steps of a stage's loss over its own data, on any mesh and split into any micro-batches."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from ctllm_jax import sharding
from ctllm_jax.model.parameters import decoder_parameters
from ctllm_jax.training.optimizer import make_optimizer, make_schedule
from ctllm_jax.training.run import make_decoder, place_batch
from ctllm_jax.training.state import init_state, like_params
from ctllm_jax.training.step import make_train_step

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
# (data, fsdp, tensor) and micro-batches: each axis alone and all together; 1 x 8 and 4 x 2.
SPLITS = [((8, 1, 1), 1), ((1, 8, 1), 1), ((1, 1, 2), 1), ((2, 2, 2), 1), ((1, 1, 1), 8), ((4, 1, 1), 2)]


class Steps(NamedTuple):
    """Metrics of each step, the weights behind the last, and Adam's first moment behind the first: a tenth of the
    gradient, clipped."""

    history: list
    params: Any
    moment: Any


def take_steps(config, data, params, make_loss_fn, *, mesh_sizes=ONE, accumulation=1, steps=2):
    """`Steps` of `make_loss_fn(config, decoder, mesh)` over the first batches of `data`."""
    mesh = sharding.make_mesh(mesh_sizes, jax.devices()[:int(np.prod(list(mesh_sizes.values())))])
    shardings = sharding.param_shardings(decoder_parameters(config.model), mesh)
    placed = jax.device_put(params, shardings)
    optimizer = make_optimizer(config.optimizer, placed)
    state, layout = place_state(placed, optimizer, shardings=shardings, mesh=mesh)
    step = jax.jit(make_train_step(
        make_loss_fn(config, make_decoder(config, mesh), mesh), optimizer,
        make_schedule(config.optimizer, steps=config.steps), accumulation=accumulation,
        constrain_grads=partial(jax.lax.with_sharding_constraint, shardings=shardings)), out_shardings=layout)
    history, moment, rows = [], None, config.batch.rows
    for _, batch in zip(range(steps), data.iterate(0, local_rows=range(rows)), strict=False):
        batch = place_batch(batch, sharding=sharding.batch_sharding(mesh), rows=rows)
        state, metrics = step(state, batch, None)
        history.append({name: float(value) for name, value in metrics.items()})
        if moment is None:
            moment = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    return Steps(history, jax.device_get(state.params), moment)


def place_state(params, optimizer, *, shardings, mesh):
    """The state of step 0, laid out as in a run, and the layout of a step's results: the step compiles only once."""
    state, replicated = init_state(params, optimizer), sharding.replicated(mesh)
    layout = like_params(state, params, shardings, replicated)
    return jax.device_put(state, layout), (layout, replicated)


def on_mesh(sizes):
    """The sizes of a mesh by axis."""
    return dict(zip(sharding.AXES[-len(sizes):], sizes, strict=True))


def assert_same(ours, other):
    """Every metric of every step, and the first gradient, to 1e-5."""
    for mine, theirs in zip(ours.history, other.history, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert_same_gradients(ours.moment, other.moment)
    for mine, theirs in zip(jax.tree.leaves(ours.params), jax.tree.leaves(other.params), strict=True):
        # Adam divides by the root of a tiny second moment in the first steps: 1e-5 of the step, not of the weight.
        np.testing.assert_allclose(mine, theirs, atol=2e-4, rtol=1e-4)


def assert_same_gradients(ours, other):
    """To 1e-5 of the largest of each parameter."""
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
        highest = np.abs(theirs).max()
        assert highest > 0
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * highest)
