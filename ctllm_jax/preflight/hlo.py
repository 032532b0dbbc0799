"""Read the text of a compiled program: its collectives, and its largest arrays. No jax.

A collective inside a loop counts as often as the loop goes round. Between TPU slices it is a `send` to the host that
names the collective. On TPU a reduce-scatter is an all-reduce in a fusion that keeps a part, an asynchronous collective
may be spread over fusions that compute meanwhile, and `ring_copies` sends from a kernel; all are seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
         "ragged-all-to-all")
REMOTE_COPY = "remote-copy"
# The kernels' names in ring_copies.py.
_RING_SEND, _RING_RECEIVE = re.compile(r"ring_send\b"), re.compile(r"ring_receive\b")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32,
         "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|branch_computations|called_computations|true_computation|"
                     r"false_computation)=(\{[^}]*\}|%?[\w.\-]+)")
_NO_ARRAY = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "constant")


class Instruction(NamedTuple):
    """One line: its result type without layouts, its opcode, and the rest of the line."""

    name: str
    type: str
    opcode: str
    rest: str


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
      kind: one of KINDS, or REMOTE_COPY.
      payload: bytes of the whole array on each device: gathered, or before it is reduced.
      group: devices that take part with each other.
      times: how often it runs in a step.
      asynchronous: whether something else may be computed meanwhile.
      crosses: whether a group reaches over slices or nodes.
      source: where in the program, as JAX names it.
    """

    kind: str
    payload: int
    group: int
    times: int
    asynchronous: bool
    crosses: bool
    source: str

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step, in a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, REMOTE_COPY: 1.0}.get(self.kind, share)
        return round(self.payload * factor * self.times)


class Large(NamedTuple):
    """An array of a program: its type, bytes, and origin."""

    type: str
    size: int
    source: str


