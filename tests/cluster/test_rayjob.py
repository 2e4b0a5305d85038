"""The Kubernetes manifest: against the schemas, and against what it starts."""

import json
import os
import subprocess
from functools import cache

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError

from sparsemem.training.config import load_config
from tests.cluster.rayjob import RayJob

KUBERNETES = "1.30"  # fields that later versions have are not used
REFUSED = (kubernetes_validate.ValidationError, ValidationError)


@pytest.fixture(scope="module")
def text(repository):
    """The manifest's objects by their kinds, as JSON: so without aliases, an edit is of one."""
    documents = list(yaml.safe_load_all((repository / "scripts/cluster/rayjob.yaml").read_text()))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return json.dumps(found)


@pytest.fixture
def manifest(text):
    """The manifest's objects by their kinds, to be edited."""
    return json.loads(text)


@pytest.fixture(autouse=True)
def _schemas_once(monkeypatch):
    """Kubernetes' schemas are megabytes: read once."""
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", schema_contents)


schema_contents = cache(kubernetes_validate.utils.schema_contents)


def pod_templates(job):
    cluster = job["spec"]["rayClusterSpec"]
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]},
    }


def check(document):
    """Raise one of REFUSED if a schema has another opinion."""
    if document["kind"] != "RayJob":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    RayJob.model_validate(document)
    for template in pod_templates(document).values():
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)


def test_the_manifest_is_as_the_schemas_want_it(manifest):
    assert set(manifest) == {"PersistentVolumeClaim", "ConfigMap", "NetworkPolicy", "RayJob"}
    for document in manifest.values():
        check(document)


HEAD = "spec.rayClusterSpec.headGroupSpec"
WORKER = "spec.rayClusterSpec.workerGroupSpecs.0"
GONE = object()


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayJob", "spec.shutdownAfterJobFinish", True),
        ("RayJob", "spec.entryPoint", "sh"),
        ("RayJob", "spec.backoffLimit", "2"),
        ("RayJob", "spec.shutdownAfterJobFinishes", "yes"),
        ("RayJob", "spec.shutdownAfterJobFinishes", False),
        ("RayJob", "spec.submissionMode", "JobMode"),
        ("RayJob", "spec.rayClusterSpec.authOptions.mode", "password"),
        ("RayJob", "spec.rayClusterSpec.authOption", {"mode": "token"}),
        ("RayJob", "spec.rayClusterSpec.rayVersion", 2.6),
        ("RayJob", "spec.rayClusterSpec.rayVersion", "2.51.0"),
        ("RayJob", "spec.rayClusterSpec.rayVersion", GONE),
        ("RayJob", f"{HEAD}.replicas", 1),
        ("RayJob", f"{HEAD}.serviceType", "Public"),
        ("RayJob", f"{HEAD}.rayStartParams.num-cpus", 0),
        ("RayJob", f"{HEAD}.template", GONE),
        ("RayJob", f"{HEAD}.template.spec.container", []),
        ("RayJob", f"{HEAD}.template.spec.securityContext.runAsUser", "1000"),
        ("RayJob", f"{HEAD}.template.spec.containers.0.name", GONE),
        ("RayJob", f"{WORKER}.groupName", GONE),
        ("RayJob", f"{WORKER}.replicas", "2"),
        ("RayJob", f"{WORKER}.replicas", 3),
        ("RayJob", f"{WORKER}.template.spec.volumes.0.persistentVolumeClaim.claim", "x"),
        ("RayJob", f"{WORKER}.template.spec.containers.0.volumeMounts.0.mountPath", GONE),
        ("RayJob", "spec.submitterPodTemplate.spec.containers.0.resource", {}),
        ("RayJob", "apiVersion", "ray.io/v1alpha1"),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany"),
        ("PersistentVolumeClaim", "spec.storage", "20Gi"),
        ("ConfigMap", "data.train.sh", ["a", "list"]),
        ("NetworkPolicy", "spec.ingress.0.form", []),
    ],
)
def test_a_wrong_edit_is_caught(manifest, kind, path, value):
    document = manifest[kind]
    edited(document, path, value)
    with pytest.raises(REFUSED):
        check(document)


