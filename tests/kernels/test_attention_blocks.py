"""Block sizes: what fits, what is refused and why, which blocks see which; and TPU's own compiler on the table."""

from dataclasses import replace

import numpy as np
import pytest

from ctllm_jax.kernels.attention import make_request
from ctllm_jax.kernels.attention.cases import compile_cases, draw_segments
from ctllm_jax.kernels.attention.tpu_blocks import (
    CHIPS,
    Blocks,
    backward_vmem,
    check_blocks,
    choose_blocks,
    find_chip,
    forward_vmem,
)
from ctllm_jax.kernels.attention.tpu_ranges import COLUMNS, find_ranges, sees_all
from ctllm_jax.kernels.topology import find_topology

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


def request_for(chip, *, length=4096, heads=4, kv_heads=2, head_dim=128, dtype="bfloat16", **options):
    return make_request(length=length, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
                        **options)._replace(platform="tpu", device_kind=KINDS[chip])


@pytest.mark.parametrize("chip", CHIPS)
def test_the_table_fits_every_request(chip):
    assert find_chip(KINDS[chip]) == chip
    for length in (1, 127, 128, 129, 1000, 4096, 5000, 32768, 131072):
        for head_dim in (64, 128, 256):
            for dtype in ("bfloat16", "float32"):
                for positions in (False, True):
                    request = request_for(chip, length=length, head_dim=head_dim, dtype=dtype, positions=positions)
                    blocks = choose_blocks(request, chip)
                    check_blocks(blocks, request, chip)
                    assert max(forward_vmem(blocks, request), backward_vmem(blocks, request)) <= CHIPS[chip].vmem_limit
                    for block, major in ((blocks.query, blocks.key_major),
                                         (blocks.backward_query, blocks.backward_key_major)):
                        assert max(block, major) % min(block, major) == 0
                        # A row is not padded to twice its length and more.
                        assert max(block, major) <= max(2 * length, 128)


@pytest.mark.parametrize(("changes", "message"), [
    ({"query": 100}, r"query=100 must be a multiple of 128, the lanes of a tile"),
    ({"backward_key": 0}, r"backward_key=0 must be a multiple of 128"),
    ({"key": 384}, r"key=384 must divide key_major=4096"),
    ({"key_major": 8192 * 4}, r"the forward pass of .* needs \d+\.\d MiB of VMEM for head dim 128 in bfloat16, and a"
                              r" kernel gets 16 MiB on v4"),
    ({"backward_query": 2048, "backward_key": 2048}, r"the backward pass of .* needs \d+\.\d MiB of VMEM"),
])
def test_a_bad_block_size_is_refused_with_its_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        check_blocks(replace(CHIPS["v4"].blocks, **changes), request_for("v4"), "v4")


@pytest.mark.parametrize(("causal", "window", "by_position"), [
    (True, None, False), (False, None, False), (True, 50, False), (True, None, True), (True, 50, True)])
def test_ranges_never_hide_a_pair_that_sees_and_hide_most_that_do_not(causal, window, by_position):
    """Against the mask itself, of ordered documents: every first and last block is right."""
    length, query_block, key_block = 512, 64, 32
    request = request_for("v5e", length=length, causal=causal, sliding_window=window, positions=by_position)
    segments = draw_segments(length, rows=2, seed=3)
    segments[0, 5:7] = 1
    positions = np.stack([np.random.default_rng(row).permutation(length) for row in range(2)]).astype(np.int32)
    places = positions if by_position else np.arange(length)[None].repeat(2, axis=0)
    ranges = find_ranges(request, segments, positions if by_position else None, length=length,
                         query_block=query_block, key_block=key_block)
    query = np.asarray(ranges.query).reshape(2, -1, COLUMNS)
    key = np.asarray(ranges.key).reshape(2, -1, COLUMNS)
    seen = np.asarray(ranges.seen).reshape(2, -1, 2)
    behind = places[:, :, None] - places[:, None]
    mask = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)
    mask &= (behind >= 0) | (not causal)
    mask &= behind < (window or length)
    pairs = mask.reshape(2, length // query_block, query_block, length // key_block, key_block)
    some, every = pairs.any(axis=(2, 4)), pairs.all(axis=(2, 4))
    for row in range(2):
        for i, (first, stop) in enumerate(seen[row]):
            inside = np.flatnonzero(some[row, i])
            assert not inside.size or first <= inside[0] and inside[-1] < stop
            if not by_position and window is None:
                assert (first, stop) == ((inside[0], inside[-1] + 1) if inside.size else (0, 0))
            for j in range(length // key_block):
                assert not bool(sees_all(request, query[row, i], key[row, j])) or every[row, i, j]


def test_without_ids_the_whole_blocks_need_no_mask():
    request = request_for("v5e", length=512, segments=False)
    ranges = find_ranges(request, None, None, length=512, query_block=128, key_block=128)
    assert np.asarray(ranges.seen).reshape(4, 2).tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]] and ranges.rows == 1
    query, key = (np.asarray(x).reshape(4, COLUMNS) for x in (ranges.query, ranges.key))
    assert [[bool(sees_all(request, query[i], key[j])) for j in range(4)] for i in range(4)] == [
        [j < i for j in range(4)] for i in range(4)]


def compile_all(chip, request, blocks=None):
    for case in compile_cases(request, chip, find_topology(chip)[0], blocks=blocks):
        case.lower().compile()


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v5e"])
def test_both_passes_compile(chip):
    compile_all(chip, request_for(chip, length=1000))


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", [
    {"segments": False}, {"length": 32768, "heads": 2}, {"head_dim": 64, "kv_heads": 1}, {"head_dim": 256},
    {"dtype": "float32"}, {"dtype": "float32", "head_dim": 256, "positions": True}, {"sliding_window": 1000},
    {"causal": False, "length": 300}, {"positions": True, "dtype": "float32", "head_dim": 64}, {"length": 1}], ids=str)
def test_the_table_compiles_on_every_chip(chip, case):
    compile_all(chip, request_for(chip, **case))


@pytest.mark.aot
@pytest.mark.slow
def test_what_our_count_lets_pass_the_compiler_takes():
    """The largest blocks that fit by our own count, on the chip with the least memory."""
    request = request_for("v4", length=8192)
    blocks = max((Blocks(512, 512, major, 256, 512, backward) for major in (4096, 8192) for backward in (2048, 4096)
                  if forward_vmem(Blocks(512, 512, major, 256, 512, backward), request) <= CHIPS["v4"].vmem_limit
                  and backward_vmem(Blocks(512, 512, major, 256, 512, backward), request) <= CHIPS["v4"].vmem_limit),
                 key=lambda blocks: (blocks.key_major, blocks.backward_key_major))
    compile_all("v4", request, blocks)
