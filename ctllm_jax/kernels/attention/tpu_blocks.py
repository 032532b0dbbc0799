"""Block sizes of the TPU kernels: a table by chip, the VMEM that a choice needs, and errors that name the limit.

Legend: S sequence, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ctllm_jax.kernels.attention.fused import Request

LANES = 128
MIB = 2**20


@dataclass(frozen=True)
class Blocks:
    """Tokens of a block in each pass.

    One matmul combines a block of queries with a block of keys. `key_major` keys and values are in VMEM at once, so
    that the loop over their blocks needs no grid steps and no copies, and fully masked blocks are skipped.

    Attributes:
      query, key, key_major: of the forward pass; `key` divides `key_major`.
      backward_query, backward_key, backward_key_major: of the backward pass.
    """

    query: int
    key: int
    key_major: int
    backward_query: int
    backward_key: int
    backward_key_major: int


@dataclass(frozen=True)
class Chip:
    """The resources of a chip that a kernel may use.

    Attributes:
      vmem_limit: largest number of bytes that a kernel requests; XLA uses the rest of VMEM for prefetching.
      blocks: block sizes for head dim 128 and bfloat16; wider heads hold fewer keys.
    """

    vmem_limit: int
    blocks: Blocks


# The shapes with the fewest instruction bundles per score, by benchmarks/kernel_bundles.py.
CHIPS = {
    "v4": Chip(16 * MIB, Blocks(512, 512, 4096, 256, 512, 2048)),
    "v5e": Chip(64 * MIB, Blocks(512, 512, 8192, 512, 512, 8192)),
    "v5p": Chip(40 * MIB, Blocks(512, 512, 8192, 512, 512, 4096)),
    "v6e": Chip(64 * MIB, Blocks(1024, 512, 8192, 512, 512, 8192)),
    "tpu7x": Chip(40 * MIB, Blocks(1024, 512, 8192, 512, 512, 4096)),
}
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
          "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}


def find_chip(device_kind: str) -> str | None:
    """Return the table's name for a `jax.Device.device_kind`; None for a chip that is not in the table."""
    return _KINDS.get(device_kind)


def choose_blocks(request: Request, chip: str) -> Blocks:
    """Return the table's blocks, adapted to this request: no longer than the row, and as many keys at once as VMEM
    holds."""
    length = _round_up(request.length, LANES)
    table = CHIPS[chip].blocks
    width = max(1, request.head_dim * _itemsize(request) // 256)
    chosen: dict[str, int] = {}
    for prefix in ("", "backward_"):
        query, key = (min(getattr(table, prefix + name), length) for name in ("query", "key"))
        # A float32 matmul runs through the MXU six times, so smaller blocks lose little speed, and they fit.
        if width > 1:
            query, key = min(query, 256), min(key, 512)
        query, key = _power_of_two(query), _power_of_two(key)
        major = max(key, getattr(table, prefix + "key_major") // width)
        chosen |= {prefix + "query": query, prefix + "key": key,
                   prefix + "key_major": min(major, _round_up(length, max(query, key)))}
    blocks = Blocks(**chosen)
    for prefix, need in (("", forward_vmem), ("backward_", backward_vmem)):
        key, major = getattr(blocks, prefix + "key"), prefix + "key_major"
        while need(blocks, request) > CHIPS[chip].vmem_limit and getattr(blocks, major) > key:
            blocks = replace(blocks, **{major: max(key, getattr(blocks, major) // 2 // key * key)})
    return blocks


def check_blocks(blocks: Blocks, request: Request, chip: str) -> None:
    """Raise ValueError for blocks that the compiler would reject; the message names the limit."""
    for prefix in ("", "backward_"):
        for name in ("query", "key", "key_major"):
            size = getattr(blocks, prefix + name)
            if size < 1 or size % LANES:
                raise ValueError(f"attention: block size {prefix}{name}={size} must be a multiple of {LANES},"
                                 " the lanes of a tile")
        key, major = getattr(blocks, prefix + "key"), getattr(blocks, prefix + "key_major")
        if major % key:
            raise ValueError(f"attention: block size {prefix}key={key} must divide {prefix}key_major={major}")
    limit = CHIPS[chip].vmem_limit
    for name, need in (("forward", forward_vmem(blocks, request)), ("backward", backward_vmem(blocks, request))):
        if need > limit:
            raise ValueError(f"attention: the {name} pass of {blocks} needs {need / MIB:.1f} MiB of VMEM for head dim"
                             f" {request.head_dim} in {request.dtype}, and a kernel gets {limit / MIB:.0f} MiB on"
                             f" {chip}: make its blocks, or key_major, smaller")


def forward_vmem(blocks: Blocks, request: Request) -> int:
    """Upper bound of the VMEM that the forward kernel uses, in bytes."""
    row, ids = _row_bytes(request), _count_ids(request)
    per_query = 2 * 2 * row + 2 * 4 * 8 + request_lanes(request) * 4 + (2 + ids) * LANES * 4 + 2 * ids * 4 * 8
    per_key = 2 * (2 * row + ids * 4 * 8)
    scores = blocks.query * blocks.key
    return blocks.query * per_query + blocks.key_major * per_key + scores * (2 * 4 + _itemsize(request))


def backward_vmem(blocks: Blocks, request: Request) -> int:
    """Upper bound of the VMEM that the backward kernel uses, in bytes."""
    row, ids, lanes = _row_bytes(request), _count_ids(request), request_lanes(request)
    # Query, cotangent, log-sum-exp, delta and the ids, twice each; the query gradient so far, which is read and written
    # in float32, and once more while it is computed.
    per_query = 2 * (2 * row + 2 * 4 * 8 + ids * 4 * 8) + 5 * lanes * 4
    # Key and value and their gradients, twice each, and the gradients' sums.
    per_key = 2 * 4 * row + 2 * lanes * 4 + 2 * ids * 4 * 8
    scores = blocks.backward_query * blocks.backward_key
    return (blocks.backward_query * per_query + blocks.backward_key_major * per_key
            + scores * (3 * 4 + 2 * _itemsize(request)) + ids * blocks.backward_key * LANES * 4)


def request_lanes(request: Request) -> int:
    """H in VMEM, rounded up to whole tiles."""
    return _round_up(request.head_dim, LANES)


def _row_bytes(request: Request) -> int:
    return request_lanes(request) * _itemsize(request)


def _itemsize(request: Request) -> int:
    return 4 if request.dtype == "float32" else 2


def _count_ids(request: Request) -> int:
    return 2 if request.positions else 1


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _power_of_two(size: int) -> int:
    """The largest power of two not above `size`."""
    return 1 << (size.bit_length() - 1)
