"""The fields of jobset.x-k8s.io/v1alpha2 that we write, as JSON Schema: nothing else may occur.

Written after JobSet's API documentation (jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2, version 0.10 and later):
names, types, enumerations and limits. The Job inside is checked by Kubernetes' own schemas (kubernetes-validate).
"""

_LABEL = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]


def _object(required, **properties):
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_RULE = _object(
    ["name", "action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", "maxLength": 128},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
                     "RestartJobAndIgnoreMaxRestarts"]},
    onJobFailureReasons={"type": "array", "uniqueItems": True, "items": {"enum": _REASONS}},
    onJobFailureMessagePatterns={"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "regex"}})
JOBSET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(["name", "namespace"], name={**_LABEL, "maxLength": 40}, namespace=_LABEL, labels=_TEXTS,
                     annotations=_TEXTS),
    spec=_object(
        ["failurePolicy", "network", "replicatedJobs"],
        failurePolicy=_object(["maxRestarts", "rules"], maxRestarts={"type": "integer", "minimum": 0},
                              rules={"type": "array", "items": _RULE, "maxItems": 20}),
        network=_object(["enableDNSHostnames"], enableDNSHostnames={"type": "boolean"}),
        replicatedJobs={"type": "array", "minItems": 1, "items": _object(
            ["name", "replicas", "template"], name=_LABEL, replicas={"type": "integer", "minimum": 1},
            template=_object(["spec"], spec={"type": "object"}))}))
