"""The sbatch script, as files to read; and what of a job is refused before it is written."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from ctllm_jax.config.job_slurm import SlurmJobConfig, seconds_of
from ctllm_jax.config.types import without_none
from tests.cli.conftest import call
from tests.runs import REPOSITORY

GOLDEN = Path(__file__).with_name("golden")
# The command of each golden file; `python launch.py job slurm … job.output=FILE` writes it anew.
COMMANDS = {
    "h100_8_nodes": ("ct_llm_2b/pretrain", "data=/data/map_cc", "job.nodes=8", "job.gpu_type=h100",
                     "job.cpus_per_task=12", "job.memory=0", "job.partition=gpu", "job.account=llm", "job.qos=high",
                     "job.constraint=ib", "job.venv=/shared/venv", "job.exclusive=true", "job.time=2-00:00:00",
                     "job.sbatch=--reservation=llm,--comment=2B"),
    "container_task_a_node": ("quickstart/sft", "init=runs/base@2000", "data=it's.jsonl", "job.stage=sft",
                              "job.task_per=node", "job.container=/images/ctllm.sqsh", "job.mounts=/data,/s:/scratch",
                              "job.directory=/shared/a b", "log.wandb_project=llm", "job.launcher=ctllm"),
    "cpu_apptainer": ("debug/pretrain", "job.nodes=2", "job.gpus_per_node=0", "job.container=ctllm.sif",
                      "job.container_runtime=apptainer", "job.mounts=/data", "job.setup=[module load apptainer]",
                      "job.notice=60", "job.time=30"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_script_is_the_golden_one_and_a_shell_reads_it(name, tmp_path):
    script = tmp_path / "job.sbatch"
    printed = call("job", "slurm", *COMMANDS[name], f"job.output={script}")
    assert printed.status == 0 and f"sbatch {script}" in printed.out, printed.err
    assert script.read_text() == (GOLDEN / f"{name}.sbatch").read_text()
    assert call("job", "slurm", *COMMANDS[name]).out == script.read_text()
    read = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert read.returncode == 0 and not read.stderr


STUBS = """
srun() {{
  trap 'kill $!; exit 75' USR1; echo started
  [ -n "$WAIT" ] && {{ sleep 30 >/dev/null & wait; }}
  exit "$STATUS"
}}
scontrol() {{ [ "$1" = show ] && echo "JobId=7 JobState=$STATE" || echo "SCONTROL $*"; }}
SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1
"""


def run_script(tmp_path, *, status="0", state="RUNNING", signal=None):
    """The script with `srun` and `scontrol` that only say what they were told; its status, and what it printed."""
    text = call("job", "slurm", "debug/pretrain", "job.gpus_per_node=0").out
    script = tmp_path / "job.sh"
    script.write_text(STUBS.format() + text)
    process = subprocess.Popen(["bash", script], stdout=subprocess.PIPE, text=True, env={
        "PATH": "/usr/bin:/bin", "STATUS": status, "STATE": state, "WAIT": "1" if signal else ""})
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line)
            if signal and line == "started\n":
                process.send_signal(signal)
    return process.returncode, "".join(lines)


@pytest.mark.parametrize("status", ["0", "1", "2", "75", "130", "137"])
def test_only_one_status_comes_back(tmp_path, status):
    code, out = run_script(tmp_path, status=status)
    assert code == int(status) and ("SCONTROL requeue 7" in out) == (status == "75") and f"status {status} at" in out


def test_a_cancelled_job_does_not_come_back(tmp_path):
    code, out = run_script(tmp_path, status="75", state="COMPLETING")
    assert code == 75 and "SCONTROL" not in out and "it does not come back" in out


@pytest.mark.parametrize("number", [10, 15])
def test_the_shell_tells_the_processes_and_waits_for_them(tmp_path, number):
    code, out = run_script(tmp_path, signal=number)
    assert code == 75 and "SCONTROL requeue 7" in out


TEXTS = [name for name, info in SlurmJobConfig.model_fields.items()
         if without_none(info.annotation)[0] in (str, list[str]) and name not in ("site", "output", "setup", "time")]
ATTACKS = ("x\ntouch pwned", "x;touch pwned", "$(touch pwned)", "`touch pwned`", "x' ; touch pwned '",
           'x"; touch pwned #', "x --wrap=pwned", "x &touch pwned", "x\u2028touch pwned")


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_of_somebody_elses_config_becomes_a_command(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quoted = TEXTS if attack.count("'") + attack.count('"') == 0 else [
        name for name in TEXTS if name not in ("sbatch", "launcher")]  # these are read as words, where quotes pair
    job = {name: [f"--{attack}"] if name in ("sbatch", "mounts") else attack for name in quoted}
    Path("site.yaml").write_text(json.dumps({"job": {"gpus_per_node": 0, **job}}))
    Path("run.yaml").write_text(json.dumps({"extends": str(REPOSITORY / "configs/debug/pretrain.yaml"),
                                            "run": {"dir": attack}}))
    for runtime in ("pyxis", "apptainer"):
        printed = call("job", "slurm", "run.yaml", "job.site=site.yaml", f"job.container_runtime={runtime}")
        if not attack.isprintable():
            assert printed.status == 2 and printed.out == ""
            assert printed.err.count("control character") == len(TEXTS) + 1, "each key is named"
            continue
        assert printed.status == 0, printed.err
        lines = [shlex.split(line) for line in printed.out.splitlines() if line.startswith("#SBATCH ")]
        assert all(len(words) == 2 for words in lines[:-1]), "an option stays one word, but for those of job.sbatch"
        Path("job.sh").write_text("cd() { :; }; source() { :; }; " + STUBS.format() + printed.out)
        done = subprocess.run(["bash", "job.sh"], capture_output=True, text=True,
                              env={"PATH": "/usr/bin:/bin", "STATUS": "0", "STATE": "RUNNING"})
        assert done.returncode == 0 and not Path("pwned").exists(), done.stderr


def test_quotes_that_do_not_pair_are_refused():
    for name in ("sbatch", "launcher"):
        printed = call("job", "slurm", "debug/pretrain", f"job.{name}=--comment='x")
        assert printed.status == 2 and f"job.{name}: --comment='x: No closing quotation" in printed.err


@pytest.mark.parametrize(("overrides", "message"), [
    (["stepz=3", "job.nodez=2"], ["stepz=3 (command line): unknown key; did you mean steps?",
                                  "job.nodez=2 (command line): unknown key; did you mean job.nodes?"]),
    (["job.time=soon"], ["job.time=soon needs minutes, HH:MM:SS or D-HH:MM:SS"]),
    (["job.time=5", "job.notice=300"], ["job.notice=300 leaves nothing of job.time=5"]),
    (["job.time=1"], ["job.time=1 is not longer than the 122 s that one save may take"]),
    (["job.mounts=/data"], ["job.mounts is only read with job.container"]),
    (["job.sbatch=reservation"], ["job.sbatch: reservation is no option of sbatch"]),
    (["processes=2"], ["processes=2 is for one machine"]),
    (["job.stage=pretrian"], ["needs pretrain|sft|dpo"]),
    (["job.site=nowhere.yaml"], ["no config nowhere.yaml"])])
def test_what_is_refused(overrides, message):
    printed = call("job", "slurm", "debug/pretrain", *overrides)
    assert printed.status == 2 and printed.out == "" and all(part in printed.err for part in message), printed.err


def test_the_run_is_checked_as_its_stage_would():
    printed = call("job", "slurm", "quickstart/dpo", "job.stage=dpo", "dpo.betta=1")
    assert printed.status == 2 and "dpo.betta=1 (command line): unknown key" in printed.err
    printed = call("job", "slurm", "sft", "quickstart/sft")
    assert printed.status == 2 and "the stage is job.stage=sft" in printed.err


def test_keys_of_a_cluster_come_from_a_file_and_the_command_line_wins(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("job: {partition: gpu, account: llm, gpu_type: a100, setup: [module load cuda]}\n")
    out = call("job", "slurm", "debug/pretrain", f"job.site={site}", "job.gpu_type=h100").out
    assert "#SBATCH --partition=gpu\n" in out and "--gres=gpu:h100:8\n" in out and "\nmodule load cuda\n" in out
    site.write_text("job: {partitoin: gpu}\n")
    printed = call("job", "slurm", "debug/pretrain", f"job.site={site}")
    assert printed.status == 2 and "site.yaml:1): unknown key; did you mean job.partition?" in printed.err


@pytest.mark.parametrize(("time", "seconds"), [("90", 5400), ("1:30", 90), ("01:00:00", 3600), ("1-0", 86_400),
                                               ("1-2:03", 93_780), ("2-00:00:10", 172_810)])
def test_time_limits_as_sbatch_reads_them(time, seconds):
    assert seconds_of(time) == seconds
