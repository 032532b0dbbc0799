"""What the PCI bus says is there, on machines that are described by folders."""

import pytest

from ctllm_jax.cluster.chips import CHIPS
from ctllm_jax.cluster.hardware import _GPUS, _TPUS, Accelerators, cuda_extra, find_accelerators

# (vendor, device, class) of what `lspci -nn` shows of such machines, with their bridges and network cards.
OTHER = [("0x8086", "0x1237", "0x060000"), ("0x1ae0", "0x0042", "0x020000"), ("0x10de", "0x22a3", "0x068000")]
V5P, H100, L4 = ("0x1ae0", "0x0062", "0x120000"), ("0x10de", "0x2330", "0x030200"), ("0x10de", "0x27b8", "0x030200")


def make_bus(folder, devices):
    for number, (vendor, device, kind) in enumerate(devices):
        place = folder / f"0000:00:{number:02x}.0"
        place.mkdir(parents=True)
        for name, value in (("vendor", vendor), ("device", device), ("class", kind)):
            (place / name).write_text(value + "\n")
    return folder


@pytest.mark.parametrize(("devices", "platforms", "found"), [
    ([], "", None), (OTHER, "", None),
    ([*OTHER, *[V5P] * 4], "", Accelerators("tpu", "v5p", 4)),
    ([V5P], "tpu,cpu", Accelerators("tpu", "v5p", 1)), ([V5P], "cpu", None),
    ([*OTHER, *[H100] * 8], "", Accelerators("gpu", "h100", 8)),
    ([H100], "cuda", Accelerators("gpu", "h100", 1)), ([H100], "tpu", None),
    ([L4], "", Accelerators("gpu", "", 1))])
def test_what_is_there(devices, platforms, found, tmp_path):
    bus = make_bus(tmp_path / "bus", devices)
    assert find_accelerators({"JAX_PLATFORMS": platforms} if platforms else {}, bus=bus) == found


def test_a_machine_without_a_bus(tmp_path):
    assert find_accelerators({}, bus=tmp_path / "none") is None


def test_tpus_are_numbered_as_jax_numbers_them():
    from jax._src import hardware_utils

    theirs = {number: version.name for number, version in hardware_utils._TPU_PCI_DEVICE_IDS.items()}
    assert {number: theirs[number] for number in _TPUS} == _TPUS


def test_every_chip_is_one_that_the_tables_know():
    assert {*_TPUS.values(), *_GPUS.values()} <= {chip.name for chip in CHIPS.values()}


@pytest.mark.parametrize(("driver", "extra"), [((580, 65, 6), "cuda13"), ((575, 57), "cuda12"), ((525, 60), "cuda12"),
                                               ((470, 82), None)])
def test_cuda_for_a_driver(driver, extra):
    assert cuda_extra(driver) == extra
