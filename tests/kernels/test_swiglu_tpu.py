"""The TPU kernels of SwiGLU: interpreted against float64, with NaN in all memory that nobody wrote and every race a
failure, and compiled by TPU's own compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.test_util import check_grads

from ctllm_jax import kernels, sharding
from ctllm_jax.kernels.swiglu import measured, tpu
from ctllm_jax.kernels.swiglu.blocks import CHIPS, Blocks, choose_blocks, find_chip
from ctllm_jax.kernels.swiglu.tpu import swiglu_tpu

BLOCKS = Blocks(tokens=32, ffn=256, hidden=128, rows=16)
FUNCTION = partial(swiglu_tpu, chip=CHIPS["TPU v5e"], blocks=BLOCKS)

# (leading dims, D, F): less than a tile; blocks that end inside of the array, one chunk of rows left, one column block
# that is cut, a contraction of several steps with a rest; whole blocks; one step of everything.
SHAPES = [((9,), 24, 40), ((2, 41), 300, 300), ((64,), 256, 512), ((2, 3, 4), 128, 129), ((1,), 1, 1)]


@pytest.fixture
def interpreted():
    """Kernels run on the CPU as on a TPU: reads out of bounds raise, fresh memory is NaN, races are looked for."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    races = interpret_pallas_call.races
    assert races is not None and not races.races_found


@pytest.fixture
def pretended(monkeypatch):
    """The CPU counts as a TPU v5e."""
    monkeypatch.setitem(CHIPS, jax.devices()[0].device_kind, CHIPS["TPU v5e"])


def draw(leading, hidden, ffn, *, dtype=jnp.float32, seed=0):
    """x, gate, up and h's cotangent."""
    draws = np.random.default_rng(seed)
    shapes = (*leading, hidden), (hidden, ffn), (hidden, ffn), (*leading, ffn)
    return [jnp.asarray(draws.standard_normal(shape) / np.sqrt(shape[0] if i in (1, 2) else 1), dtype)
            for i, shape in enumerate(shapes)]


def value_and_gradients(function):
    """`(x, gate, up, dh) -> (h, dx, dgate, dup)`, jitted."""
    def run(*inputs):
        h, pullback = jax.vjp(function, *inputs[:3])
        return h, *pullback(inputs[3])
    return jax.jit(run)


def in_float64(x, gate, up, dh):
    """The same in numpy."""
    leading = x.shape
    x, gate, up, dh = (np.asarray(a, np.float64) for a in (x, gate, up, dh))
    x, dh = x.reshape(-1, x.shape[-1]), dh.reshape(-1, dh.shape[-1])
    g, u = x @ gate, x @ up
    share = 1 / (1 + np.exp(-g))
    dg, du = dh * u * share * (1 + g * (1 - share)), dh * g * share
    return (g * share * u).reshape(*leading[:-1], -1), (dg @ gate.T + du @ up.T).reshape(leading), x.T @ dg, x.T @ du


