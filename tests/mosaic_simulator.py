"""Pallas Mosaic GPU kernels on the CPU, timed as badly as the hardware may: what the real one leaves open, goes wrong.

A kernel's own source runs, one Python thread for each of its groups (warpgroups), with the names that it calls
replaced. JAX's interpreter has no wgmma with an operand in registers and copies at once, where here
- a tile that is asked for is NaN until somebody waits for its barrier, and then arrives as late as can be, in any
  order;
- a matmul reads its operands in shared memory when it is awaited, so that a buffer given back too early is seen;
- an accumulator that is read or set before its matmuls were awaited raises, as does a store to global memory of what
  was not committed, a matmul or a store never awaited, and a wait that nobody can end;
- what lies outside of an array is read as zeros and not written, as the memory engine has it; the rest of the shared
  memory and all outputs start as NaN.
Layouts and swizzles it does not know: those are the compiler's to refuse.
"""

import random
import threading
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

JUNK = {"f": np.nan, "V": np.nan, "i": -(2**30)}


class Shared:
    """A reference into shared memory: `array` is a view of it; `owner` knows what was written and not committed."""

    def __init__(self, array, owner=None):
        self.array, self.owner = array, owner or self
        self.uncommitted = set()
        self.shape, self.dtype = array.shape, array.dtype

    @property
    def at(self):
        return _At(lambda index: Shared(self.array[tuple(
            slice(int(i.start), int(i.start) + i.size) if isinstance(i, pl.Slice) else i for i in index)], self.owner))

    def transpose(self, permutation):
        return Shared(self.array.transpose(permutation), self.owner)

    def __getitem__(self, index):
        return jnp.asarray(self.array[index])

    def __setitem__(self, index, value):
        assert value.shape == self.array[index].shape and value.dtype == self.dtype, (value, self.shape, self.dtype)
        self.array[index] = np.asarray(value)
        self.owner.uncommitted.add(threading.get_ident())


class Global:
    """A reference into global memory; an index is kept, and followed when something is copied."""

    def __init__(self, array, index=None):
        self.array, self.index = array, index
        self.shape, self.dtype = array.shape, array.dtype

    @property
    def at(self):
        return _At(lambda index: Global(self.array, index))

    def __getitem__(self, index):
        return jnp.asarray(self.array[index])

    def _places(self):
        """One list of positions a dim, and which dims stay."""
        lists, kept = [], []
        for part in self.index:
            size = part.size if isinstance(part, pl.Slice) else 1
            start = int(part.start if isinstance(part, pl.Slice) else part)
            lists.append(np.arange(start, start + size))
            kept.append(isinstance(part, pl.Slice))
        lists += [np.arange(size) for size in self.shape[len(lists):]]
        kept += [True] * (len(self.shape) - len(kept))
        return lists, tuple(size for size, keep in zip(map(len, lists), kept, strict=True) if keep)

    def read(self):
        lists, shape = self._places()
        data = self.array[np.ix_(*(np.clip(x, 0, size - 1) for x, size in zip(lists, self.shape, strict=True)))]
        for dim, (x, size) in enumerate(zip(lists, self.shape, strict=True)):
            np.moveaxis(data, dim, 0)[(x < 0) | (x >= size)] = 0
        return data.reshape(shape)

    def write(self, data):
        lists, _ = self._places()
        data = data.reshape([len(x) for x in lists])
        inside = [np.flatnonzero((x >= 0) & (x < size)) for x, size in zip(lists, self.shape, strict=True)]
        self.array[np.ix_(*(x[i] for x, i in zip(lists, inside, strict=True)))] = data[np.ix_(*inside)]


class _At:
    def __init__(self, take):
        self.take = take

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return self.take(tuple(part if isinstance(part, (pl.Slice, slice)) else int(part) for part in index))


