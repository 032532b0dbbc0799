"""Losses over pairs of answers, one chosen and one rejected: DPO and its relatives, from log-probabilities of answers.

Everything here is a sum over pairs, never a mean, so that sums of micro-batches and devices add up exactly; the unit of
weight is one pair. Both answers of a pair are segments of one row.

Legend: B batch, S sequence, D hidden, V vocabulary, M segments of a row, P pairs (any shape).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar, Unpack

import jax
import jax.numpy as jnp

from ctllm_jax.losses.cross_entropy import Options, token_logps


class Answers(NamedTuple):
    """One answer of every pair: arrays of one shape P, float32.

    logps: sum of log p over the answer's tokens, nats; lengths: number of its tokens; reference_logps: the same sum
    under the reference model, not differentiated; None for losses without one.
    """

    logps: jax.Array
    lengths: jax.Array
    reference_logps: jax.Array | None = None


Values = TypeVar("Values")
Kind = Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo_sum", "ipo_token_mean", "reference_free", "simpo",
               "orpo"]


class _Kind(NamedTuple):
    reference: bool
    """Scores are ratios to a reference model. A reference must be given exactly if this is true."""
    mean: bool
    """Scores are means over an answer's tokens, not sums."""
    smoothing: bool
    """The loss supports label_smoothing."""


KINDS: dict[Kind, _Kind] = {
    "sigmoid": _Kind(reference=True, mean=False, smoothing=True),
    "sigmoid_norm": _Kind(reference=True, mean=True, smoothing=True),
    "robust": _Kind(reference=True, mean=False, smoothing=True),
    "hinge": _Kind(reference=True, mean=False, smoothing=False),
    "ipo_sum": _Kind(reference=True, mean=False, smoothing=False),
    "ipo_token_mean": _Kind(reference=True, mean=True, smoothing=False),
    "reference_free": _Kind(reference=False, mean=False, smoothing=True),
    "simpo": _Kind(reference=False, mean=True, smoothing=True),
    "orpo": _Kind(reference=False, mean=True, smoothing=False),
}
# The odds of a certain answer are infinite; we clip their logarithm at 13.8, and its slope at 1e6.
HIGHEST_MEAN_LOGP = -1e-6


def sequence_logps(hidden_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array, weights_BS: jax.Array,
                   segment_ids_BS: jax.Array, *, num_segments: int, **options: Unpack[Options]
                   ) -> tuple[jax.Array, jax.Array]:
    """Return log-probability and length of each packed answer; [B, S, V] logits are never stored.

    Args:
      hidden_BSD, head_DV, targets_BS: as for `chunked_cross_entropy`.
      weights_BS: float32; 1 where the target belongs to an answer, 0 for prompts and padding; not differentiated.
      segment_ids_BS: int32, 1..num_segments in each row, 0 for padding. Higher ids are ignored.
      num_segments: M, the largest number of segments in a row.
      options: those of `token_logps`.

    Returns:
      (sums of weights · log p [B, M], sums of weights [B, M]), float32; segment i is at index i - 1, and is 0 if the
      row has no such segment. Reverse-mode differentiable in hidden and head; no forward mode.

    Raises:
      ValueError: shapes do not match, or the mesh lacks an axis.
    """
    if segment_ids_BS.shape != targets_BS.shape or weights_BS.shape != targets_BS.shape:
        raise ValueError(f"sequence_logps: weights {weights_BS.shape} and segment_ids {segment_ids_BS.shape} must have"
                         f" the shape of targets {targets_BS.shape}")
    if targets_BS.ndim != 2 or not jnp.issubdtype(segment_ids_BS.dtype, jnp.integer) or num_segments < 0:
        raise ValueError(f"sequence_logps: targets {targets_BS.shape} must be [B, S], segment_ids"
                         f" ({segment_ids_BS.dtype.name}) integers, and num_segments={num_segments} at least 0")
    weights_BS = jax.lax.stop_gradient(weights_BS.astype(jnp.float32))
    logps_BS = token_logps(hidden_BSD, head_DV, targets_BS, **options)
    # A masked sum, because a scatter on a GPU adds in no fixed order. It needs at most B·S·M floats.
    is_mine_BSM = segment_ids_BS[:, :, None] == jnp.arange(1, num_segments + 1)[None, None]

    def sum_segments(x_BS):
        return jnp.sum(jnp.where(is_mine_BSM, x_BS[:, :, None], 0.0), axis=1)

    return sum_segments(weights_BS * logps_BS), sum_segments(weights_BS)


