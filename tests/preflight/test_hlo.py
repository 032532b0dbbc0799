"""Collectives and arrays of compiled programs: of real ones on eight CPU devices, and of lines as TPU's compiler
writes them."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ctllm_jax.preflight.hlo import Collective, Program

ROUNDS = 5
SPLIT, WHOLE = PartitionSpec("fsdp"), PartitionSpec()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, function, *shapes, spec=SPLIT, out=WHOLE):
    inner = jax.shard_map(function, mesh=mesh, in_specs=(spec,) * len(shapes), out_specs=out, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape in shapes]
    return jax.jit(inner).lower(*arguments).compile().as_text()


def test_a_gather_counts_as_often_as_its_loop_goes_round(mesh):
    def gather(x):
        def step(total, _):
            # What is gathered changes from round to round, or it would be gathered once.
            whole = jax.lax.all_gather(x * jnp.sin(total), "fsdp", tiled=True)
            return total + jnp.sum(whole), None
        return jax.lax.scan(step, jnp.float32(1), None, length=ROUNDS)[0]

    found, = [each for each in Program(compiled(mesh, gather, (64, 32))).collectives() if each.kind == "all-gather"]
    assert (found.payload, found.group, found.times) == (64 * 32 * 4, 4, ROUNDS)
    assert found.sent == 64 * 32 * 4 * 3 // 4 * ROUNDS and not found.asynchronous


@pytest.mark.parametrize(("reduce", "kind", "payload", "group"), [
    (partial(jax.lax.psum, axis_name="data"), "all-reduce", 16 * 32 * 4, 2),
    (partial(jax.lax.psum, axis_name=("data", "fsdp")), "all-reduce", 16 * 32 * 4, 8),
    (partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True), "reduce-scatter", 16 * 32 * 4, 4),
    (partial(jax.lax.ppermute, axis_name="fsdp", perm=[(0, 1), (1, 2)]), "collective-permute", 16 * 32 * 4, 2),
    (partial(jax.lax.all_to_all, axis_name="fsdp", split_axis=0, concat_axis=1, tiled=True), "all-to-all",
     16 * 32 * 4, 4)])
def test_each_kind_is_seen_with_its_bytes(mesh, reduce, kind, payload, group):
    text = compiled(mesh, reduce, (64, 32), out=SPLIT)
    found = {each.kind: each for each in Program(text).collectives()}[kind]
    assert (found.payload, found.group) == (payload, group)


def test_a_ring_sends_twice_for_a_sum_and_once_for_the_rest():
    one = Collective("all-reduce", 1000, 4, 3, False, False, "")
    assert one.sent == round(1000 * 2 * 3 / 4 * 3)
    assert Collective("all-gather", 1000, 4, 1, True, False, "").sent == 750
    assert Collective("collective-permute", 1000, 2, 2, True, False, "").sent == 2000


def module(*lines, computations=""):
    return f"HloModule m\n\n{computations}\nENTRY %main (p: f32[8]) -> f32[8] {{\n" + "\n".join(lines) + "\n}\n"


def test_a_sum_in_a_fusion_that_keeps_a_part_is_a_reduce_scatter():
    inner = """%all-reduce-scatter.1 (p0: f32[1024]) -> f32[64] {
  %p0 = f32[1024]{0:T(1024)} parameter(0)
  %ar = f32[1024]{0:T(1024)} all-reduce(%p0), channel_id=3, replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %ds = f32[64]{0} dynamic-slice(%ar), dynamic_slice_sizes={64}
}
"""
    text = module("  ROOT %f = f32[64]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", computations=inner)
    found, = Program(text).collectives()
    assert (found.kind, found.payload, found.group, found.sent) == ("reduce-scatter", 4096, 16, 3840)


def test_the_pieces_of_an_asynchronous_one_are_one():
    piece = """%NAME (p0: bf16[128,64]) -> bf16[2048,64] {
  %p0 = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag = bf16[2048,64]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=mesh['a'=16,'b'=1] {'a'}
}
"""
    inner = piece.replace("NAME", "fused.1") + piece.replace("NAME", "async_collective_fusion.2")
    text = module("  %f = bf16[2048,64]{1,0} fusion(%p), kind=kCustom, calls=%fused.1",
                  "  ROOT %g = bf16[2048,64]{1,0} fusion(%f), kind=kCustom, calls=%async_collective_fusion.2",
                  computations=inner)
    found, = Program(text).collectives()
    assert found.asynchronous and (found.payload, found.group, found.times) == (2048 * 64 * 2, 16, 1)


@pytest.mark.parametrize(("groups", "crosses"), [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", False), ("replica_groups={{0,4},{1,5}}", True),
    ("replica_groups=[2,4]<=[8]", False), ("replica_groups=[4,2]<=[2,4]T(1,0)", True),
    ("source_target_pairs={{0,1},{1,2}}", False), ("source_target_pairs={{3,4}}", True),
    ("replica_groups=mesh['x'=2,'y'=4] {'y'}", False), ("replica_groups=mesh['x'=2,'y'=4] {'x'}", True)])
def test_what_leaves_a_slice_is_told_apart(groups, crosses):
    kind = "collective-permute" if "source" in groups else "all-reduce"
    text = module(f"  ROOT %c = f32[8]{{0}} {kind}(%p), channel_id=1, {groups}, to_apply=%add")
    found, = Program(text, per_slice=4).collectives()
    assert found.crosses is crosses


def test_a_loop_without_a_count_is_told_by_its_condition():
    inner = """%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  ROOT %r = f32[8]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1}}, to_apply=%add
}

%cond (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  %n = s32[]{:T(128)} constant(32)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
"""
    text = module("  ROOT %w = (s32[], f32[8]{0}) while(%p), condition=%cond, body=%body", computations=inner)
    found, = Program(text).collectives()
    assert found.times == 32


def test_the_largest_arrays(mesh):
    text = compiled(mesh, lambda x: jnp.sum(jax.lax.sort(jnp.tanh(jax.lax.all_gather(x, "fsdp", tiled=True)))),
                    (64, 32))
    largest = Program(text).largest()
    assert largest[0].type == "f32[64,32]" and largest[0].size == 64 * 32 * 4


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("nothing")


def test_what_goes_between_slices_is_a_send_that_says_so():
    text = module('  ROOT %s = (f32[1024]{0}, u32[], token[]) send(%p, %t), channel_id=1, is_host_transfer=true, '
                  'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE",'
                  '_xla_megascale_target="{{0,4},{1,5}}"}')
    found, = Program(text, per_slice=4).collectives()
    assert (found.kind, found.payload, found.crosses, found.asynchronous) == ("all-reduce", 4096, True, True)


def test_several_in_one_start_are_all_sent():
    text = module("  %a = (f32[1024]{0}, f32[1024]{0}) all-reduce-start(%p, %p), channel_id=1, "
                  "replica_groups={{0,1}}, to_apply=%add",
                  "  ROOT %g = ((f32[8]{0}, f32[8]{0}), (f32[16]{0}, f32[16]{0})) all-gather-start(%p, %p), "
                  "channel_id=2, replica_groups={{0,1}}, dimensions={0}")
    assert sorted(each.payload for each in Program(text).collectives()) == [128, 8192]


def test_no_group_is_all_devices():
    text = module("  ROOT %r = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add")
    found, = Program(text.replace("HloModule m", "HloModule m, num_partitions=16")).collectives()
    assert found.group == 16