class Barriers:
    """Arrivals by phase, of which a waiting group sees the parity and nothing else."""

    def __init__(self, count, arrivals):
        self.arrivals, self.arrived, self.phases = arrivals, [0] * count, [0] * count
        self.waited = {}

    @property
    def at(self):
        return _At(lambda index: (self, index[0]))

    def arrive(self, i):
        self.arrived[i] += 1
        if self.arrived[i] == self.arrivals:
            self.arrived[i] = 0
            self.phases[i] += 1

    def passed(self, i, thread=None):
        return self.phases[i] % 2 != self.waited.get((thread or threading.get_ident(), i), 0)

    def flip(self, i):
        key = threading.get_ident(), i
        self.waited[key] = 1 - self.waited.get(key, 0)


class Accumulator:
    """Registers that matmuls add to."""

    def __init__(self, shape):
        self.shape, self.dtype = shape, jnp.float32
        self.numbers, self.in_flight = np.zeros(shape, np.float32), 0

    def __getitem__(self, index):
        assert index is Ellipsis
        return _load_accumulator(self)

    def __setitem__(self, index, value):
        assert index is Ellipsis and value.shape == self.shape, (value.shape, self.shape)
        if self.in_flight:
            raise RuntimeError("an accumulator is set while a matmul adds to it")
        self.numbers = np.array(value, np.float32)


class Block:
    """A block of threads while it runs."""

    def __init__(self, groups, names, seed):
        self.groups, self.names = groups, names
        self.lock, self.copies, self.waiting, self.alive = threading.Condition(), [], {}, groups
        self.random, self.failure, self.registers = random.Random(seed), None, {}


_here = threading.local()


def _copy_in(source, target, barrier):
    with _here.block.lock:
        assert source.read().shape == target.shape, (source.read().shape, target.shape)
        target.array[...] = JUNK[target.dtype.kind]
        _here.block.copies.append((source, target, barrier))
        _here.block.lock.notify_all()


def _arrive(barrier):
    with _here.block.lock:
        barrier[0].arrive(barrier[1])
        _here.block.lock.notify_all()


def _wait(barrier):
    block = _here.block
    barriers, i = barrier
    with block.lock:
        block.waiting[threading.get_ident()] = barrier
        while not barriers.passed(i):
            if block.failure:
                raise RuntimeError("another group failed")
            # Only what somebody waits for arrives, so that a tile which is read without waiting is seen.
            wanted = [copy for copy in block.copies if copy[2] in block.waiting.values()]
            if wanted:
                source, target, (of, at) = copy = block.random.choice(wanted)
                block.copies.remove(copy)
                target.array[...] = source.read()
                of.arrive(at)
                block.lock.notify_all()
            elif len(block.waiting) == block.alive and not any(
                    other.passed(j, thread) for thread, (other, j) in block.waiting.items()):
                raise RuntimeError("every group waits, and nothing is under way")
            else:
                block.lock.wait(1)
        barriers.flip(i)
        del block.waiting[threading.get_ident()]


def _matmul(accumulator, left, right):
    assert (accumulator.shape, left.shape[1]) == ((left.shape[0], right.shape[1]), right.shape[0])
    assert left.dtype == right.dtype and left.shape[0] == 64 and left.dtype.itemsize == 2
    accumulator.in_flight += 1
    _here.matmuls.append((accumulator, left, right))


def _await_matmuls(in_flight):
    while len(_here.matmuls) > in_flight:
        accumulator, left, right = _here.matmuls.pop(0)
        left, right = (np.asarray(getattr(x, "array", x)).astype(np.float32) for x in (left, right))
        accumulator.numbers = accumulator.numbers + left @ right
        accumulator.in_flight -= 1


def _load_accumulator(accumulator, *, wait_n=0):
    _await_matmuls(wait_n)
    if accumulator.in_flight:
        raise RuntimeError("an accumulator is read while a matmul adds to it")
    return jnp.array(accumulator.numbers)


def _run_scoped(function, *types):
    made = [Accumulator(kind.shape) for kind in types]
    result = function(*made)
    if any(x.in_flight for x in made):
        raise RuntimeError("an accumulator's scope ends while a matmul adds to it")
    return result


def _copy_out(source, target):
    if threading.get_ident() in source.owner.uncommitted:
        raise RuntimeError("shared memory is copied out that was written and not committed")
    _here.stores.append((source, target))


