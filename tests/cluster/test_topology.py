"""Names of hardware, as chips, devices and hosts."""

import pytest

from ctllm_jax.cluster.gpu_target import GPUS, target_config
from ctllm_jax.cluster.topology import parse_topology
from ctllm_jax.config.errors import UserError

# Google Cloud's tables of supported configurations: TensorCores, chips, hosts of each shape.
KNOWN = [
    ("v5p-8", "2x2x1", 4, 8, 1), ("v5p-64", "2x4x4", 32, 64, 8), ("v5p-256", "4x4x8", 128, 256, 32),
    ("v5p:8x8x8", "8x8x8", 512, 1024, 128), ("v4-256", "4x4x8", 128, 256, 32), ("v5litepod-8", "2x4", 8, 8, 1),
    ("v5litepod-16", "4x4", 16, 16, 4), ("v5litepod-256", "16x16", 256, 256, 64), ("v6e-256", "16x16", 256, 256, 64),
    ("v6e:1x1", "1x1", 1, 1, 1), ("tpu7x-128", "4x4x4", 64, 128, 16)]


@pytest.mark.parametrize(("name", "shape", "chips", "cores", "hosts"), KNOWN)
def test_slices_are_those_of_the_tables(name, shape, chips, cores, hosts):
    topology = parse_topology(name)
    assert (topology.shape_name, topology.chips, topology.cores, topology.hosts) == (shape, chips, cores, hosts)
    assert topology.devices == (cores if "tpu7x" in name else chips) and topology.is_tpu


@pytest.mark.parametrize(("name", "devices", "nodes", "chip"), [
    ("h100:1", 1, 1, "h100"), ("h100:8", 8, 1, "h100"), ("h100:64", 64, 8, "h100"), ("a3-highgpu-8g", 8, 1, "h100"),
    ("8*a3-highgpu-8g", 64, 8, "h100"), ("a3-ultragpu-8g", 8, 1, "h200"), ("a4-highgpu-8g", 8, 1, "b200")])
def test_gpus_lie_eight_a_node(name, devices, nodes, chip):
    topology = parse_topology(name)
    assert (topology.devices, topology.slices, topology.hosts) == (devices, nodes, nodes)
    assert topology.chip.name == chip and not topology.is_tpu


def test_several_slices():
    topology = parse_topology("4*v6e-256")
    assert (topology.slices, topology.chips, topology.devices, topology.hosts) == (4, 1024, 1024, 256)
    assert topology.describe() == "4 slices of 16x16 v6e: 1024 chips, 1024 cores, 1024 devices, 256 hosts"


@pytest.mark.parametrize(("name", "message"), [
    ("v5p-250", "counts TensorCores, two a chip; N is one of 8, 16"), ("v5e-12", "counts chips; N is one of 1, 4, 8"),
    ("v5p:4x4", "has 3 sizes, such as 4x4x4"), ("v5e:3x3", "shapes of v5e are 1x1, 2x2"),
    ("v5p:3x3x3", "must be even"), ("h100:12", "at most 8 GPUs"), ("a3-highgpu-16g", "at most 8 GPUs"),
    ("h100", "names look like"), ("v9-8", "names look like"), ("", "names look like"), ("0*v5p-8", "names look like")])
def test_what_is_not_sold_is_said(name, message):
    with pytest.raises(UserError, match="topology=") as raised:
        parse_topology(name)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_described_as_xla_reads_it(name):
    text = target_config(name)
    assert text.count("{") == text.count("}") and f'name: "{GPUS[name].name}"' in text
    major, minor = GPUS[name].capability
    assert f"major: {major} minor: {minor}" in text
