"""Block sizes of the TPU kernels of SwiGLU: one table for every chip, and the limits of a choice.

Legend: T tokens, D hidden, F FFN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

LANES = 128
"""Columns of a TPU's tile: the last dim of a block is a multiple of it."""

WIDE_TILES = 3
"""Number of [tokens, ffn] blocks that the largest kernel moves: the cotangent in and two out, or three out."""

COMPILER_BYTES = 2**19
"""Additional VMEM that Mosaic uses for spilled registers. The amount depends on how much VMEM is available."""


@dataclass(frozen=True)
class Blocks:
    """The work of one grid step: [tokens, ffn] of the output, over `hidden` of the contraction.

    Attributes:
      tokens: rows of x that stay in VMEM during the loop over all of F. The weights are read T / tokens times, which
        makes 2 · tokens FLOPs for each byte of bf16 weights: well above the chip's FLOPs a byte of HBM, or the MXU
        waits.
      ffn: columns of gate and of up. The last block computes only the remaining columns, rounded up to 128.
      hidden: depth of a contraction step. If it is below D, the two products are accumulated in VMEM over the steps.
      rows: of x in one matmul. A loop over them keeps the program short: on v5e 7,200 bundles for 256, where 1,024 at
        once take 27,000 without benefit. The larger MXUs of v6e and tpu7x are faster with all rows at once: 4.2 bundles
        a matmul instruction on v6e against 4.4 for 512, 4.7 for 256, and 4.1 in XLA's own matmuls.
    """

    tokens: int
    ffn: int
    hidden: int
    rows: int

    def clipped(self, *, tokens: int, hidden: int, ffn: int, itemsize: int) -> Blocks:
        """Clip these blocks to a smaller array, in whole tiles."""
        def up(size: int, multiple: int) -> int:
            return -(-size // multiple) * multiple
        rows = min(self.rows, up(tokens, sublanes(itemsize)))
        return Blocks(tokens=min(self.tokens, up(tokens, rows)), rows=rows, ffn=min(self.ffn, up(ffn, LANES)),
                      hidden=min(self.hidden, up(hidden, LANES)))

    def vmem(self, *, hidden: int, itemsize: int) -> dict[str, int]:
        """Bytes of VMEM by use. Every moved array has two buffers."""
        parts = {"x": 2 * self.tokens * self.hidden * itemsize,
                 "gate and up": 4 * self.hidden * self.ffn * itemsize,
                 "wide blocks": 2 * WIDE_TILES * self.tokens * self.ffn * itemsize,
                 # The two products, and twice as much for temporaries of the activation's gradient.
                 "products": 6 * self.rows * self.ffn * 4, "compiler": COMPILER_BYTES}
        if self.hidden < hidden:
            parts["sums over hidden"] = 2 * self.tokens * self.ffn * 4
        return parts


@dataclass(frozen=True)
class Chip:
    """One TensorCore's VMEM, and the blocks tuned for tokens × 2048 × 5504 in bf16.

    Attributes:
      name: the chip's name for users.
      vmem_mib: MiB that a kernel may use; XLA uses the rest for prefetching. All of it on v4, half on v5e and v6e,
        three quarters on v5p and tpu7x.
      blocks: block sizes for two-byte elements.
    """

    name: str
    vmem_mib: int
    blocks: Blocks

    @cached_property
    def vmem_bytes(self) -> int:
        return self.vmem_mib * 2**20


# 5504 is 43 × 128, and 43 is prime: no block but 128 and 5504 divides it, so the last block of 256 or 512 is cut.
CHIPS = {
    # 2 · tokens against 224, 240, 167, 560 and 312 FLOPs a byte of HBM. On v4 a core has 16 MiB and no more.
    "TPU v4": Chip("v4", 16, Blocks(tokens=512, ffn=256, hidden=2048, rows=256)),
    "TPU v5 lite": Chip("v5e", 64, Blocks(tokens=1024, ffn=512, hidden=2048, rows=256)),
    "TPU v5e": Chip("v5e", 64, Blocks(tokens=1024, ffn=512, hidden=2048, rows=256)),
    "TPU v5": Chip("v5p", 48, Blocks(tokens=1024, ffn=512, hidden=2048, rows=256)),
    "TPU v5p": Chip("v5p", 48, Blocks(tokens=1024, ffn=512, hidden=2048, rows=256)),
    "TPU v6 lite": Chip("v6e", 64, Blocks(tokens=1024, ffn=512, hidden=2048, rows=1024)),
    "TPU v6e": Chip("v6e", 64, Blocks(tokens=1024, ffn=512, hidden=2048, rows=1024)),
    "TPU7x": Chip("tpu7x", 48, Blocks(tokens=1024, ffn=512, hidden=2048, rows=1024)),
}


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip of a `jax.Device.device_kind`; None for a chip that is not in the table."""
    return CHIPS.get(device_kind)


def sublanes(itemsize: int) -> int:
    """Rows of a tile: 8 of four bytes, 16 of two."""
    return 32 // itemsize


def choose_blocks(chip: Chip, *, tokens: int, hidden: int, ffn: int, itemsize: int,
                  blocks: Blocks | None = None) -> Blocks:
    """Return blocks for x [tokens, hidden] and gate, up [hidden, ffn] of `itemsize` bytes per element, clipped to them.

    Args:
      blocks: given by the user; None: the chip's, with half the depth for four-byte elements.

    Raises:
      ValueError: a size is not a multiple of its tile, or the blocks need more VMEM than the chip has.
    """
    if blocks is None:
        blocks = chip.blocks if itemsize <= 2 else replace(chip.blocks, hidden=chip.blocks.hidden * 2 // itemsize)
    sublane = sublanes(itemsize)
    for name, multiple, what in (("rows", sublane, f"the rows of a tile of {itemsize}-byte elements"),
                                 ("ffn", LANES, "the columns of a tile"), ("hidden", LANES, "the columns of a tile"),
                                 ("tokens", max(blocks.rows, 1), "blocks.rows")):
        size = getattr(blocks, name)
        if size < multiple or size % multiple:
            raise ValueError(f"swiglu: blocks.{name}={size} must be a multiple of {multiple}, {what}")
    blocks = blocks.clipped(tokens=tokens, hidden=hidden, ffn=ffn, itemsize=itemsize)
    parts = blocks.vmem(hidden=hidden, itemsize=itemsize)
    if sum(parts.values()) > chip.vmem_bytes:
        shares = ", ".join(f"{name} {size / 2**20:.2f}" for name, size in parts.items())
        raise ValueError(f"swiglu: {blocks} needs {sum(parts.values()) / 2**20:.2f} MiB of VMEM ({shares}),"
                         f" and a kernel may take {chip.vmem_mib} MiB on {chip.name}: take smaller blocks")
    return blocks
