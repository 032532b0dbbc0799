"""`launch.py job gke`: where and how a JobSet of GKE runs."""

from __future__ import annotations

from pydantic import model_validator

from ctllm_jax.config.base import key
from ctllm_jax.config.job import JobConfig

_LABEL = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"


class GKEJobConfig(JobConfig):
    """Keys of a JobSet."""

    name: str | None = key(None, "name of the JobSet: at most 40 small letters, digits and dashes; null: the run directory's", pattern=_LABEL)
    namespace: str = key("default", "Kubernetes namespace", pattern=_LABEL)
    topology: str = key(..., "hardware by name: v5p-256, v5litepod-256, v6e:16x16, 4*v6e-256, tpu7x:4x4x4, 8*a3-highgpu-8g, h100:8")
    image: str = key(..., "container image, of docker/Dockerfile: REGION-docker.pkg.dev/PROJECT/REPOSITORY/ctllm:TAG")
    service_account: str = key(..., "Kubernetes service account that may read and write the run's bucket")
    reservation: str | None = key(None, "name of the reservation whose capacity is used; null: none")
    spot: bool = key(False, "use spot capacity, which can be withdrawn at any time")
    queue: str | None = key(None, "local queue of Kueue; null: none")
    secret: str | None = key(None, "Kubernetes secret whose entries become environment variables, such as WANDB_API_KEY; null: none")
    user: int = key(1000, "user id in the container; 0 if only root can use the node's devices", ge=0)
    max_restarts: int = key(10, "restarts after a failure; those after a requeue (status 75) or a lost node do not count", ge=0)
    grace_seconds: int | None = key(None, "seconds between the notice and the end of a pod; null: the estimated time of two saves, written and read back, plus a minute", ge=1)

    @model_validator(mode="after")
    def _check(self):
        if self.spot and self.reservation is not None:
            raise ValueError(f"spot=true takes capacity that is left over, reservation={self.reservation} one's own: give one of them")
        return self
