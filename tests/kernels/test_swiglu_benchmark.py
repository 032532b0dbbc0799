"""The benchmark of SwiGLU: what it reads from a compiler's dump, and the table that it writes for `auto`."""

import importlib.util

import jax
import pytest

from ctllm_jax.kernels.swiglu import measured


@pytest.fixture
def benchmark(repository):
    spec = importlib.util.spec_from_file_location("swiglu_benchmark", repository / "benchmarks/swiglu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(what="forward and backward", recompute=True, ratio=1.25, tokens=16384):
    return {"tokens": tokens, "hidden": 2048, "ffn": 5504, "dtype": "bfloat16", "what": what, "recompute": recompute,
            "xla_over_pallas": ratio}


def test_the_written_table_is_read_back(benchmark, tmp_path, monkeypatch):
    """Another chip's rows stay, the same shapes' are renewed, and what is only a forward pass is left out."""
    table = tmp_path / "measured.py"
    table.write_text(benchmark.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(benchmark, "TABLE", table)
    kept, renewed, new = (("v4", "float32", "t1 d1 f1", True), ("v5e", "bfloat16", "t16384 d2048 f4096", True),
                          ("v5e", "bfloat16", "t16384 d2048 f4096", False))
    monkeypatch.setitem(measured.MEASURED, kept, 3.0)
    monkeypatch.setitem(measured.MEASURED, renewed, 3.0)
    expected = measured.MEASURED | {renewed: 1.25, new: 0.5}
    rows = [row(), row("forward", None, 9.0), row(recompute=False, ratio=0.5)]
    for _ in range(2):
        benchmark.write_table(rows, device_kind="TPU v5 lite")
        names = {}
        exec(table.read_text(encoding="utf-8"), names)
        assert names["MEASURED"] == expected
    with pytest.raises(SystemExit, match="no kernel ran on this cpu"):
        benchmark.write_table(rows, device_kind="cpu")


def test_the_model_of_the_mxu(benchmark, tmp_path):
    """Two instructions on one unit wait for each other, on two they do not."""
    dump = tmp_path / "1-kernel-72-final_bundles.txt"
    head = " 0x1   : > { %v1 = vadd.f32 %v0, %v0 }\n"
    other = " 0x4   : > { %v9 = vst [vmem:[#allocation465_spill]] %v1 }\n"
    matmul = " 0x{}   : > {{ %1 = vmatmul.bf16.gmra.mxu{} %v1  ;;  %v2 = vld [vmem:[%s1]] }}\n"
    dump.write_text(head + matmul.format(2, 0) + matmul.format(3, 1) + other)
    counts = benchmark.read_bundles(dump, mxu_cycles=16)
    assert counts == {"bundles": 4, "mxu_instructions": 2, "spill_accesses": 1, "model_cycles": 4}
    dump.write_text(head + matmul.format(2, 0) + matmul.format(3, 0) + other)
    assert benchmark.read_bundles(dump, mxu_cycles=16)["model_cycles"] == 2 + 16 + 1


def test_both_directions_are_timed(benchmark):
    """On the device that is here, with what runs on it."""
    arguments = type("Arguments", (), {"shapes": ["16,8,24"], "dtypes": ["float32"], "rounds": 1})
    rows = list(benchmark.measure_times(arguments))
    assert [row["recompute"] for row in rows] == [None, True, False]
    assert all(row["ms"]["xla"] > 0 and ("pallas" in row["ms"]) == (jax.default_backend() == "tpu") for row in rows)
