"""A JobSet of GKE for a training command, to be read by a person before it is applied. No jax.

One replicated job; a slice is a replica, a host a pod. Buckets of gs:// paths are mounted (Cloud Storage FUSE), so that
the run sees files. Field names: JobSet v1alpha2 (jobset.sigs.k8s.io, from 0.10 on for its failure patterns), batch/v1.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from typing import Any

from ctllm_jax.cluster.saving import save_seconds
from ctllm_jax.cluster.topology import Topology, parse_topology
from ctllm_jax.config import statuses
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.job import TrainingCommand
from ctllm_jax.config.job_gke import GKEJobConfig
from ctllm_jax.config.load import config_root, find_config

MOUNT = "/gcs"
PORT = 8476
POD = "worker"
SPOT_SECONDS = 15
"""Seconds that a pod on a spot node has after the notice; the node itself ends 30 s after it (GKE, Spot VMs)."""
SAVE_BANDWIDTH = 0.2e9
"""Bytes a second at which a host surely writes its part of a checkpoint, and reads it; a bucket takes several times as
much."""
LEAST_GRACE, UNKNOWN_GRACE = 120, 600
"""Seconds of the shortest grace period, and of one for a checkpoint whose size is not known."""
# Node labels: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, .../docs/concepts/gpus.
_TPU_LABELS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice",
               "tpu7x": "tpu7x"}
_GPU_LABELS = {"a100": "nvidia-a100-80gb", "h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb",
               "b200": "nvidia-b200"}
_MACHINE = re.compile(r"a\d-[a-z]+gpu-\d+g")


def render(job: GKEJobConfig, command: TrainingCommand, *, checkpoint_bytes: int | None = None) -> str:
    """The JobSet as YAML.

    Args:
      checkpoint_bytes: size of a resumable step, for the grace period; None: not known.

    Raises:
      UserError: no such hardware, a config that no image has, a run directory or data that no pod sees, a name that
        Kubernetes does not take.
    """
    topology = parse_topology(job.topology)
    name = _name(job, command)
    if not find_config(command.target).resolve().is_relative_to(config_root().resolve()):
        raise UserError(f"{command.target}: an image has the configs of {config_root()} alone: put yours there before"
                        " the image is built")
    words, buckets = _mounted(command)
    several = topology.hosts > 1
    pods = topology.hosts // topology.slices if topology.is_tpu else topology.hosts
    slices = topology.slices if topology.is_tpu else 1
    coordinator = f"{name}-{POD}-0-0.{name}:{PORT}"
    lines = [f"# {command.stage} of {command.target} on {topology.describe()}.",
             "# Written by launch.py job gke. Read it; then: kubectl apply -f FILE",
             "apiVersion: jobset.x-k8s.io/v1alpha2",
             "kind: JobSet",
             "metadata:",
             f"  name: {_text(name)}",
             f"  namespace: {_text(job.namespace)}"]
    if job.queue:
        lines += ["  labels:", f"    kueue.x-k8s.io/queue-name: {_text(job.queue)}"]
    if topology.is_tpu and pods > 1:
        lines += ["  annotations:",
                  "    # A slice is a node pool, and holds the pods of one replica alone.",
                  "    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"]
    lines += ["spec:", *_failure_policy(job),
              "  network:",
              "    enableDNSHostnames: true  # pods find each other by name",
              "  replicatedJobs:",
              f"  - name: {POD}",
              f"    replicas: {slices}  # slices" if topology.is_tpu else "    replicas: 1",
              "    template:",
              "      spec:",
              f"        parallelism: {pods}  # hosts{' of a slice' if slices > 1 else ''}, a process each",
              f"        completions: {pods}",
              "        completionMode: Indexed",
              "        backoffLimit: 0  # the run is one: it is started again as a whole, by the JobSet",
              *_pod_failure_policy(),
              "        template:",
              "          metadata:",
              "            annotations:",
              '              gke-gcsfuse/volumes: "true"  # buckets as folders',
              "          spec:",
              "            restartPolicy: Never",
              f"            serviceAccountName: {_text(job.service_account)}",
              *_grace(job, topology, checkpoint_bytes),
              *_place(job, topology),
              "            securityContext:",
              f"              runAsUser: {job.user}",
              f"              runAsNonRoot: {'true' if job.user else 'false'}",
              f"              fsGroup: {job.user}",
              "              seccompProfile:",
              "                type: RuntimeDefault",
              "            containers:",
              "            - name: trainer",
              f"              image: {_text(job.image)}",
              "              securityContext:",
              "                allowPrivilegeEscalation: false",
              "                capabilities:",
              "                  drop: [ALL]",
              "              args:  # of launch.py, which the image starts",
              *(f"              - {_text(word)}" for word in words)]
    environment = []
    if not topology.is_tpu or not several:
        # TPU's runtime informs the hosts of a slice about each other; GPU nodes and single hosts get no such
        # information.
        environment = [("JOBSET_COORDINATOR", coordinator), ("JOBSET_PROCESSES", str(topology.hosts))]
    if environment:
        lines.append("              env:")
        lines += [line for key, value in environment
                  for line in (f"              - name: {key}", f"                value: {_text(value)}")]
    if job.secret:
        lines += ["              envFrom:", "              - secretRef:",
                  f"                  name: {_text(job.secret)}"]
    chips = math.prod(topology.host_bounds) if topology.is_tpu else topology.shape[0]
    resource = "google.com/tpu" if topology.is_tpu else "nvidia.com/gpu"
    lines += ["              resources:",
              "                requests:",
              f"                  {resource}: {chips}",
              "                limits:",
              f"                  {resource}: {chips}  # all chips of the host",
              "              volumeMounts:",
              "              - name: shared-memory",
              "                mountPath: /dev/shm"]
    for number, bucket in enumerate(buckets):
        lines += [f"              - name: bucket-{number}", f"                mountPath: {MOUNT}/{bucket}"]
    lines += ["            volumes:",
              "            - name: shared-memory  # NCCL and loader processes need more than the usual 64 MiB",
              "              emptyDir:",
              "                medium: Memory"]
    for number, bucket in enumerate(buckets):
        lines += [f"            - name: bucket-{number}",
                  "              csi:",
                  "                driver: gcsfuse.csi.storage.gke.io",
                  "                volumeAttributes:",
                  f"                  bucketName: {bucket}",
                  "                  # What a process writes is seen by the others at once; files belong to our user.",
                  "                  mountOptions: implicit-dirs,metadata-cache:ttl-secs:0,"
                  f"metadata-cache:negative-ttl-secs:0,uid={job.user},gid={job.user}"]
    return "\n".join(lines) + "\n"


def next_step(path: str) -> str:
    """Commands to show when the job is written to a file."""
    return f"kubectl apply -f {shlex.quote(path)}"


def _failure_policy(job: GKEJobConfig) -> list[str]:
    """Meaning of a pod's end, from the messages of the pod failure policy."""
    return ["  failurePolicy:",
            f"    maxRestarts: {job.max_restarts}  # after failures that no rule below names",
            "    rules:",
            f"    - name: wouldFailAgain  # status {statuses.WRONG_INPUT}: wrong input; {statuses.DIVERGED}: diverged",
            "      action: FailJobSet",
            "      onJobFailureReasons: [PodFailurePolicy]",
            f'      onJobFailureMessagePatterns: ["exit code ({statuses.WRONG_INPUT}|{statuses.DIVERGED}) "]',
            f"    - name: requeue  # status {statuses.REQUEUE}, or a node was taken away: go on, however often",
            "      action: RestartJobSetAndIgnoreMaxRestarts",
            "      onJobFailureReasons: [PodFailurePolicy]"]