class Program:
    """A compiled module as text, by computation.

    Args:
      text: of `Compiled.as_text()`.
      per_slice: devices of a slice or node, numbered one slice after the other; None: there is one.
    """

    def __init__(self, text: str, *, per_slice: int | None = None):
        # replica_groups={} means all devices, whose number is in the head of the module.
        counts = [re.search(rf"{name}=(\d+)", text[:4096]) for name in ("num_partitions", "replica_count")]
        self._devices = math.prod(int(count[1]) for count in counts if count)
        self._computations: dict[str, list[Instruction]] = {}
        self._per_slice = per_slice
        self._entry = ""
        name = None
        for line in text.splitlines():
            if name is None:
                if head := _COMPUTATION.match(line):
                    name = head[2]
                    self._computations[name] = []
                    self._entry = name if head[1] else self._entry
            elif line.startswith("}"):
                name = None
            elif (instruction := _parse(line)) is not None:
                self._computations[name].append(instruction)
        if not self._entry:
            raise ValueError("no ENTRY computation: this is no compiled HLO module")

    def collectives(self) -> list[Collective]:
        """All executed collectives, by the share of bytes sent, largest first."""
        found: dict[tuple, Collective] = {}
        for index, (instruction, times, within) in enumerate(self._executed(self._entry, 1, ())):
            kind = instruction.opcode.removesuffix("-start")
            if kind == "send" and (between := _between_slices(instruction, times)):
                found[(index,)] = between
            if kind == "custom-call" and _RING_SEND.match(instruction.name):
                sizes = [_bytes(*array) for array in _ARRAY.findall(instruction.type)]
                found[(index,)] = Collective(REMOTE_COPY, sum(sizes[:2]), 2, times,
                                             self._overlaps(instruction, within), False, _source(instruction.rest))
            if kind not in KINDS:
                continue
            one = self._collective(instruction, kind, times, within)
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            # The pieces of an asynchronous one repeat it under one channel, some inside of inner loops.
            key = (channel[1], one.kind, one.payload, one.source) if channel and "permute" not in kind else (index,)
            if (other := found.get(key)) is not None:
                one = replace(one, times=min(one.times, other.times),
                              asynchronous=one.asynchronous or other.asynchronous)
            found[key] = one
        return sorted(found.values(), key=lambda each: -each.sent)

    def largest(self, count: int = 8) -> list[Large]:
        """The largest arrays that are made, one of each type."""
        found: dict[str, Large] = {}
        for instruction, _, within in self._executed(self._entry, 1, ()):
            if instruction.opcode in _NO_ARRAY or any("fusion" in name or "fused" in name for name in within):
                continue
            for dtype, dims in _ARRAY.findall(instruction.type):
                size, shown = _bytes(dtype, dims), f"{dtype}[{dims}]"
                if shown not in found:
                    found[shown] = Large(shown, size, _source(instruction.rest))
        return sorted(found.values(), key=lambda each: -each.size)[:count]

    def _executed(self, name: str, times: int, within: tuple[str, ...]) -> Iterator[tuple[Instruction, int, tuple]]:
        """Every instruction that runs, how often, and the computations it is in but the entry."""
        for instruction in self._computations.get(name, ()):
            yield instruction, times, within
            trips = self._trips(instruction) if instruction.opcode == "while" else 1
            if instruction.opcode.removesuffix("-start") in KINDS:
                continue  # the reduction function
            for _, called in _CALLED.findall(instruction.rest):
                for inner in re.findall(r"[\w.\-]+", called):
                    yield from self._executed(inner, times * trips, (*within, inner))

    def _overlaps(self, send: Instruction, within: tuple[str, ...]) -> bool:
        """Whether a matmul is between a send around a ring and its wait, in the module's execution order."""
        after = self._computations[within[-1] if within else self._entry]
        for instruction in after[after.index(send) + 1:]:
            if _RING_RECEIVE.match(instruction.name):
                break
            if "dot_general" in instruction.rest:
                return True
        return False

    def _trips(self, loop: Instruction) -> int:
        """Trip count of a loop: its annotation, or the constant in its condition; 1 if neither exists."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self._computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], [])
        constants = {each.name: int(number[1]) for each in condition
                     if each.opcode == "constant" and (number := re.match(r"(\d+)\)", each.rest))}
        for each in condition:
            if each.opcode == "compare" and "direction=LT" in each.rest:
                named = [constants[name] for name in re.findall(r"%?([\w.\-]+)", each.rest) if name in constants]
                if named:
                    return max(1, named[0])
        return 1

    def _collective(self, instruction: Instruction, kind: str, times: int, within: tuple[str, ...]) -> Collective:
        sizes = [_bytes(*array) for array in _ARRAY.findall(instruction.type)]
        started = instruction.opcode.endswith("-start")
        if kind == "collective-permute":
            payload = max(sizes)
        elif started and kind != "all-reduce":
            # A combined start has the type (operands, results, …); the larger half counts.
            payload = max(sum(_bytes(*array) for array in _ARRAY.findall(part)) for part in _parts(instruction.type))
        else:
            payload = sum(sizes)
        groups = _groups(instruction.rest)
        group = len(groups[0]) if groups else self._devices
        scattered = kind == "all-reduce" and any("all-reduce-scatter" in name for name in within)
        if kind == "reduce-scatter":
            payload *= 1 if started else group
        asynchronous = started and '"is_sync":true' not in instruction.rest
        asynchronous |= any("async" in name for name in within)
        per_slice = self._per_slice
        crosses = bool(per_slice) and any(len({device // per_slice for device in each}) > 1 for each in groups)
        kind = "reduce-scatter" if scattered else kind
        return Collective(kind, payload, group, times, asynchronous, crosses, _source(instruction.rest))


def _parse(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end():]
    depth = place = 0
    while place < len(rest) and (depth or rest[place] != " "):
        depth += (rest[place] in "([{") - (rest[place] in ")]}")
        place += 1
    opcode, _, arguments = rest[place + 1:].partition("(")
    return Instruction(head[1], re.sub(r"\{[^{}]*\}", "", rest[:place]), opcode.strip(), arguments)


def _bytes(dtype: str, dims: str) -> int:
    return math.prod(map(int, filter(None, dims.split(",")))) * _BITS.get(dtype, 0) // 8


def _between_slices(send: Instruction, times: int) -> Collective | None:
    """The collective of a transfer between slices (XLA's megascale); None for another transfer."""
    kind = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', send.rest)
    if kind is None:
        return None
    target = re.search(r'_xla_megascale_target="([^"]*)"', send.rest)
    groups = re.findall(r"\[([\d,]+)\]|\{([\d,]+)\}", target[1]) if target else []
    group = max((len((listed or braced).split(",")) for listed, braced in groups), default=2)
    payload = max((_bytes(*array) for array in _ARRAY.findall(send.type)), default=0)
    return Collective(kind[1].lower().replace("_", "-"), payload, max(group, 2), times, True, True, _source(send.rest))


def _parts(tuple_type: str) -> list[str]:
    """The elements of a tuple's type."""
    depth, parts = 0, [""]
    for character in tuple_type[1:-1]:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _source(rest: str) -> str:
    name = re.search(r'op_name="([^"]*)"', rest)
    parts = re.sub(r"jit\(\w+\)/", "", name[1] if name else "").split("/")
    kept = [part for part in parts if part not in ("while", "body", "closed_call", "checkpoint", "shard_map")]
    return "/".join(kept)


def _groups(rest: str) -> list[list[int]]:
    """The devices that take part with each other, of every group, as numbers of the program's devices."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", rest):
        return [list(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", rest):
        return [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = list(map(int, iota[3].split(",")))
        order = list(map(int, iota[4].split(","))) if iota[4] else list(range(len(dims)))
        return _cut(_transposed(dims, order), int(iota[2]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\([^)]*\))? ?\{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", mesh[1])}
        named = re.findall(r"'([\w.]+)'", mesh[2])
        names = list(axes)
        order = [names.index(name) for name in names if name not in named] + [names.index(name) for name in named]
        return _cut(_transposed(list(axes.values()), order), math.prod(axes[name] for name in named))
    return []


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """The numbers 0 … of a grid `dims`, its axes in another order, one after the other."""
    strides = [math.prod(dims[axis + 1:]) for axis in range(len(dims))]
    numbers = [0]
    for axis in order:
        numbers = [number + step * strides[axis] for number in numbers for step in range(dims[axis])]
    return numbers


def _cut(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start:start + size] for start in range(0, len(numbers), size)]
