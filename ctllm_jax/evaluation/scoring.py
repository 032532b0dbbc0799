"""Compute log-probabilities of continuations given their contexts, with as little repeated computation as possible.

`score_plan` plans the inputs. The programs here compute packed rows with the unchanged decoder, and rows after a prefix
whose keys and values were computed once. Results equal those of a separate pass for each request.

Legend: B rows, S tokens of a row, G groups, R rows of a group, P tokens of a prefix, D hidden, N query heads, K kv
heads, M query heads of one kv head, H head dim, V vocabulary, U scored places, C targets of a place, L layers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctllm_jax import sharding
from ctllm_jax.evaluation.score_plan import Packed, Shared, collect_inputs, plan
from ctllm_jax.inference.model import Model
from ctllm_jax.model.decoder import Block, Decoder, compute_logits, forward

BATCH_TOKENS = 8192
CHOICES = 4
"""Number of targets that share the logits of one index; more targets repeat the index."""
_LOGITS = 2**25
"""Number of logits in memory at once: 128 MB."""
_MASKED = -1e30
_AHEAD = 2
"""Number of batches dispatched before the results of the first one are read."""


class Score(NamedTuple):
    """Sum of log p over a continuation, in nats, and whether each of its tokens was the likeliest one."""

    logp: float
    is_greedy: bool


class Scorer:
    """Computes log-probabilities with a model.

    Args:
      batch_tokens: number of tokens in one forward pass, including padding.
      max_length: largest input length; None: the model's context.
      share: False computes each request by itself, for comparison.

    Attributes:
      counts: `requests`, `inputs` (different ones), `tokens` that went through the model, and with `padded` ones.
    """

    def __init__(self, model: Model, *, batch_tokens: int = BATCH_TOKENS, max_length: int | None = None,
                 share: bool = True):
        decoder = model.decoder
        attention = decoder.attention if model.mesh is None else sharding.attention_on(model.mesh,
                                                                                       implementation="auto")
        # Two decoders that compute the same share one program; scanned, to compile faster.
        self._decoder = Decoder(decoder.config, decoder.dtype, attention, decoder.swiglu, scan_layers=True)
        self._params = model.params if decoder.dtype == jnp.float32 else _cast(model.params, decoder.dtype)
        self._mesh = model.mesh
        self._row_by_row = model.mesh is None and jax.default_backend() == "cpu"
        self._multiple = 1 if model.mesh is None else sharding.axis_size(model.mesh, sharding.BATCH_AXES)
        self._batch_tokens, self._share = batch_tokens, share
        self.max_length = max_length or decoder.config.context_length
        self.counts: Counter[str] = Counter()
        # The prefix of the previous batches, and its keys and values.
        self._prefix: tuple[np.ndarray | None, Any] = (None, None)

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *,
              report: Callable[[list[tuple[int, Score]]], None] = lambda new: None) -> list[Score]:
        """The score of each request: ids of a context and of its continuation.

        Args:
          report: called with (index, score) of finished requests, batch by batch.

        Raises:
          ValueError: an empty context, or a continuation longer than `max_length`.
        """
        scores = [Score(0.0, True)] * len(requests)
        report([(place, scores[place]) for place, (_, continuation) in enumerate(requests) if not len(continuation)])
        for new in self._run(requests):
            for place, score in new:
                scores[place] = score
            report(new)
        return scores

    def _run(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[tuple[int, Score]]]:
        inputs = collect_inputs(requests, max_length=self.max_length)
        self.counts.update(requests=len(requests), inputs=len(inputs))
        under_way: deque[tuple[Packed | Shared, list[Any]]] = deque()
        for batch in plan(inputs, batch_tokens=self._batch_tokens, multiple=self._multiple, share=self._share):
            under_way.append((batch, self._begin(batch)))
            if len(under_way) > _AHEAD:
                yield _finish(*under_way.popleft())
        self._prefix = (None, None)
        while under_way:
            yield _finish(*under_way.popleft())

    def _begin(self, batch: Packed | Shared) -> list[Any]:
        """Start the computation of a batch; returns (indices, targets, results) part by part."""
        place = self._place
        if isinstance(batch, Shared):
            real, keys_values = int((batch.ends > 0).sum()), self._keys_values(batch)
            hidden_BSD = extend(self._decoder, self._params, *keys_values, batch.prefix_lengths, place(batch.tokens),
                                place(batch.ends), place(batch.positions), row_by_row=self._row_by_row)
        else:
            real = int((batch.segment_ids > 0).sum())
            hidden_BSD = _pass(self._decoder, self._params, *map(place, batch[:3]))
        self.counts.update(tokens=real, padded=batch.tokens.size)
        return [(order, score_places(self._decoder, self._params, hidden_BSD, places_U, targets_UC, mesh=self._mesh))
                for order, places_U, targets_UC in split_places(batch.places, batch.targets,
                                                                vocabulary=self._decoder.config.padded_vocab_size)]

    def _keys_values(self, batch: Shared) -> Any:
        if self._prefix[0] is not batch.prefix:
            groups, length = batch.prefix.shape
            rows = -(-groups // self._multiple) * self._multiple
            tokens_GP = np.zeros((rows, length), np.int32)
            tokens_GP[:groups] = batch.prefix
            self._prefix = (None, None)  # Free the memory of the previous one before making a new one.
            self._prefix = batch.prefix, prefill(self._decoder, self._params, self._place(tokens_GP), groups=groups)
            self.counts.update(tokens=int(batch.prefix_lengths.sum()), padded=tokens_GP.size)
        return self._prefix[1]

    def _place(self, rows: np.ndarray) -> Any:
        return rows if self._mesh is None else jax.device_put(rows, sharding.batch_sharding(self._mesh))


def split_places(places_N: np.ndarray, targets_N: np.ndarray, *,
                 vocabulary: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(order, places [U], targets [U, C]): of the parts, `order` [N'] says where in N the targets of ids ≥ 0 belong."""
    by_place = np.argsort(places_N, kind="stable")
    sorted_N = places_N[by_place]
    begins = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]])
    rank_N = np.arange(len(sorted_N)) - np.repeat(begins, np.diff(np.r_[begins, len(sorted_N)]))
    row_N = np.cumsum(rank_N % CHOICES == 0) - 1
    total = int(row_N[-1]) + 1
    most = max(64, 1 << (_LOGITS // vocabulary).bit_length() - 1)
    for start in range(0, total, most):
        mine = (row_N >= start) & (row_N < start + most)
        count = min(total - start, most)
        size = min(most, 64 << 2 * max(0, -(-((count - 1) // 64).bit_length() // 2)))
        places_U, targets_UC = np.zeros(size, np.int32), np.full((size, CHOICES), -1, np.int32)
        places_U[row_N[mine] - start] = sorted_N[mine]
        targets_UC[row_N[mine] - start, rank_N[mine] % CHOICES] = targets_N[by_place[mine]]
        yield by_place[mine], places_U, targets_UC


def _finish(batch: Packed | Shared, parts: list[Any]) -> list[tuple[int, Score]]:
    """The scores of a batch's requests."""
    logps_N, greedy_N = np.zeros(len(batch.places)), np.zeros(len(batch.places), bool)
    for order, (logps_UC, greedy_UC, is_there_UC) in jax.device_get(parts):
        logps_N[order], greedy_N[order] = logps_UC[is_there_UC], greedy_UC[is_there_UC]
    requests, row_N = np.unique(batch.requests, return_inverse=True)
    sums, wrong = np.bincount(row_N, weights=logps_N), np.bincount(row_N, weights=~greedy_N)
    return [(request, Score(logp, not missed)) for request, logp, missed in
            zip(requests.tolist(), sums.tolist(), wrong.tolist(), strict=True)]


@partial(jax.jit, static_argnums=1)
def _cast(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@partial(jax.jit, static_argnums=0)
def _pass(decoder: Decoder, params: Any, tokens_BS, segment_ids_BS, positions_BS) -> jax.Array:
    return decoder.apply({"params": params}, tokens_BS, segment_ids_BS, positions_BS)[0]


@partial(jax.jit, static_argnums=0, static_argnames="groups")
def prefill(decoder: Decoder, params: Any, tokens_GP: jax.Array, *, groups: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [L, G, K, P, H] of the first `groups` prefixes; padding on the right is computed, too."""
    positions_1P = jnp.arange(tokens_GP.shape[1], dtype=jnp.int32)[None]

    def attend(query, key, value, _, **options):
        return decoder.attention(query, key, value, segment_ids=None, **options)

    _, kept = _forward(decoder, params, tokens_GP, positions_1P, attend, (), keep=True)
    return jax.tree.map(lambda stack: stack[:, :groups].swapaxes(2, 3), kept)


@partial(jax.jit, static_argnums=0, static_argnames="row_by_row")
def extend(decoder: Decoder, params: Any, keys_LGKPH, values_LGKPH, lengths_G, tokens_BS, ends_BS, positions_BS, *,
           row_by_row: bool) -> jax.Array:
    """Hidden states [B, S, D] of rows after prefixes, B / G rows per prefix; see `score_plan.Shared`.

    `row_by_row`: compute attention one row at a time, whose scores fit into a CPU's cache (145 µs per token for 8
    layers of 8 heads after 768 tokens, instead of 420 µs for all rows at once).
    """
    config = decoder.config
    groups, _, prefix = keys_LGKPH.shape[1:4]
    rows, length = tokens_BS.shape
    place_S = jnp.arange(length)
    own_BST = (place_S[None, None, :] <= place_S[None, :, None]) & (place_S[None, :, None] < ends_BS[:, None, :])
    before_BSP = jnp.broadcast_to(
        jnp.arange(prefix)[None, None] < jnp.repeat(lengths_G, rows // groups)[:, None, None], (rows, length, prefix))
    if config.sliding_window is not None:
        own_BST &= positions_BS[:, :, None] - positions_BS[:, None, :] < config.sliding_window
        before_BSP &= positions_BS[:, :, None] - jnp.arange(prefix)[None, None] < config.sliding_window

    def by_group(x):
        return x.reshape(groups, rows // groups, *x.shape[1:])

    masks = by_group(before_BSP), by_group(own_BST)

    def attend(query_BSNH, key_BSKH, value_BSKH, prefix_GKPH, sliding_window):
        heads = config.num_heads // config.num_kv_heads
        query = query_BSNH.reshape(rows, length, config.num_kv_heads, heads, config.head_dim)
        each_row = (by_group(query), by_group(key_BSKH), by_group(value_BSKH), *masks)
        if not row_by_row:
            return jax.vmap(attend_behind)(*prefix_GKPH, *each_row).reshape(query_BSNH.shape)

        def of_group(group):
            prefixes, own = group[:2], group[2:]
            return jax.lax.map(lambda row: attend_behind(*prefixes, *(x[None] for x in row))[0], own)

        return jax.lax.map(of_group, (*prefix_GKPH, *each_row)).reshape(query_BSNH.shape)

    return _forward(decoder, params, tokens_BS, positions_BS, attend, (keys_LGKPH, values_LGKPH))[0]


def attend_behind(prefix_key_KPH, prefix_value_KPH, query_RSKMH, key_RSKH, value_RSKH, before_RSP,
                  own_RST) -> jax.Array:
    """Attention [R, S, K, M, H] of rows to the prefix of their group and to their own tokens, softmax in float32.

    Args:
      before_RSP, own_RST: bool, the tokens of the prefix, and of its row, that a query attends to.
    """
    R, S, K, M, H = query_RSKMH.shape
    query_RKMSH = query_RSKMH.transpose(0, 2, 3, 1, 4) * H**-0.5
    query_KQH = query_RKMSH.swapaxes(0, 1).reshape(K, R * M * S, H)
    before_RKMSP = _matmul(query_KQH, prefix_key_KPH, contract=2).reshape(K, R, M, S, -1).swapaxes(0, 1)
    own_RKMST = _matmul(query_RKMSH.reshape(R, K, M * S, H), key_RSKH.swapaxes(1, 2), contract=3)
    before_RKMSP = jnp.where(before_RSP[:, None, None], before_RKMSP, _MASKED)
    own_RKMST = jnp.where(own_RST[:, None, None], own_RKMST.reshape(R, K, M, S, S), _MASKED)
    # One softmax over both without concatenating them, by subtracting their common maximum.
    highest_RKMS1 = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (before_RKMSP, own_RKMST)))
    before_RKMSP, own_RKMST = (jnp.exp(x - highest_RKMS1) for x in (before_RKMSP, own_RKMST))
    total_RKMS1 = sum(jnp.sum(x, axis=-1, keepdims=True) for x in (before_RKMSP, own_RKMST))
    dtype = value_RSKH.dtype
    before_KQP = before_RKMSP.swapaxes(0, 1).reshape(K, R * M * S, -1).astype(dtype)
    out = _matmul(before_KQP, prefix_value_KPH, contract=1).reshape(K, R, M, S, H).swapaxes(0, 1)
    out += _matmul(own_RKMST.reshape(R, K, M * S, S).astype(dtype), value_RSKH.swapaxes(1, 2),
                   contract=2).reshape(R, K, M, S, H)
    return (out / total_RKMS1).transpose(0, 3, 1, 2, 4).astype(query_RSKMH.dtype)


def _matmul(x, y, *, contract: int) -> jax.Array:
    """Batched over all dims but the last two; x's last with y's dim `contract`, accumulated in float32."""
    batch = tuple(range(x.ndim - 2))
    return jax.lax.dot_general(x, y, (((x.ndim - 1,), (contract,)), (batch, batch)),
                               preferred_element_type=jnp.float32)


def _forward(decoder: Decoder, params: Any, tokens_BS, positions_BS, attend: Callable, each_layer: Any, *,
             keep: bool = False) -> tuple[jax.Array, Any]:
    """Hidden states, and with `keep` the keys and values of all layers.

    Args:
      attend: `(query, key, value, what is of this layer, sliding_window)`.
      each_layer: arrays [L, …].
    """
    def apply_block(weights, x_BSD, angles, own):
        kept = []

        def attention(query, key, value, *, segment_ids, sliding_window):
            kept.append((key, value))
            return attend(query, key, value, own, sliding_window=sliding_window)

        block = Block(decoder.config, attention, decoder.swiglu, parent=None)
        x_BSD, _ = block.apply({"params": weights}, x_BSD, angles)
        return x_BSD, kept[0] if keep else None

    return forward(decoder, params, tokens_BS, positions_BS, apply_block, each_layer)


@partial(jax.jit, static_argnums=0, static_argnames="mesh")
def score_places(decoder: Decoder, params: Any, hidden_BSD, places_U, targets_UC, *,
                 mesh: Mesh | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log p of targets behind places of the flattened rows, whether each is the likeliest, and whether it is one (-1 is
    none): [U, C] each."""
    hidden_UD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])[places_U]
    logits_UV = compute_logits(params, hidden_UD, vocab_size=decoder.config.vocab_size)
    told_UC = jnp.take_along_axis(logits_UV, jnp.maximum(targets_UC, 0), axis=1)
    found = (told_UC - jax.nn.logsumexp(logits_UV, axis=-1, keepdims=True),
             jnp.argmax(logits_UV, axis=-1)[:, None] == targets_UC, targets_UC >= 0)
    return found if mesh is None else jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))
