"""`launch.py compile`: real compilers for hardware that is not here, on models that compile in seconds."""

import json

import pytest

from ctllm_jax import cli

SMALL = ["mesh.data=1", "mesh.fsdp=-1"]


def test_a_name_that_is_none_is_refused_before_jax(capsys):
    assert cli.main(["compile", "debug/pretrain", "topology=v5p-250"]) == 2
    assert "counts TensorCores" in capsys.readouterr().err


def test_dry_run_says_what_the_hardware_is(capsys):
    assert cli.main(["compile", "debug/pretrain", "topology=v5p-256,h100:8", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4x4x8 v5p: 128 chips, 256 cores, 128 devices, 32 hosts" in out and "8 x h100" in out


@pytest.mark.aot
def test_a_step_that_fits(tmp_path, capsys):
    output = tmp_path / "compile.json"
    status = cli.main(["compile", "debug/pretrain", "topology=v5e:2x2", f"output={output}", *SMALL])
    out = capsys.readouterr().out
    assert status == 0 and "fits" in out and "xla_tpu_prefer_async_allgather_to_allreduce=True" in out
    result, = json.loads(output.read_text())["results"]
    chosen = result["chosen"]
    # Parameters and two moments in float32, split over four chips; 41,120 of them.
    assert 41_120 <= chosen["memory"]["parameters"] < 41_120 * 1.1
    assert 2 * 41_120 <= chosen["memory"]["optimizer"] < 2 * 41_120 * 1.1
    assert chosen["peak"] == sum(chosen["memory"].values()) < chosen["capacity"]
    kinds = {each["kind"] for each in chosen["collectives"]}
    assert "all-gather" in kinds and all(each["group"] <= 4 for each in chosen["collectives"])
    assert chosen["roofline"]["step"] >= chosen["roofline"]["compute"] > 0


@pytest.mark.aot
def test_it_is_compiled_with_the_flags_that_a_run_there_would_have(tmp_path, capsys, monkeypatch):
    """The chip's preset, less what the user's own variable decides; none where the config says so."""
    name = "xla_tpu_prefer_async_allgather_to_allreduce"
    flags = []
    for setting, own in (("auto", ""), ("auto", f"--{name}=false"), ("none", "")):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", own)
        output = tmp_path / "compile.json"
        assert cli.main(["compile", "debug/pretrain", "topology=v5e:2x2", f"output={output}",
                         f"compute.xla_flags={setting}", *SMALL]) == 0
        flags.append(json.loads(output.read_text())["results"][0]["chosen"]["flags"])
    assert flags == [{name: True}, {}, {}]


@pytest.mark.aot
def test_a_step_that_does_not_fit_is_told_with_what_takes_the_room(capsys):
    status = cli.main(["compile", "debug/pretrain", "topology=v5e:1x1", "model.vocab_size=4000000",
                       "model.hidden_size=512", "attempts=1", *SMALL])
    out = capsys.readouterr().out
    assert status == 1 and "does not fit" in out and "optimizer" in out


@pytest.mark.aot
def test_several_slices_are_a_mesh_with_the_slow_network_along_one_axis(tmp_path, capsys):
    output = tmp_path / "compile.json"
    assert cli.main(["compile", "debug/pretrain", "topology=2*v5e:2x2", f"output={output}", "mesh.data=1",
                     "mesh.fsdp=-1"]) == 0
    chosen = json.loads(output.read_text())["results"][0]["chosen"]
    assert chosen["mesh"] == {"replica": 2, "data": 1, "fsdp": 4, "tensor": 1}
    between = [each for each in chosen["collectives"] if each["crosses"]]
    assert between and {each["kind"] for each in between} == {"all-reduce"}, "gradients alone, over the copies"
    sent = sum(each["sent"] for each in between)
    # A quarter of the parameters' gradients a device, in float32; small ones may be whole.
    assert 41_120 * 4 / 4 * 0.9 < sent < 41_120 * 4
    capsys.readouterr()
    assert cli.main(["compile", "debug/pretrain", "topology=2*v5e:2x2", "mesh.replica=1",
                     "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=8"]) == 2
    assert "mesh.replica, mesh.data or mesh.fsdp must be a multiple of 2" in capsys.readouterr().err