def _pod_failure_policy() -> list[str]:
    return ["        podFailurePolicy:  # gives these ends the reason PodFailurePolicy, which the rules above look for",
            "          rules:",
            "          - action: FailJob",
            "            onExitCodes:",
            "              containerName: trainer",
            "              operator: In",
            f"              values: [{statuses.WRONG_INPUT}, {statuses.DIVERGED}, {statuses.REQUEUE}]",
            "          - action: FailJob",
            "            onPodConditions:",
            "            - type: DisruptionTarget",
            '              status: "True"']


def _grace(job: GKEJobConfig, topology: Topology, checkpoint_bytes: int | None) -> list[str]:
    seconds, lines = job.grace_seconds, []
    if seconds is None and checkpoint_bytes is None:
        seconds = UNKNOWN_GRACE
    elif seconds is None:
        # A mounted bucket has no reliable page cache, so written files are read back from the bucket.
        save = save_seconds(checkpoint_bytes, machines=topology.hosts, write=SAVE_BANDWIDTH, read=SAVE_BANDWIDTH)
        seconds = -(-int(max(LEAST_GRACE, 60 + 2 * save)) // 10) * 10
        lines.append(f"            # A checkpoint is {checkpoint_bytes / 1e9:,.1f} GB: about {math.ceil(save)} s to"
                     f" write and check it at {SAVE_BANDWIDTH / 1e9:g} GB/s a host.")
    if job.spot and seconds > SPOT_SECONDS:
        lines += [f"            # A spot node leaves a pod about {SPOT_SECONDS} s, whatever stands here; the steps",
                  "            # since the last checkpoint are lost then (checkpoint.every)."]
    return [*lines, f"            terminationGracePeriodSeconds: {seconds}"]


def _place(job: GKEJobConfig, topology: Topology) -> list[str]:
    """Node selectors and tolerations."""
    lines = ["            nodeSelector:"]
    if topology.is_tpu:
        lines += [f"              cloud.google.com/gke-tpu-accelerator: {_TPU_LABELS[topology.chip.name]}",
                  f"              cloud.google.com/gke-tpu-topology: {_text(topology.shape_name)}"]
    else:
        machine = _MACHINE.search(job.topology)
        label = _GPU_LABELS[topology.chip.name]
        if machine is not None and machine[0].startswith("a3-megagpu"):
            label = "nvidia-h100-mega-80gb"
        lines.append(f"              cloud.google.com/gke-accelerator: {label}")
        if machine is not None:
            lines.append(f"              node.kubernetes.io/instance-type: {machine[0]}")
    if job.reservation:
        lines += [f"              cloud.google.com/reservation-name: {_text(job.reservation)}",
                  "              cloud.google.com/reservation-affinity: specific"]
    if job.spot:
        lines += ['              cloud.google.com/gke-spot: "true"',
                  "            tolerations:",
                  "            - key: cloud.google.com/gke-spot",
                  "              operator: Equal",
                  '              value: "true"',
                  "              effect: NoSchedule"]
    return lines


def _name(job: GKEJobConfig, command: TrainingCommand) -> str:
    if job.name:
        return job.name
    name = re.sub(r"[^a-z0-9]+", "-", command.config.run.dir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".strip("-")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(f"job.name must be given: run.dir={command.config.run.dir} makes no name for Kubernetes "
                        "(at most 40 small letters, digits and dashes, the first a letter)")
    return name


def _mounted(command: TrainingCommand) -> tuple[list[str], list[str]]:
    """The command's words with every gs:// path replaced by its mount path, and the buckets."""
    tree = command.config.model_dump(mode="json")
    paths = dict(_paths(tree))
    if "run.dir" not in paths:
        raise UserError(f"run.dir={command.config.run.dir}: a pod's own disk goes with it; needs gs://BUCKET/RUN")
    inputs = {"init": tree["init"], "data.tokenizer": tree["data"]["tokenizer"],
              **{f"data.sources.{name}.path": source["path"] for name, source in tree["data"]["sources"].items()}}
    elsewhere = [f"{path}={value}" for path, value in inputs.items()
                 if value is not None and not value.startswith(("gs://", "/"))]
    if elsewhere:
        raise UserError(f"{', '.join(elsewhere)}: not in a pod, which needs gs://BUCKET/… (or a path of the image, "
                        "from / on)")
    given = [f"{key}={MOUNT}/{value.removeprefix('gs://')}" if value.startswith("gs://") else word
             for word in command.overrides for key, _, value in [word.partition("=")]]
    # Values from a config file that no word of the command overrides; a word for a section covers its keys.
    spoken = {word.partition("=")[0] for word in command.overrides}
    moved = [f"{path}={MOUNT}/{value.removeprefix('gs://')}" for path, value in paths.items()
             if not any(path == key or path.startswith(f"{key}.") for key in spoken)]
    buckets = sorted({value.removeprefix("gs://").partition("/")[0] for value in paths.values()})
    for bucket in buckets:
        if not re.fullmatch(r"[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]", bucket):
            raise UserError(f"gs://{bucket}: no name of a bucket")
    return [command.stage, command.target, *given, *moved], buckets


def _paths(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every text that begins with gs://."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _paths(value, f"{prefix}{name}.")
    elif isinstance(tree, str) and tree.startswith("gs://"):
        yield prefix[:-1], tree


def _text(value: str) -> str:
    """A text as YAML: quoted where another type could be read from it."""
    return value if re.fullmatch(r"[a-zA-Z][\w./:-]*[\w/]", value) and value.lower() not in (
        "true", "false", "yes", "no", "null", "on", "off") and ": " not in value else json.dumps(value,
                                                                                                  ensure_ascii=False)