def _await_stores(in_flight, wait_read_only=False):  # noqa: ARG001
    while len(_here.stores) > in_flight:
        source, target = _here.stores.pop(0)
        with _here.block.lock:
            target.write(source.array)


def _commit():
    for shared in _here.shared:
        shared.uncommitted.discard(threading.get_ident())


def _allocate(kind):
    if isinstance(kind, plgpu.Barrier):
        return Barriers(int(np.prod(kind.num_barriers)), kind.num_arrivals)
    assert kind.memory_space == plgpu.SMEM, kind
    dtype = np.dtype(kind.dtype)
    return Shared(np.full(kind.shape, JUNK[dtype.kind], dtype))


def _kernel(body, *, out_type, grid, grid_names, num_threads, thread_name, scratch_types, compiler_params,
            kernel_name):
    assert compiler_params is not None and kernel_name
    single = not isinstance(out_type, (tuple, list))

    def call(*inputs):
        outputs = [np.full(x.shape, np.nan, x.dtype) for x in ([out_type] if single else out_type)]
        references = [Global(np.asarray(x)) for x in inputs] + [Global(x) for x in outputs]
        for seed, place in enumerate(np.ndindex(*grid)):
            block = Block(num_threads, dict(zip(grid_names, place, strict=True)), seed)
            scratch = {name: [_allocate(x) for x in kind] if isinstance(kind, list) else _allocate(kind)
                       for name, kind in scratch_types.items()}

            def run(group, block=block, scratch=scratch):
                _here.block, _here.matmuls, _here.stores = block, [], []
                _here.names = {**block.names, thread_name: group}
                _here.shared = [x for x in jax.tree.leaves(scratch) if isinstance(x, Shared)]
                try:
                    with jax.numpy_rank_promotion("raise"):
                        body(*references, **scratch)
                    if _here.matmuls or _here.stores:
                        raise RuntimeError("a group ends while a matmul or a store of its own is under way")
                except BaseException as error:
                    block.failure = block.failure or error
                with block.lock:
                    block.alive -= 1
                    block.lock.notify_all()

            threads = [threading.Thread(target=run, args=(group,)) for group in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if block.failure:
                raise block.failure
            # More than the register file has, and the hardware would wait forever.
            assert sum(block.registers.values()) <= 65536 // 128 // num_threads // 8 * 8 * num_threads
        return jnp.asarray(outputs[0]) if single else [jnp.asarray(x) for x in outputs]

    return call


def _set_registers(count, *, action):  # noqa: ARG001
    with _here.block.lock:
        _here.block.registers[threading.get_ident()] = count


def _loop(start, stop, step, carry):
    for i in range(int(start), int(stop)):
        carry = step(jnp.int32(i), carry)
    return carry


@contextmanager
def simulated(monkeypatch):
    """Inside of it a Pallas Mosaic GPU kernel that is called runs here."""
    names = {
        "kernel": _kernel, "copy_gmem_to_smem": _copy_in, "copy_smem_to_gmem": _copy_out, "commit_smem": _commit,
        "wait_smem_to_gmem": _await_stores, "barrier_arrive": _arrive, "barrier_wait": _wait, "wgmma": _matmul,
        "wgmma_wait": _await_matmuls, "wgmma_accumulator_load": _load_accumulator,
        "set_max_registers": _set_registers, "layout_cast": lambda x, layout: x,
        "load": lambda reference, index, layout=None: reference[...],
        "broadcasted_iota": lambda dtype, shape, dim, layout: jax.lax.broadcasted_iota(dtype, shape, dim)}
    with monkeypatch.context() as patch:
        for name, replacement in names.items():
            patch.setattr(plgpu, name, replacement)
        patch.setattr(pl, "run_scoped", _run_scoped)
        patch.setattr(pl, "when", lambda condition: lambda function: function() if condition else None)
        patch.setattr(jax.lax, "fori_loop", _loop)
        patch.setattr(jax.lax, "cond", lambda which, yes, no, *operands: (yes if which else no)(*operands))
        patch.setattr(jax.lax, "axis_index", lambda name: jnp.int32(_here.names[name]))
        yield
