"""`job gke`: manifests as they were read and approved, and valid by Kubernetes' schemas."""

import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from ctllm_jax.cluster import gke
from ctllm_jax.cluster.topology import parse_topology
from ctllm_jax.config import statuses
from ctllm_jax.config.load import find_config
from ctllm_jax.preflight.plan import checkpoint_bytes
from tests.cli.conftest import call
from tests.cluster.jobset_schema import JOBSET

GOLDEN = Path(__file__).parent / "gke"
KUBERNETES = "1.33"
RUN = ["configs/ct_llm_2b/pretrain.yaml", "data=gs://text/ct-llm", "run.dir=gs://runs/ct-llm/2B_first"]
JOB = ["job.image=us-docker.pkg.dev/project/repository/ctllm:1", "job.service_account=trainer"]
MANIFESTS = {
    "v5p-256": ["job.topology=v5p-256", "job.reservation=autumn"],
    "v6e-256x4": ["job.topology=4*v6e-256", "mesh.data=4", "mesh.fsdp=256", "job.spot=true", "job.queue=team-a"],
    "a3-highgpu-8g": ["job.topology=8*a3-highgpu-8g", "job.secret=wandb", "job.name=h100", "job.namespace=training"],
    "v5e-8": ["job.topology=v5litepod-8", "job.user=0", "job.max_restarts=0"],
}


def write(*words):
    printed = call("job", "gke", *RUN, *JOB, *words)
    assert printed.status == 0, printed.err
    return printed.out


def parts(*words):
    """(JobSet, Job spec, Pod spec, container) of a manifest."""
    jobset = yaml.safe_load(write(*words))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return jobset, job, pod, pod["containers"][0]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_the_one_that_was_approved(name):
    """After a change that is meant: python launch.py job gke … job.output=tests/cluster/gke/NAME.yaml, and read it."""
    assert write(*MANIFESTS[name]) == (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_valid(name):
    jobset, job, *_ = parts(*MANIFESTS[name])
    jsonschema.validate(jobset, JOBSET, format_checker=jsonschema.FormatChecker())
    kubernetes_validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job}, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_gains_no_rights(name):
    """Kubernetes' Pod Security Standard "restricted", but for the user that job.user=0 asks for."""
    *_, pod, container = parts(*MANIFESTS[name])
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["securityContext"]["runAsNonRoot"] is (name != "v5e-8")
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]


def test_texts_stay_texts_in_yaml():
    hostile = "a: b #c\u2003[x]"
    texts = [f"job.{name}={hostile}" for name in ("image", "secret", "queue", "service_account")]
    jobset, _, pod, container = parts("job.topology=v5p-256", "job.name=no", *texts)
    assert container["image"] == pod["serviceAccountName"] == jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert container["image"] == container["envFrom"][0]["secretRef"]["name"] == hostile
    assert jobset["metadata"]["name"] == "no"


@pytest.mark.parametrize("change", [("parallelism", "32"), ("completion", 32), ("backoffLimit", -1.5)])
def test_the_schema_notices_a_slip(change):
    _, job, *_ = parts(*MANIFESTS["v5p-256"])
    job[change[0]] = change[1]
    with pytest.raises(Exception, match=change[0]):
        kubernetes_validate.validate(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": job}, KUBERNETES, strict=True)


@pytest.mark.parametrize(("topology", "replicas", "pods", "chips", "shape"), [
    ("v5p-256", 1, 32, 4, "4x4x8"), ("v5p:4x4x4", 1, 16, 4, "4x4x4"), ("v4-256", 1, 32, 4, "4x4x8"),
    ("v5litepod-256", 1, 64, 4, "16x16"), ("v5litepod-8", 1, 1, 8, "2x4"), ("4*v6e-256", 4, 64, 4, "16x16"),
    ("tpu7x:4x4x4", 1, 16, 4, "4x4x4")])
def test_pods_and_chips_of_a_tpu(topology, replicas, pods, chips, shape):
    jobset, job, pod, container = parts(f"job.topology={topology}")
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == replicas
    assert job["parallelism"] == job["completions"] == pods
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape
    assert replicas * pods * chips == parse_topology(topology).chips
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"].get("annotations", {})
    assert exclusive == (pods > 1)


def test_gpus_are_told_where_process_0_is():
    from ctllm_jax.cluster.distributed import Launch, detect

    jobset, job, pod, container = parts("job.topology=8*a3-highgpu-8g", "job.name=h100")
    environment = {each["name"]: each["value"] for each in container["env"]}
    # Kubernetes numbers the pods; the first has the name that JobSet documents.
    launch = detect({**environment, "JOB_COMPLETION_INDEX": "3"})
    assert launch == Launch("kubernetes", "h100-worker-0-0.h100:8476", 8, 3)
    assert job["parallelism"] == 8 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
                                   "node.kubernetes.io/instance-type": "a3-highgpu-8g"}


