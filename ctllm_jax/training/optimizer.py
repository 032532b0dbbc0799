"""AdamW from Optax, its schedule, and exceptions by parameter path."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.pretrain import OptimizerConfig


@dataclass(frozen=True)
class Treatment:
    """How one parameter is trained, and the rule that applies to it (None: the defaults)."""

    lr_multiplier: float
    decayed: bool
    rule: str | None


def make_schedule(config: OptimizerConfig, *, steps: int) -> Callable[[jax.Array], jax.Array]:
    """`step -> learning rate`, float32, where `step` counts the updates already made.

    The first update has lr / warmup_steps, update number `warmup_steps` has the full lr, and the last one min_lr.
    """
    warmup = config.warmup_steps
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, rest, alpha=config.min_lr / config.lr)
    elif config.schedule == "wsd":
        falling = min(config.decay_steps or max(steps // 10, 1), rest)
        after = optax.join_schedules(
            [optax.constant_schedule(config.lr), optax.linear_schedule(config.lr, config.min_lr, falling)],
            [rest - falling])
    else:
        after = optax.constant_schedule(config.lr)
    joined = after
    if warmup:
        joined = optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), after], [warmup])
    # The linear decay may end a rounding error below zero.
    return lambda step: jnp.maximum(jnp.asarray(joined(step + 1), jnp.float32), 0.0)


def path_name(path: tuple[Any, ...]) -> str:
    """A parameter's path in a pytree, in the form used by rules: `blocks/query`."""
    return "/".join(str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part)))) for part in path)


def is_matrix(name: str, ndim: int) -> bool:
    """Whether a parameter is neither a norm's scale nor a bias; the stacked layer dim does not count."""
    return ndim - name.startswith("blocks/") >= 2 and not name.endswith("_bias")


def assign_rules(config: OptimizerConfig, params: Any) -> dict[str, Treatment]:
    """Return how each parameter is trained, by path. `params` may be abstract.

    By default weight decay applies to parameters of two or more dims; the stacked layer dim does not count.

    Raises:
      UserError: a rule applies to no parameter.
    """
    treatments, used = {}, set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        decayed = is_matrix(name, leaf.ndim)
        treatment = Treatment(1.0, decayed, None)
        for rule in config.rules:
            if re.search(rule.pattern, name):
                decay = decayed if rule.weight_decay is None else rule.weight_decay
                treatment = Treatment(rule.lr_multiplier, decay, rule.pattern)
                used.add(rule.pattern)
                break
        treatments[name] = treatment
    for rule in config.rules:
        if rule.pattern not in used:
            raise UserError(f"optimizer.rules: pattern {rule.pattern!r} decides for no parameter (the first match"
                            f" counts); the paths are {', '.join(treatments)}")
    return treatments


def make_optimizer(config: OptimizerConfig, params: Any) -> optax.GradientTransformation:
    """AdamW without its learning rate: the update's direction, with weight decay and clipping (arXiv 1711.05101).

    The train step multiplies it by `-schedule(state.step)`, so that only the state's step counter matters.
    """
    treatments = assign_rules(config, params)
    decayed = jax.tree_util.tree_map_with_path(lambda path, _: treatments[path_name(path)].decayed, params)
    factors = jax.tree_util.tree_map_with_path(lambda path, _: treatments[path_name(path)].lr_multiplier, params)
    parts = [_clip(config.clip_norm)] if config.clip_norm is not None else []
    parts += [optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
              optax.add_decayed_weights(config.weight_decay, mask=decayed)]
    if any(factor != 1.0 for factor in jax.tree.leaves(factors)):
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: u * factor, updates, factors)))
    return optax.chain(*parts)


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` with a given norm; inside a conditional, the norm would be reduced over devices
    again."""
    def update(grads: Any, state: Any, params: Any = None, *, grad_norm: jax.Array | None = None,
               **others: Any) -> tuple[Any, Any]:
        del params, others
        norm = optax.tree.norm(grads) if grad_norm is None else grad_norm
        return jax.tree.map(lambda grad: jnp.where(norm < most, grad, grad / norm * most), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def describe_rules(config: OptimizerConfig, params: Any) -> list[tuple[str, str, str, str]]:
    """Table rows (paths, learning rate, weight decay, rule); parameters with equal settings share a row."""
    groups: dict[Treatment, list[str]] = {}
    for name, treatment in assign_rules(config, params).items():
        groups.setdefault(treatment, []).append(name)
    return [(", ".join(names), f"x {treatment.lr_multiplier:g}",
             f"{config.weight_decay:g}" if treatment.decayed else "none", treatment.rule or "default")
            for treatment, names in groups.items()]