def pair_logps(values: Values, pair_ids_BM: jax.Array, is_chosen_BM: jax.Array) -> tuple[Values, Values, jax.Array]:
    """Return the chosen and the rejected side of each pair, at the index of its chosen segment.

    Args:
      values: an array [B, M], or a pytree of such (`Answers`).
      pair_ids_BM: int32, the same for both answers of a pair, in one row; 0 for segments that do not exist.
      is_chosen_BM: bool.

    Returns:
      (chosen, rejected, weights [B, M] float32): weight 1 where a chosen segment has exactly one rejected partner in
      its row; everywhere else weight and values are 0. Other per-segment arrays, such as groups, keep their indices.

    Raises:
      ValueError: shapes that differ.
    """
    shape = pair_ids_BM.shape
    for name, array in (("is_chosen", is_chosen_BM), *(("values", leaf) for leaf in jax.tree.leaves(values))):
        if array.shape != shape or len(shape) != 2:
            raise ValueError(f"pair_logps: {name} {array.shape} and pair_ids {shape} must both be [B, M]")
    is_chosen_BM = is_chosen_BM.astype(bool)
    # BMN: the chosen segment m and its rejected partner n.
    is_pair_BMN = ((pair_ids_BM[:, :, None] == pair_ids_BM[:, None, :]) & (pair_ids_BM > 0)[:, :, None]
                   & is_chosen_BM[:, :, None] & ~is_chosen_BM[:, None, :])
    is_valid_BM = jnp.sum(is_pair_BMN, axis=2) == 1
    is_partner_BMN = is_pair_BMN & is_valid_BM[:, :, None]
    chosen = jax.tree.map(lambda x: jnp.where(is_valid_BM, x, 0), values)
    rejected = jax.tree.map(lambda x: jnp.sum(jnp.where(is_partner_BMN, x[:, None, :], 0), axis=2), values)
    return chosen, rejected, is_valid_BM.astype(jnp.float32)


