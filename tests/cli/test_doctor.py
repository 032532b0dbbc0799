"""`launch.py doctor`: a machine that is well, one with five planted faults, and checks that hang or die."""

import json
import re
import shutil
import time

import pytest

from ctllm_jax.preflight import checks, doctor
from data_prep.train_tokenizer import fit
from tests.cli.conftest import call, text_overrides
from tests.runs import launch
from tests.small_text import make_corpus


def findings(path):
    return {each["check"]: each for each in json.loads(path.read_text())["findings"]}


def examined(corpus, run_dir, *more):
    """The words of a doctor of a run on the corpus."""
    return ["doctor", "debug/pretrain", *text_overrides(corpus), f"run.dir={run_dir}", *more]


def test_a_machine_that_is_well(corpus, tmp_path):
    output = tmp_path / "doctor.json"
    done = launch(*examined(corpus, tmp_path / "run", f"output={output}", f"data.tokenizer={corpus.tokenizer}"))
    assert done.returncode == 0, done.stdout
    found = findings(output)
    assert {each["status"] for each in found.values()} == {"ok"} and not any(each["fix"] for each in found.values())
    assert {"versions", "processes", "flags", "programs", "devices", "ops", "memory", "dataset", "tokenizer",
            "checkpoints", "clock"} <= found.keys()
    assert "zh" in found["dataset"]["text"] and "epochs" in found["dataset"]["text"]
    assert found["ops"]["text"] == "attention: xla, swiglu: xla" and "1 x cpu" in found["devices"]["text"]
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_five_faults_at_once_are_named_each_with_its_fix(corpus, tmp_path):
    """Another tokenizer than the data's, no room, a flag that died, a coordinator nobody knows, an open cache."""
    other = tmp_path / "other.model"
    other.write_bytes(fit([f"其他 text {number}" for number in range(99)], vocab_size=280, character_coverage=1.0))
    cache, output = tmp_path / "cache", tmp_path / "doctor.json"
    cache.mkdir()
    cache.chmod(0o777)
    done = launch(*examined(corpus, tmp_path / "run", f"output={output}", f"data.tokenizer={other}",
                            "model.vocab_size=4000000", "model.hidden_size=65536",
                            f"compute.compilation_cache={cache}"),
                  XLA_FLAGS="--xla_gpu_enable_async_all_gather=true", JAX_COORDINATOR_ADDRESS="nowhere.invalid:1234",
                  JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    assert done.returncode == 1, done.stdout
    found = findings(output)
    for check, status, text, fix in (
            ("network", "fail", "nowhere.invalid:1234 cannot be found", "JAX_COORDINATOR_ADDRESS=HOST:PORT"),
            ("flags", "fail", r"XLA_FLAGS has xla_gpu_enable_async_all_gather, which jaxlib [\d.]+ does not know",
             "take it out of XLA_FLAGS"),
            ("dataset", "fail", "is not the tokenizer that data.sources", "prepare the sources with one tokenizer"),
            ("checkpoints", "fail", "two checkpoints take .* GiB, and .* free", "larger disk"),
            ("programs", "warn", "whoever writes there runs code", "chmod o-w"),
            ("devices", "fail", "unknown flag xla_gpu_enable_async_all_gather", "see flags")):
        each = found[check]
        assert each["status"] == status and re.search(text, each["text"]) and fix in each["fix"], each
        assert f"fix: {each['fix']}" in done.stdout
    assert found["versions"]["status"] == found["processes"]["status"] == found["tokenizer"]["status"] == "ok"


def subject(config=None, **environment):
    return doctor.Subject(config, "pretrain", {"JAX_PLATFORMS": "cpu", **environment})


def only(found):
    each, = found
    return each


def test_a_directory_that_cannot_be_written(corpus):
    config = load_debug(run_dir="/proc/ctllm")
    each = only(checks.check_checkpoints(subject(config)))
    assert each.status == "fail" and "/proc cannot be written" in each.text and each.fix.startswith("run.dir=DIR")


def test_a_bucket_is_no_file_system():
    each = only(checks.check_checkpoints(subject(load_debug(run_dir="gs://bucket/run"))))
    assert each.status == "fail" and "mount the bucket" in each.fix


def test_a_truncated_shard(tmp_path):
    corpus = make_corpus(tmp_path)
    shard = next((corpus.folder / "zh").glob("*train*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    config = load_debug(*text_overrides(corpus))
    each = only(checks.check_dataset(subject(config)))
    assert each.status == "fail" and str(shard) in each.text and "data verify" in each.fix
    shutil.rmtree(corpus.folder / "zh")
    each = only(checks.check_dataset(subject(config)))
    assert each.status == "fail" and f"zh={corpus.folder / 'zh'}" in each.text


def test_a_length_that_does_not_fit_the_records(corpus):
    config = load_debug(*text_overrides(corpus), "batch.sequence_length=48", "batch.tokens=480")
    each = only(checks.check_dataset(subject(config)))
    assert each.status == "fail" and "record_tokens" in each.text and "batch.sequence_length" in each.fix


@pytest.mark.parametrize(("environment", "text", "fix"), [
    ({"XLA_FLAGS": "--xla_tpu_scoped_vmem_limit_kib=1"}, "ends every process", "LIBTPU_INIT_ARGS"),
    ({"XLA_FLAGS": "--xla_gpu_all_gather_combine_threshold_bytes=lots"}, "XLA_FLAGS", "XLA_FLAGS"),
    pytest.param({"LIBTPU_INIT_ARGS": "--xla_tpu_nonsense=true"}, "LIBTPU_INIT_ARGS has xla_tpu_nonsense",
                 "take it out", marks=pytest.mark.aot),
    pytest.param({"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=abc"},
                 "xla_tpu_scoped_vmem_limit_kib=abc is no value", "correct it", marks=pytest.mark.aot)])
def test_flags_that_would_end_a_run(environment, text, fix):
    each = only(checks.check_flags(subject(**environment)))
    assert each.status == "fail" and text in each.text and fix in each.fix


def test_a_port_that_is_taken_and_a_proxy(monkeypatch):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("https_proxy", "http://proxy:3128")
        found = checks.check_processes(subject(**names))
    assert [each.status for each in found] == ["ok", "fail", "warn"]
    assert "is taken" in found[1].text and "no_proxy=127.0.0.1" in found[2].fix


@pytest.mark.parametrize(("driver", "plugins", "status", "fix"), [
    ("580.95.05", {"jax-cuda13-plugin": "0.10.2"}, "ok", ""),
    ("550.54.15", {"jax-cuda13-plugin": "0.10.2"}, "fail", "ctllm-jax[cuda12]"),
    ("580.95.05", {}, "fail", "ctllm-jax[cuda13]"),
    ("550.54.15", {}, "fail", "ctllm-jax[cuda12]"),
    ("470.82.01", {"jax-cuda12-plugin": "0.10.2"}, "fail", "update it to 525"),
    ("580.95.05", {"jax-cuda13-plugin": "0.10.1"}, "fail", "pip install -U 'ctllm-jax[cuda13]'"),
    ("580.95.05", {"jax-cuda13-plugin": "0.10.2", "jax-cuda12-plugin": "0.10.2"}, "fail",
     "pip uninstall jax-cuda12-plugin")])
def test_which_cuda_fits_the_driver(driver, plugins, status, fix, tmp_path, monkeypatch):
    from ctllm_jax.cluster import hardware

    # The text of an H100 machine's /proc/driver/nvidia/version, with other numbers.
    path = tmp_path / "version"
    path.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"
                    "GCC version: 12.3.0\n")
    number = hardware.nvidia_driver(path)
    assert ".".join(f"{part:02d}" for part in number) == driver
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: number)
    monkeypatch.setattr(checks, "_version", {"jaxlib": "0.10.2", **plugins}.get)
    each = only(checks.check_driver(subject()))
    assert each.status == status and fix in each.fix


def test_a_check_that_hangs_is_left_and_one_that_breaks_is_told(monkeypatch):
    def hang(subject):
        time.sleep(600)

    def breaks(subject):
        raise RuntimeError("oops")

    monkeypatch.setattr(checks, "CHECKS", {"disk": hang, "odd": breaks})
    monkeypatch.setattr(checks, "CHILDREN", ())
    found = list(doctor.examine(subject(), seconds=0.2))
    assert [(each.check, each.status) for each in found] == [("disk", "fail"), ("odd", "fail")]
    assert "no answer in 0.2 s" in found[0].text and "RuntimeError: oops" in found[1].text


def test_a_process_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(doctor, "_CHILD", "import time; time.sleep(600)")
    each = only(doctor._in_process("devices", subject(), 0.5))
    assert "no answer" in each.text


def test_keys_and_their_slips(tmp_path):
    assert "a key of a run, and no CONFIG" in call("doctor", "steps=3").err
    assert "did you mean optimizer.lr?" in call("doctor", "debug/pretrain", "optimizer.lrr=3").err
    assert call("doctor", "debug/pretrain", "stage=dpoo").status == 2
    assert "stage: pretrain" in call("doctor", "debug/pretrain", "--print-config").out


def load_debug(*overrides, run_dir="runs/x"):
    from ctllm_jax.config.load import load
    from ctllm_jax.config.pretrain import PretrainConfig

    return load(PretrainConfig, target="debug/pretrain", overrides=[*overrides, f"run.dir={run_dir}"])
