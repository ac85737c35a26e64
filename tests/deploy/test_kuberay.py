"""deploy/kuberay: KubeRay's fields, what its operator refuses, and what must hold for us."""

from pathlib import Path

import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = sorted((DEPLOY / "kuberay").glob("*.yaml"))
JOBS = [file for file in FILES if file.stem not in ("cluster", "network")]
STAGES = {"ingest", "filter", "train-vae", "precompute", "train-dit", "restore"}
# The fields that we use, of KubeRay 1.6's RayClusterSpec and RayJobSpec (its API reference).
CLUSTER = {
    "rayVersion": str, "authOptions": dict, "enableInTreeAutoscaling": bool, "autoscalerOptions": dict,
    "headGroupSpec": dict, "workerGroupSpecs": list,
}  # fmt: skip
AUTOSCALER = {"version": str, "idleTimeoutSeconds": int}
HEAD = {"serviceType": str, "rayStartParams": dict, "template": dict}
WORKERS = {
    "groupName": str, "minReplicas": int, "replicas": int, "maxReplicas": int, "idleTimeoutSeconds": int,
    "rayStartParams": dict, "template": dict,
}  # fmt: skip
JOB = {"clusterSelector": dict, "backoffLimit": int, "entrypoint": str, "submitterPodTemplate": dict}


def load(name: str) -> dict:
    return yaml.safe_load((DEPLOY / "kuberay" / name).read_text())


def check_fields(given: dict, known: dict) -> None:
    assert set(given) <= set(known), f"unknown fields: {set(given) - set(known)}"
    for name, value in given.items():
        assert isinstance(value, known[name]), f"{name}: {value!r}"


def pods(document: dict) -> list[dict]:
    if document["kind"] == "RayJob":
        return [document["spec"]["submitterPodTemplate"]]
    if document["kind"] == "RayCluster":
        spec = document["spec"]
        return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return []


def test_the_clusters_fields_are_kuberays():
    document = load("cluster.yaml")
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayCluster")
    spec = document["spec"]
    check_fields(spec, CLUSTER)
    check_fields(spec["autoscalerOptions"], AUTOSCALER)
    check_fields(spec["headGroupSpec"], HEAD)
    for group in spec["workerGroupSpecs"]:
        check_fields(group, WORKERS)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_it_is_that_ray_and_asks_for_the_token():
    spec = load("cluster.yaml")["spec"]
    constraints = (DEPLOY.parent / "constraints.txt").read_text().splitlines()
    assert f"ray=={spec['rayVersion']}" in constraints
    assert spec["authOptions"] == {"mode": "token", "secretName": "openseedvr-token"}


def test_the_head_runs_no_work_and_workers_come_from_zero():
    spec = load("cluster.yaml")["spec"]
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in spec["workerGroupSpecs"])
    # KubeRay refuses autoscaler v2 with pods that are restarted in place.
    assert all(pod["spec"]["restartPolicy"] == "Never" for pod in pods(load("cluster.yaml")))


def test_a_training_worker_fits_into_the_gpu_pods():
    scale = yaml.safe_load((DEPLOY.parent / "configs/paper/train_dit.yaml").read_text())["scale"]
    group = next(
        g for g in load("cluster.yaml")["spec"]["workerGroupSpecs"] if g["groupName"] == "h100-workers"
    )
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits["nvidia.com/gpu"])
    assert gpus * scale["cpus_per_worker"] <= int(limits["cpu"])
    assert group["maxReplicas"] * gpus >= scale["num_workers"]


def test_nothing_is_open_to_the_world():
    assert load("cluster.yaml")["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    policy = load("network.yaml")["spec"]
    for document in map(yaml.safe_load, (file.read_text() for file in FILES)):
        for pod in pods(document):
            assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            assert pod["spec"]["securityContext"]["runAsNonRoot"]
            for container in pod["spec"]["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert all(rule.get("from") for rule in policy["ingress"])


def test_every_stage_has_its_job():
    assert {file.stem for file in JOBS} == STAGES


@pytest.mark.parametrize("file", JOBS, ids=lambda file: file.stem)
def test_a_job_names_a_module_and_a_config_that_exist(file):
    document = yaml.safe_load(file.read_text())
    check_fields(document["spec"], JOB)
    assert document["spec"]["clusterSelector"] == {"ray.io/cluster": load("cluster.yaml")["metadata"]["name"]}
    words = document["spec"]["entrypoint"].split()
    module = words[words.index("-m") + 1]
    assert (DEPLOY.parent / (module.replace(".", "/") + ".py")).is_file()
    config = words[words.index("--config") + 1]
    assert (DEPLOY.parent / Path(config).relative_to("/openseedvr")).is_file()
    token = document["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["env"][1]["valueFrom"]
    assert token["secretKeyRef"] == {"name": "openseedvr-token", "key": "auth_token"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kubernetes_own_schema_takes_the_pods(file):
    """KubeRay's resources themselves are not in that package."""
    document = yaml.safe_load(file.read_text())
    if document["kind"] == "NetworkPolicy":
        kubernetes_validate.validate(document, "1.33", strict=True)
    for pod in pods(document):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, "1.33", strict=True)


def test_the_image_holds_what_the_jobs_need():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert {"pipeline", "model", "degradations", "jobs", "configs", "constraints.txt"} <= copied
    assert all((DEPLOY.parent / name).exists() for name in copied)
    assert "RAY_AUTH_MODE=token" in "\n".join(lines) and lines[-1] == "USER ray"