def preference_loss(chosen: Answers, rejected: Answers, *, kind: Kind, beta: float | jax.Array,
                    label_smoothing: float = 0.0, gamma: float = 0.0, sft_weight: float = 0.0,
                    weights: jax.Array | None = None, group: jax.Array | None = None, groups: Sequence[str] = ()
                    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Return the weighted sum of the pairs' losses, and sums of metrics.

    With s the score of an answer (log p, minus the reference's; `_norm`, `_token_mean`, simpo and orpo divide it by the
    answer's length), Δ = s(chosen) - s(rejected), ε = label_smoothing and σ the logistic function::

      sigmoid, sigmoid_norm   -(1-ε) log σ(βΔ) - ε log σ(-βΔ); DPO (arXiv 2305.18290, eq. 7), ε: conservative DPO
      robust                  (-(1-ε) log σ(βΔ) + ε log σ(-βΔ)) / (1-2ε) (arXiv 2403.00409)
      hinge                   max(0, 1 - βΔ) (SLiC, arXiv 2305.10425)
      ipo_sum, ipo_token_mean (Δ - 1/(2β))² (arXiv 2310.12036, eq. 17); TRL's `ipo` is the token mean
      reference_free          sigmoid with a uniform reference
      simpo                   sigmoid of βΔ - γ (arXiv 2405.14734, eq. 6)
      orpo                    -s(chosen) - β log σ(log odds(chosen) - log odds(rejected)) (arXiv 2403.07691, eq. 6;
                              its λ is β here, as in TRL); the first term is over the answer, TRL's over the prompt too

    Args:
      chosen, rejected: every array of one shape P.
      kind: one of `KINDS`.
      beta: above 0; a traced one is not checked.
      label_smoothing: assumed share of wrong labels, in [0, 0.5); sigmoid, sigmoid_norm, robust, reference_free, simpo.
      gamma: margin of simpo, at least 0.
      sft_weight: adds this times -log p of the chosen answer per token, its own mean for each pair (arXiv 2404.19733).
      weights: float [P], 0 for padding pairs, whose values are ignored; None: all 1.
      group: int [P], index into `groups`, whose sums are also returned separately; other numbers mean no group.

    Returns:
      (sum of loss, sum of weight, metrics). Metrics are sums over pairs, to be divided by `pairs`, the sum of weights:
      rewards/chosen, /rejected, /margins, /accuracies (strictly larger), logps/chosen, logps/rejected; each also as
      NAME/GROUP. As in TRL, rewards are β · (log p - reference's), not divided by lengths. In simpo and orpo, rewards
      are β times the token mean, and logps are token means, too. Float32 scalars; no gradient through metrics.

    Raises:
      ValueError: the kind is unknown, shapes differ, a number is out of range, or the kind would ignore an option.
    """
    shape = _check(chosen, rejected, kind=kind, beta=beta, label_smoothing=label_smoothing, gamma=gamma,
                   sft_weight=sft_weight, weights=weights, group=group, groups=groups)
    weights = jnp.ones(shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    # Mask before any computation, because 0 · inf would make every gradient NaN.
    chosen, rejected = jax.tree.map(lambda x: jnp.where(weights != 0, x.astype(jnp.float32), 0), (chosen, rejected))
    losses = _losses(chosen, rejected, kind, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    if sft_weight:
        losses = losses - sft_weight * _scores(chosen._replace(reference_logps=None), mean=True)
    sums = _metrics(*jax.lax.stop_gradient((chosen, rejected)), kind, beta=beta)
    metrics = {name: jnp.sum(weights * value) for name, value in sums.items()}
    for index, name in enumerate(groups):
        inside = jnp.where(group == index, weights, 0)
        metrics |= {f"{key}/{name}": jnp.sum(inside * value) for key, value in sums.items()}
    return jnp.sum(weights * losses), jnp.sum(weights), metrics


def _losses(chosen: Answers, rejected: Answers, kind: Kind, *, beta, label_smoothing, gamma) -> jax.Array:
    """Return the loss of each pair [P]; the options have been checked."""
    mean = KINDS[kind].mean
    chosen_scores, rejected_scores = _scores(chosen, mean=mean), _scores(rejected, mean=mean)
    margins = chosen_scores - rejected_scores
    if kind in ("ipo_sum", "ipo_token_mean"):
        return jnp.square(margins - 1 / (2 * beta))
    if kind == "hinge":
        return jax.nn.relu(1 - beta * margins)
    if kind == "orpo":
        log_odds_ratios = _log_odds(chosen_scores) - _log_odds(rejected_scores)
        return -chosen_scores - beta * jax.nn.log_sigmoid(log_odds_ratios)
    right, wrong = (-jax.nn.log_sigmoid(sign * (beta * margins - gamma)) for sign in (1, -1))
    if kind == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _scores(answers: Answers, *, mean: bool) -> jax.Array:
    scores = answers.logps
    if answers.reference_logps is not None:
        scores = scores - jax.lax.stop_gradient(answers.reference_logps)
    return scores / jnp.maximum(answers.lengths, 1) if mean else scores


def _log_odds(mean_logps: jax.Array) -> jax.Array:
    """log (p / (1 - p)) of the geometric mean p of an answer's token probabilities."""
    mean_logps = jnp.minimum(mean_logps, HIGHEST_MEAN_LOGP)
    return mean_logps - jnp.log(-jnp.expm1(mean_logps))


def _metrics(chosen: Answers, rejected: Answers, kind: Kind, *, beta) -> dict[str, jax.Array]:
    """Return the metrics of each pair [P], under TRL's names."""
    mean = KINDS[kind].mean and not KINDS[kind].reference
    chosen_rewards, rejected_rewards = beta * _scores(chosen, mean=mean), beta * _scores(rejected, mean=mean)
    chosen_logps, rejected_logps = (_scores(answers._replace(reference_logps=None), mean=mean)
                                    for answers in (chosen, rejected))
    return {"pairs": jnp.ones_like(chosen_logps), "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards, "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(jnp.float32),
            "logps/chosen": chosen_logps, "logps/rejected": rejected_logps}


def _check(chosen: Answers, rejected: Answers, *, kind, beta, label_smoothing, gamma, sft_weight, weights, group,
           groups) -> tuple[int, ...]:
    """Check all arguments and return the shape of the pairs."""
    def refuse(message: str):
        raise ValueError(f"preference loss: {message}")

    if kind not in KINDS:
        refuse(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    does = KINDS[kind]
    if not isinstance(beta, jax.core.Tracer) and not (beta > 0 and math.isfinite(beta)):
        refuse(f"beta={beta} must be above 0")
    if not 0 <= label_smoothing < 0.5:
        refuse(f"label_smoothing={label_smoothing} must be in [0, 0.5)")
    if label_smoothing and not does.smoothing:
        refuse(f"kind={kind!r} has no label_smoothing; it is part of {_names(smoothing=True)}")
    if kind == "robust" and not label_smoothing:
        refuse("kind='robust' needs label_smoothing above 0; without it, it is 'sigmoid'")
    if not (gamma >= 0 and math.isfinite(gamma)):
        refuse(f"gamma={gamma} must be at least 0")
    if gamma and kind != "simpo":
        refuse(f"kind={kind!r} has no gamma; it is part of simpo")
    if not (sft_weight >= 0 and math.isfinite(sft_weight)):
        refuse(f"sft_weight={sft_weight} must be at least 0")
    if sft_weight and kind == "orpo":
        refuse("kind='orpo' has the chosen answer's log-probability in it; its share is set by beta, not sft_weight")
    for name, answers in (("chosen", chosen), ("rejected", rejected)):
        if does.reference and answers.reference_logps is None:
            refuse(f"kind={kind!r} needs reference_logps for {name}; without a reference there are"
                   f" {_names(reference=False)}")
        if not does.reference and answers.reference_logps is not None:
            refuse(f"kind={kind!r} has no reference model, and reference_logps of {name} would be ignored")
    if bool(groups) != (group is not None):
        refuse(f"group and groups belong together; groups={list(groups)!r}, and group is"
               f" {'missing' if group is None else 'given'}")
    shape = chosen.logps.shape
    given = {"rejected.logps": rejected.logps, "chosen.lengths": chosen.lengths, "rejected.lengths": rejected.lengths,
             "chosen.reference_logps": chosen.reference_logps, "rejected.reference_logps": rejected.reference_logps,
             "weights": weights, "group": group}
    for name, array in given.items():
        if array is not None and array.shape != shape:
            refuse(f"{name} {array.shape} must have the shape of chosen.logps {shape}")
    return shape


def _names(**properties: bool) -> str:
    return ", ".join(name for name, kind in KINDS.items() if kind._asdict().items() >= properties.items())