def test_a_single_tpu_host_is_one_process():
    """GKE calls it localhost, and the indexed job then looks like one of several pods."""
    from ctllm_jax.cluster.distributed import detect

    container = parts("job.topology=v5litepod-8")[-1]
    environment = {each["name"]: each["value"] for each in container["env"]}
    launch = detect({**environment, "JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert launch.processes == 1


@pytest.mark.parametrize(("message", "action"), [
    (f"failed with exit code {statuses.WRONG_INPUT} matching FailJob rule at index 0", "FailJobSet"),
    (f"failed with exit code {statuses.DIVERGED} matching FailJob rule at index 0", "FailJobSet"),
    (f"failed with exit code {statuses.REQUEUE} matching FailJob rule at index 0",
     "RestartJobSetAndIgnoreMaxRestarts"),
    ("has condition DisruptionTarget matching FailJob rule at index 1", "RestartJobSetAndIgnoreMaxRestarts")])
def test_what_the_end_of_a_pod_leads_to(message, action):
    """By the rules of JobSet: the first whose reasons and patterns match. The messages are those of Kubernetes."""
    jobset, job, *_ = parts("job.topology=v5p-256")
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert codes == sorted([statuses.WRONG_INPUT, statuses.DIVERGED, statuses.REQUEUE]) and job["backoffLimit"] == 0
    text = f"Container trainer for pod default/run-worker-0-0-x {message}"
    rules = [rule for rule in jobset["spec"]["failurePolicy"]["rules"]
             if "PodFailurePolicy" in rule["onJobFailureReasons"]
             and all(re.search(pattern, text) for pattern in rule.get("onJobFailureMessagePatterns", [""]))]
    assert rules[0]["action"] == action


def test_the_grace_period_outlasts_a_save():
    from ctllm_jax.config.load import load
    from ctllm_jax.config.pretrain import PretrainConfig

    config = load(PretrainConfig, target="ct_llm_2b/pretrain")
    size = checkpoint_bytes(config)["resumable"]
    for topology, hosts in (("v5p-256", 32), ("h100:8", 1)):
        grace = parts(f"job.topology={topology}")[2]["terminationGracePeriodSeconds"]
        # Two saves, each of a host's own part: written to the bucket and read back.
        assert grace >= gke.LEAST_GRACE and grace > 2 * 2 * size / hosts / gke.SAVE_BANDWIDTH
    assert parts("job.topology=h100:8", "job.grace_seconds=77")[2]["terminationGracePeriodSeconds"] == 77


def test_buckets_are_mounted_and_the_command_sees_files():
    _, _, pod, container = parts("job.topology=v5p-256", "optimizer.lr=1e-4", "sample.prompts=['[a: b', 今天]")
    arguments = container["args"]
    assert arguments[:2] == ["pretrain", "configs/ct_llm_2b/pretrain.yaml"]
    assert "run.dir=/gcs/runs/ct-llm/2B_first" in arguments and "sample.prompts=['[a: b', 今天]" in arguments
    assert not any("gs://" in word for word in arguments)
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    buckets = {each["name"]: each["csi"]["volumeAttributes"]["bucketName"] for each in pod["volumes"] if "csi" in each}
    assert {mounts[name]: bucket for name, bucket in buckets.items()} == {"/gcs/runs": "runs", "/gcs/text": "text"}
    # The command of the pod, taken apart again, is the run that was asked for.
    from ctllm_jax.config.load import load
    from ctllm_jax.config.pretrain import PretrainConfig

    config = load(PretrainConfig, target=arguments[1], overrides=arguments[2:])
    assert config.optimizer.lr == 1e-4 and config.run.dir == "/gcs/runs/ct-llm/2B_first"
    assert {name: source.path for name, source in config.data.sources.items()} == {"data": "/gcs/text/ct-llm"}


def test_buckets_that_a_config_file_names_are_mounted_too(tmp_path, monkeypatch):
    config = tmp_path / "mine.yaml"
    config.write_text("extends: " + str(find_config("debug/pretrain")) + "\nrun: gs://runs/a\ndata:\n  kind: mixture\n"
                      "  sources: {zh: gs://text/zh, en: {path: gs://text/en, weight: 2}}\n")
    words = ["job", "gke", config, *JOB, "job.topology=v5litepod-8", "data.sources.en=gs://other/en"]
    assert "put yours there before the image is built" in call(*words).err
    monkeypatch.setattr(gke, "config_root", lambda: tmp_path)
    printed = call(*words)
    assert printed.status == 0, printed.err
    spec = yaml.safe_load(printed.out)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert spec["containers"][0]["args"][2:] == [
        "data.sources.en=/gcs/other/en", "run.dir=/gcs/runs/a", "data.sources.zh.path=/gcs/text/zh"]
    mounts = [each["mountPath"] for each in spec["containers"][0]["volumeMounts"]]
    assert mounts == ["/dev/shm", "/gcs/other", "/gcs/runs", "/gcs/text"]


@pytest.mark.parametrize(("words", "message"), [
    (["job.topology=v5p-250"], "v5p-N counts TensorCores"),
    (["job.topology=v5p-256", "run.dir=runs/x"], "needs gs://BUCKET/RUN"),
    (["job.topology=v5p-256", "data.sources.en=data/en"], "data.sources.en.path=data/en: not in a pod"),
    (["job.topology=v5p-256", "job.spot=true", "job.reservation=r"], "give one of them"),
    (["job.topology=v5p-256", "job.name=Über"], "job.name=Über"),
    (["job.topology=v5p-256", "optimizer.lrr=1"], "did you mean optimizer.lr?"),
    (["job.topolgy=v5p-256"], "did you mean job.topology?")])
def test_what_cannot_run_there_is_refused(words, message):
    printed = call("job", "gke", *RUN, *JOB, *words)
    assert printed.status == 2 and printed.out == "" and message in printed.err


def test_it_is_written_where_asked(tmp_path):
    printed = call("job", "gke", *RUN, *JOB, "job.topology=v5p-256", f"job.output={tmp_path}/a/job.yaml")
    assert printed.status == 0 and f"kubectl apply -f {tmp_path}/a/job.yaml" in printed.out
    assert yaml.safe_load((tmp_path / "a" / "job.yaml").read_text())["kind"] == "JobSet"
    assert gke.next_step("x") == "kubectl apply -f x"