def edited(place, path, value):
    """Set what a dotted path leads to, or take it out."""
    *keys, last = ["data", "train.sh"] if path == "data.train.sh" else path.split(".")
    for key in keys:
        place = place[int(key) if isinstance(place, list) else key]
    if value is GONE:
        assert place.pop(last, None) is not None
    else:
        place[last] = value


def option(script, name):
    words = script.split()
    return int(words[words.index(name) + 1])


def test_shards_and_workers_find_room(manifest):
    """One CPU each (`RayShards`, Ray Train), on the nodes of the worker group."""
    script = manifest["ConfigMap"]["data"]["train.sh"]
    cluster = manifest["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    cpus = group["replicas"] * int(container["resources"]["limits"]["cpu"])
    assert cpus == option(script, "--shards") + option(script, "--workers")


def test_nothing_is_open_to_others(manifest):
    cluster = manifest["RayJob"]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    policy = manifest["NetworkPolicy"]["spec"]
    label = policy["podSelector"]["matchLabels"].items()
    assert policy["policyTypes"] == ["Ingress"]
    for template in pod_templates(manifest["RayJob"]).values():
        assert label <= template["metadata"]["labels"].items()
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


def test_the_pods_see_the_same_folders(manifest):
    templates = pod_templates(manifest["RayJob"])
    del templates["submitter"]
    claims = {"data": {"claimName": manifest["PersistentVolumeClaim"]["metadata"]["name"]}}
    maps = {"config": {"name": manifest["ConfigMap"]["metadata"]["name"]}}
    for template in templates.values():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert {n: v["persistentVolumeClaim"] for n, v in volumes.items() if n == "data"} == claims
        assert {n: v["configMap"] for n, v in volumes.items() if n == "config"} == maps
        (container,) = template["spec"]["containers"]
        assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
            "data": "/data",
            "config": "/config",
        }
    assert manifest["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_config_is_the_example_and_the_workers_can_train_it(manifest, repository, tmp_path):
    (tmp_path / "cluster.yaml").write_text(manifest["ConfigMap"]["data"]["cluster.yaml"])
    config = load_config(tmp_path / "cluster.yaml")
    assert config == load_config(repository / "examples/cluster.yaml")
    assert config.bank is not None
    workers = option(manifest["ConfigMap"]["data"]["train.sh"], "--workers")
    assert config.training.batch_size % workers == 0


@pytest.fixture
def train(manifest, tmp_path):
    """Run train.sh in a folder, with a `sparsemem` that says what it is asked for."""
    script = manifest["ConfigMap"]["data"]["train.sh"].replace("/data/", f"{tmp_path}/data/")
    command = tmp_path / "bin/sparsemem"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}

    def run():
        done = subprocess.run(
            ["sh", "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert manifest["RayJob"]["spec"]["entrypoint"] == "sh /config/train.sh"
    return run


SIZES = "--shards 4 --workers 2 --address auto"


def test_a_first_attempt_begins(train, tmp_path):
    assert train() == f"train /config/cluster.yaml --run {tmp_path}/data/runs/cluster {SIZES}"


def test_a_retry_goes_on(train, tmp_path):
    bank = tmp_path / "data/runs/cluster/bank"
    bank.mkdir(parents=True)
    (bank / "manifest.json").touch()
    assert train() == f"train --resume {bank.parent} {SIZES}"


def test_a_retry_without_a_bank_begins_again_and_removes_nothing(train, tmp_path):
    run = tmp_path / "data/runs/cluster"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("kept")
    assert train() == f"train /config/cluster.yaml --run {run} {SIZES}"
    (aside,) = run.parent.iterdir()
    assert aside.name.startswith("cluster-until-")
    assert (aside / "config.yaml").read_text() == "kept"
