"""The names that JAX gives to chips."""

import pytest

from ctllm_jax.cluster.chips import find_chip


@pytest.mark.parametrize(("kind", "name"), [
    ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
    ("TPU7x", "tpu7x"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
    ("NVIDIA B200", "b200")])
def test_the_longest_name_counts(kind, name):
    assert find_chip(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "NVIDIA L4", ""])
def test_unknown_chips_have_no_figures(kind):
    assert find_chip(kind) is None