def assert_close(ours, exact, tolerance):
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(np.asarray(mine, np.float64), theirs, rtol=0,
                                   atol=tolerance * max(np.abs(theirs).max(), 1e-2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_equal_float64(shape, dtype, interpreted):
    inputs = draw(*shape, dtype=dtype)
    ours = value_and_gradients(FUNCTION)(*inputs)
    assert all(array.dtype == dtype for array in ours)
    assert_close(ours, in_float64(*inputs), 2e-6 if dtype == jnp.float32 else 0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_kept_products_give_the_same_gradients(dtype, interpreted):
    inputs = draw((2, 41), 300, 300, dtype=dtype, seed=1)
    assert_close(value_and_gradients(partial(FUNCTION, recompute=False))(*inputs), in_float64(*inputs),
                 2e-6 if dtype == jnp.float32 else 0.02)


def test_blocks_of_a_chip_give_the_same(interpreted):
    """Those that are tuned, on a few tokens."""
    inputs = draw((20,), 200, 700, seed=2)
    assert_close(value_and_gradients(partial(swiglu_tpu, chip=CHIPS["TPU v4"]))(*inputs), in_float64(*inputs), 2e-6)


def test_gradients_equal_finite_differences(interpreted):
    inputs = draw((9,), 24, 40, seed=3)[:3]
    check_grads(jax.jit(FUNCTION), inputs, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_large_gates_stay_finite(interpreted):
    function = value_and_gradients(FUNCTION)
    x, gate, up, dh = draw((9,), 24, 40, seed=4)
    for factor in (-1e4, 1e4):
        assert all(np.all(np.isfinite(array)) for array in function(factor * x, gate, up, dh))


def test_vmap_is_a_loop(interpreted):
    x, gate, up, dh = draw((2, 20), 40, 140, seed=5)
    mapped = jax.jit(jax.vmap(value_and_gradients(FUNCTION), in_axes=(0, None, None, 0)))(x, gate, up, dh)
    for row in range(2):
        assert_close([array[row] for array in mapped], in_float64(x[row], gate, up, dh[row]), 2e-6)


def test_vmap_over_weights_too(interpreted):
    x, gate, up, dh = draw((20,), 40, 140, seed=7)
    gates, cotangents = jnp.stack([gate, 2 * gate]), jnp.stack([dh, -dh])
    mapped = jax.jit(jax.vmap(value_and_gradients(FUNCTION), in_axes=(None, 0, None, 0)))(x, gates, up, cotangents)
    for row in range(2):
        assert_close([array[row] for array in mapped], in_float64(x, gates[row], up, cotangents[row]), 2e-6)


def test_no_tokens_and_no_kernel():
    x, gate, up, _ = draw((0,), 24, 40)
    assert FUNCTION(x, gate, up).shape == (0, 40)


def mesh_of(**sizes):
    sizes = {"replica": 1, **sizes}
    return Mesh(np.asarray(jax.devices()).reshape(*sizes.values()), tuple(sizes))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_on_a_mesh(sizes, interpreted, pretended):
    """Rows over data and fsdp, D of the weights gathered over fsdp, F over tensor; gradients come back split alike."""
    mesh = mesh_of(**dict(zip(sharding.AXES[-len(sizes):], sizes, strict=True)))
    inputs = draw((4, 6), 32, 80, seed=6)
    rows, weight = (sharding.partition_spec(dims) for dims in (("batch", None, None), ("embed", "ffn")))
    inputs = [jax.device_put(array, jax.NamedSharding(mesh, spec))
              for array, spec in zip(inputs, (rows, weight, weight, rows), strict=True)]
    function = sharding.swiglu_on(mesh, implementation="pallas", recompute=True)
    h, *slopes = value_and_gradients(function)(*inputs)
    assert_close([h, *slopes], in_float64(*inputs), 2e-6)
    assert h.sharding.spec[-1] == "tensor"
    assert all(slope.sharding.is_equivalent_to(jax.NamedSharding(mesh, weight), 2) for slope in slopes[1:])


def test_a_mesh_that_does_not_divide_is_an_error(pretended):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    function = sharding.swiglu_on(mesh, implementation="pallas", recompute=True)
    with pytest.raises(ValueError, match=r"first dim of x must be a multiple of 4 .*and F of 2 \(tensor\)"):
        function(*draw((6, 2), 32, 80)[:3])


def wide_residuals(recompute):
    _, pullback = jax.vjp(partial(FUNCTION, recompute=recompute), *draw((32,), 24, 256)[:3])
    return [x for x in jax.tree.leaves(pullback) if x.shape == (32, 256)]


def test_what_the_backward_pass_keeps(interpreted):
    assert wide_residuals(recompute=True) == []
    assert len(wide_residuals(recompute=False)) == 2


def kernels_in(jaxpr, found=()):
    """Names of all kernels in a jaxpr, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found = (*found, equation.params["name"])
        for inner in jaxprs_in_params(equation.params):
            found = kernels_in(inner, found)
    return found


@pytest.mark.parametrize(("saved", "forwards"), [("wide", 1), ("other", 2)])
def test_a_saved_name_spares_the_forward_kernel(saved, forwards):
    inputs = draw((32,), 24, 256)[:3]

    def block(x, gate, up):
        return jnp.sum(jnp.square(checkpoint_name(FUNCTION(x, gate, up), "wide")))

    policy = jax.checkpoint_policies.save_only_these_names(saved)
    jaxpr = jax.make_jaxpr(jax.grad(jax.checkpoint(block, policy=policy), argnums=(0, 1, 2)))(*inputs)
    names = kernels_in(jaxpr.jaxpr)
    assert names.count("swiglu_forward") == forwards and names.count("swiglu_backward") == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kind", CHIPS)
def test_the_chips_own_blocks_keep_its_limits(kind, itemsize):
    for tokens, hidden, ffn in ((16384, 2048, 5504), (100_000, 8192, 28672), (1, 1, 1), (4096, 16384, 53248)):
        choose_blocks(CHIPS[kind], tokens=tokens, hidden=hidden, ffn=ffn, itemsize=itemsize)


@pytest.mark.parametrize(("changed", "complaint"), [
    ({"ffn": 200}, r"blocks\.ffn=200 must be a multiple of 128, the columns of a tile"),
    ({"hidden": 64}, r"blocks\.hidden=64 must be a multiple of 128"),
    ({"rows": 8}, r"blocks\.rows=8 must be a multiple of 16, the rows of a tile of 2-byte elements"),
    ({"tokens": 300}, r"blocks\.tokens=300 must be a multiple of 256, blocks\.rows"),
    ({"rows": 0}, r"blocks\.rows=0 must be"),
    ({"ffn": 1024}, r"needs 36\.50 MiB of VMEM \(x 4\.00, gate and up 16\.00, wide blocks 6\.00, products 6\.00,"
                    r" compiler 0\.50, sums over hidden 4\.00\).*may take 16 MiB on v4"),
])
def test_blocks_that_break_a_limit_are_named(changed, complaint):
    sizes = {"tokens": 512, "ffn": 256, "hidden": 2048, "rows": 256} | changed
    with pytest.raises(ValueError, match=complaint):
        choose_blocks(CHIPS["TPU v4"], tokens=8192, hidden=4096, ffn=5504, itemsize=2, blocks=Blocks(**sizes))


def test_what_cannot_run_says_why(pretended):
    x, gate, up, _ = draw((9,), 24, 40, dtype=jnp.float16)
    with pytest.raises(ValueError, match="kernels take bfloat16 and float32, and this is float16; what can: xla"):
        kernels.swiglu(x, gate, up, implementation="pallas")
    with pytest.raises(ValueError, match="this is bfloat16 with float16"):
        kernels.swiglu(x.astype(jnp.bfloat16), gate, up, implementation="pallas")


def test_auto_takes_what_was_measured_to_be_faster(pretended, monkeypatch):
    from ctllm_jax.kernels.swiglu import chosen, shape_class

    assert shape_class(16384, 2048, 5504) == shape_class(20000, 4000, 8000) == "t16384 d2048 f4096"
    asked = {"dtype": "bfloat16", "shape": (16384, 2048, 5504), "recompute": False}
    entry = ("v5e", "bfloat16", "t16384 d2048 f4096", False)
    monkeypatch.delitem(measured.MEASURED, entry, raising=False)
    assert chosen(**asked) == "xla"
    for ratio, name in ((1.02, "pallas"), (0.99, "xla")):
        monkeypatch.setitem(measured.MEASURED, entry, ratio)
        assert chosen(**asked) == name
    monkeypatch.setitem(measured.MEASURED, entry, 2.0)
    for other in ({"recompute": True}, {"dtype": "float32"}, {"shape": (9, 24, 40)}):
        assert chosen(**asked | other) == "xla"


# Compiled for chips that are not here.

SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def devices_of(name):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=SLICES[name]).devices


def compile_kernels(name, tokens, hidden, ffn, *, dtype=jnp.bfloat16, blocks=None, vmem=None, only=None):
    """Both kernels of a chip, without the matmuls that XLA does behind them."""
    device = devices_of(name)[0]
    chip = find_chip(device.device_kind)
    place = jax.sharding.SingleDeviceSharding(device)
    x, gate, up, dh = (jax.ShapeDtypeStruct(shape, dtype, sharding=place)
                       for shape in ((tokens, hidden), (hidden, ffn), (hidden, ffn), (tokens, ffn)))
    blocks = choose_blocks(chip, tokens=tokens, hidden=hidden, ffn=ffn, itemsize=jnp.dtype(dtype).itemsize,
                           blocks=blocks)
    plan = tpu.Plan(blocks, vmem or chip.vmem_bytes, recompute=True)
    runs = {"forward": (lambda x, gate, up: tpu._swiglu(x, gate, up, plan), (x, gate, up)),
            "backward": (partial(tpu.products_gradient, plan=plan), (x, gate, up, dh))}
    return {key: jax.jit(function).lower(*inputs).compile() for key, (function, inputs) in runs.items()
            if only in (None, key)}


@pytest.mark.aot
@pytest.mark.parametrize("name", SLICES)
def test_compiles_for_the_model(name):
    """No temporaries in HBM, and a cost that the compiler can count with."""
    for key, compiled in compile_kernels(name, 4096, 2048, 5504).items():
        assert compiled.memory_analysis().temp_size_in_bytes == 0, key
        assert compiled.cost_analysis()["flops"] == 4 * 4096 * 2048 * 5504, key


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [(1000, 300, 700), (1, 2048, 5504), (777, 5000, 1000), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("name", SLICES)
def test_compiles_for_odd_shapes(name, shape, dtype):
    compile_kernels(name, *shape, dtype=dtype)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", SLICES)
def test_no_kernel_takes_more_vmem_than_is_counted(name, dtype):
    """The compiler's own check, at the limit that our sum gives."""
    itemsize = jnp.dtype(dtype).itemsize
    for hidden in (2048, 5000):
        blocks = choose_blocks(CHIPS[devices_of(name)[0].device_kind], tokens=4096, hidden=hidden, ffn=5504,
                               itemsize=itemsize)
        counted = sum(blocks.vmem(hidden=hidden, itemsize=itemsize).values())
        compile_kernels(name, 4096, hidden, 5504, dtype=dtype, vmem=counted)


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_the_train_step_takes_it_on_a_slice(remat):
    """A decoder on a mesh, jitted with shardings, scanned: the kernels are in it, and a reduce-scatter."""
    from ctllm_jax.config.load import load
    from ctllm_jax.config.pretrain import PretrainConfig
    from ctllm_jax.training.run import plan_step

    overrides = ["model.vocab_size=4096", "model.hidden_size=256", "model.num_layers=2", "model.num_heads=2",
                 "model.num_kv_heads=2", "model.head_dim=128", "model.ffn_size=768", "model.context_length=512",
                 "batch.sequence_length=512", "batch.tokens=8192", "compute.dtype=bfloat16", "mesh.data=1",
                 "mesh.fsdp=2", "mesh.tensor=2", "compute.loss_chunk=512", "compute.scan_layers=true",
                 f"compute.remat={remat}", "compute.swiglu=pallas"]
    config = load(PretrainConfig, target="debug/pretrain", overrides=overrides)
    text = plan_step(config, sharding.make_mesh(config.mesh.model_dump(), devices_of("v5e"))).compile().as_text()
    backward = "swiglu_backward" if remat == "none" else "swiglu_forward_keep"
    assert "swiglu_forward" in text and backward in text and "reduce-scatter" in text
