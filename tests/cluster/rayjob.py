"""What a RayJob may say: the fields, types and enums of KubeRay's custom resource, version 1.6.

Written after KubeRay's API reference (docs.ray.io, "KubeRay CRD API reference"); KubeRay 1.7 has
all of these fields. What is Kubernetes' own (pod templates, environments) is left to its schemas.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kubernetes = dict[str, Any]  # an object of Kubernetes' own
Texts = dict[str, str]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Policy = Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]
Manager = Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]


class Fields(BaseModel):
    """Unknown fields are refused, and so is "1" for 1."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Fields):
    mode: Literal["disabled", "token"] = "token"
    secretName: str | None = None
    enableK8sTokenAuth: bool | None = None


class AutoscalerOptions(Fields):
    resources: Kubernetes | None = None
    image: str | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    securityContext: Kubernetes | None = None
    idleTimeoutSeconds: Count | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    version: Literal["v1", "v2"] | None = None
    env: list[Kubernetes] | None = None
    envFrom: list[Kubernetes] | None = None
    volumeMounts: list[Kubernetes] | None = None


class RedisCredential(Fields):
    value: str | None = None
    valueFrom: Kubernetes | None = None


class GcsFaultToleranceOptions(Fields):
    redisAddress: str
    redisUsername: RedisCredential | None = None
    redisPassword: RedisCredential | None = None
    externalStorageNamespace: str | None = None


class UpgradeStrategy(Fields):
    type: Literal["Recreate", "None"] | None = None


class ScaleStrategy(Fields):
    workersToDelete: list[str] | None = None


class Group(Fields):
    """What a head group and a worker group share."""

    template: Kubernetes
    rayStartParams: Texts = {}
    resources: Texts | None = None
    labels: Texts | None = None


class HeadGroupSpec(Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] | None = None
    headService: Kubernetes | None = None
    enableIngress: bool | None = None


class WorkerGroupSpec(Group):
    groupName: str
    replicas: Count = 0
    minReplicas: Count = 0
    maxReplicas: Count = 2**31 - 1
    numOfHosts: Positive = 1
    idleTimeoutSeconds: Count | None = None
    scaleStrategy: ScaleStrategy | None = None
    suspend: bool | None = None

    @model_validator(mode="after")
    def _in_order(self) -> WorkerGroupSpec:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("expected minReplicas <= replicas <= maxReplicas")
        return self


class RayClusterSpec(Fields):
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec] = []
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")] | None = None
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    headServiceAnnotations: Texts | None = None
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    upgradeStrategy: UpgradeStrategy | None = None
    managedBy: Manager | None = None
    suspend: bool | None = None

    @model_validator(mode="after")
    def _token_is_known(self) -> RayClusterSpec:
        """The operator refuses tokens before Ray 2.52, or for a version that it is not told."""
        if self.authOptions is not None and self.authOptions.mode == "token":
            version = tuple(map(int, (self.rayVersion or "0.0").split(".")))
            if version < (2, 52):
                raise ValueError("authOptions.mode token needs a rayVersion of at least 2.52.0")
        return self


class DeletionPolicy(Fields):
    policy: Policy | None = None


class DeletionCondition(Fields):
    jobStatus: Literal["SUCCEEDED", "FAILED"] | None = None
    jobDeploymentStatus: Literal["Failed"] | None = None
    ttlSeconds: Count = 0


class DeletionRule(Fields):
    policy: Policy
    condition: DeletionCondition


class DeletionStrategy(Fields):
    onSuccess: DeletionPolicy | None = None
    onFailure: DeletionPolicy | None = None
    deletionRules: Annotated[list[DeletionRule], Field(min_length=1)] | None = None


class SubmitterConfig(Fields):
    backoffLimit: Count | None = None


class RayJobSpec(Fields):
    entrypoint: str | None = None
    rayClusterSpec: RayClusterSpec | None = None
    clusterSelector: Texts | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = (
        "K8sJobMode"
    )
    submitterPodTemplate: Kubernetes | None = None
    submitterConfig: SubmitterConfig | None = None
    backoffLimit: Count = 0
    activeDeadlineSeconds: Positive | None = None
    preRunningDeadlineSeconds: Positive | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    deletionStrategy: DeletionStrategy | None = None
    runtimeEnvYAML: str | None = None
    jobId: str | None = None
    metadata: Texts | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    managedBy: Manager | None = None
    suspend: bool | None = None

    @model_validator(mode="after")
    def _ends(self) -> RayJobSpec:
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class Metadata(Fields):
    """What a manifest written by hand says of its object."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
    namespace: str | None = None
    labels: Texts | None = None
    annotations: Texts | None = None


class RayJob(Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec
