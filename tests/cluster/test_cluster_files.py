"""The files that start clusters and schedules say what is valid, and what the README says of them; typos are found."""

import copy
import json
import re
import subprocess
from functools import cache, partial
from pathlib import Path

import croniter
import jsonschema
import kubernetes_validate
import pytest
import yaml
from cfnlint.api import lint_file
from packaging.requirements import Requirement
from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeAvailabilitySummary,
    NodeProviderAvailabilityTracker,
)
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

from pipeline.cluster.autoscaler import score

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "jobs" / "clusters"
LAUNCHED = (ROOT / "cluster.yaml", CLUSTERS / "on_premises.yaml")
MANIFESTS = (
    CLUSTERS / "kubernetes" / "cluster.yaml",
    CLUSTERS / "kubernetes" / "job.yaml",
    ROOT / "jobs" / "schedules" / "cronjob.yaml",
)
KUBERNETES = "1.34"


def loaded(path):
    return yaml.safe_load(path.read_text())


def resources(path):
    """All resources of a manifest, one inside a ConfigMap included."""
    found = [document for document in yaml.safe_load_all(path.read_text()) if document]
    for document in list(found):
        if document["kind"] == "ConfigMap":
            found += map(yaml.safe_load, document["data"].values())
    return found


def check(resource):
    """Validate a resource: KubeRay's by its schemas, and the pods in them; others by Kubernetes' own."""
    if resource["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        return
    schema(resource["kind"]).validate(resource)
    for group in groups(resource):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@cache
def schema(kind):
    """KubeRay's, of a kind of resource."""
    path = ROOT / "tests" / "data" / f"kuberay-{kind.lower()}s-v1.schema.json"
    return jsonschema.Draft202012Validator(json.loads(path.read_text()))


def groups(resource):
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_launched_clusters(path):
    config = loaded(path)
    validate_config(prepare_config(config))
    text = path.read_text()
    assert re.findall(r"# EDIT (\d)", text) == ["1", "2", "3"]
    assert all(Path(ROOT / local).exists() for local in config["file_mounts"].values() if local[0] != "~")
    head, *_, watcher = config["head_start_ray_commands"][-1:] + config["worker_start_ray_commands"]
    assert {"--dashboard-host=127.0.0.1", "--num-cpus=0", "--head"} <= set(head.split())
    for command in [head, *config["worker_start_ray_commands"]]:
        assert "RAY_AUTH_MODE=token" in command or command.endswith("ray stop")
    for command in [*config["setup_commands"], head, *config["worker_start_ray_commands"]]:
        subprocess.run(["bash", "-n", "-c", command], check=True)  # is read, not run
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert ("drain-on-notice" in watcher) == (path.stem == "cluster")


def test_machines_of_aws():
    config = loaded(ROOT / "cluster.yaml")
    kinds = config["available_node_types"]
    assert kinds[config["head_node_type"]]["resources"] == {"CPU": 0}
    spot, other = kinds["gpu_spot"]["node_config"], kinds["gpu_on_demand"]["node_config"]
    assert spot == other | {"InstanceMarketOptions": {"MarketType": "spot"}}
    assert all(kind.get("min_workers", 0) == 0 for kind in kinds.values())
    roles = re.findall(r"InstanceProfileName: (\S+)", (CLUSTERS / "aws_roles.yaml").read_text())
    assert {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds.values()} == set(roles)
    assert all(kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"} for kind in kinds.values())


def test_roles_of_aws():
    """As CloudFormation takes them; test_launch.py deploys them."""
    assert lint_file(CLUSTERS / "aws_roles.yaml") == []


def test_a_typo_in_a_cluster_file():
    config = loaded(ROOT / "cluster.yaml")
    config["idle_timeout_minuts"] = config.pop("idle_timeout_minutes")
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config(config))


def launches(summary, scorer=score):
    """What Ray's autoscaler would start for two workers that wait."""
    config = prepare_config(loaded(ROOT / "cluster.yaml"))
    kinds = copy.deepcopy(config["available_node_types"])
    for name in ("gpu_spot", "gpu_on_demand"):
        kinds[name]["resources"] = {"CPU": 4, "GPU": 1}
    waiting = [{"GPU": 1, "CPU": 1}] * 2
    scorer = partial(scorer, node_availability_summary=summary)
    return dict(get_nodes_for(kinds, {"head": 1}, "head", 8, waiting, scorer)[0])


def test_on_demand_where_there_is_no_spot():
    clock = [0.0]
    tracker = NodeProviderAvailabilityTracker(timer=lambda: clock[0])
    assert launches(NodeAvailabilitySummary({})) == {"gpu_spot": 2}
    refusal = NodeLaunchException("InsufficientInstanceCapacity", "no capacity", None)
    tracker.update_node_availability("gpu_spot", 0, refusal)
    assert launches(tracker.summary()) == {"gpu_on_demand": 2}
    assert launches(tracker.summary(), _default_utilization_scorer) == {"gpu_spot": 2}  # Ray's own: for ever
    clock[0] = 31 * 60
    assert launches(tracker.summary()) == {"gpu_spot": 2}
    tracker.update_node_availability("gpu_spot", 31 * 60, None)
    assert launches(tracker.summary()) == {"gpu_spot": 2}


def test_nothing_fits():
    assert score({"CPU": 4}, [{"GPU": 1}], "gpu_spot", node_availability_summary=NodeAvailabilitySummary({})) is None


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests(path):
    for resource in resources(path):
        check(resource)
    assert re.findall(r"# EDIT (\d)", path.read_text()) == ["1", "2", "3"]


def test_heads_on_kubernetes_take_no_tiles():
    clusters = [r for path in MANIFESTS for r in resources(path) if r["apiVersion"] == "ray.io/v1"]
    assert sorted(cluster["kind"] for cluster in clusters) == ["RayCluster", "RayJob", "RayJob"]
    for cluster in clusters:
        head, *workers = groups(cluster)
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert all(group["minReplicas"] == group["replicas"] == 0 for group in workers)
        spec = cluster["spec"].get("rayClusterSpec", cluster["spec"])
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["enableInTreeAutoscaling"]


def planted(resource, *path_and_typo):
    """Rename a key, deep inside."""
    *path, key, typo = path_and_typo
    inner = resource
    for part in path:
        inner = inner[part]
    inner[typo] = inner.pop(key)
    return resource


@pytest.mark.parametrize(
    ("manifest", "kind", "typo"),
    [
        (0, "RayCluster", ("spec", "workerGroupSpecs", 0, "maxReplicas", "maxReplica")),
        (0, "RayCluster", ("spec", "headGroupSpec", "template", "spec", "containers", 0, "image", "imag")),
        (1, "RayJob", ("spec", "shutdownAfterJobFinishes", "shutdownAfterJobFinish")),
        (1, "RayJob", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", "container")),
        (2, "RayJob", ("spec", "entrypoint", "entryPoint")),
        (2, "CronJob", ("spec", "concurrencyPolicy", "concurencyPolicy")),
        (2, "CronJob", ("spec", "jobTemplate", "spec", "template", "spec", "containers", 0, "args", "arg")),
        (2, "Role", ("rules", 0, "verbs", "verb")),
    ],
)  # fmt: skip
def test_a_typo_in_a_manifest(manifest, kind, typo):
    (resource,) = [r for r in resources(MANIFESTS[manifest]) if r["kind"] == kind]
    check(resource)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(planted(resource, *typo))


def test_one_version_of_ray():
    """In all files, and one that the package takes."""
    places = [*LAUNCHED, *MANIFESTS, CLUSTERS / "Dockerfile"]
    found = {
        version
        for path in places
        for version in re.findall(r"(?:ray\[default\]==|rayVersion: |ray:|hessian:)(\d[\d.]*\d)", path.read_text())
    }
    needs = re.search(r'"(ray[^"\[]*)"', (ROOT / "pyproject.toml").read_text())[1]
    (version,) = found
    assert version in Requirement(needs).specifier


def crontab_lines(text):
    """Schedule and command of each line; raises where there is none."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#") and not re.match(r"[A-Z]+=\S+$", line):
            yield line.split(maxsplit=5)[:5], line.split(maxsplit=5)[5]


def test_schedules_run_one_command():
    (fields, command), = crontab_lines((ROOT / "jobs" / "schedules" / "crontab").read_text())  # fmt: skip
    (cronjob,) = [r for r in resources(MANIFESTS[2]) if r["kind"] == "CronJob"]
    (rayjob,) = [r for r in resources(MANIFESTS[2]) if r["kind"] == "RayJob"]
    for schedule in (" ".join(fields), cronjob["spec"]["schedule"]):
        assert croniter.croniter(schedule).get_next() > 0
    assert cronjob["spec"]["concurrencyPolicy"] == "Forbid"
    wanted = r"run-due jobs/schedules/digits_epochs\.yaml\b"
    assert re.search(rf"\$HESSIAN {wanted}", command)
    assert "%" not in command  # cron's word for the end of a line
    assert re.fullmatch(rf"hessian {wanted}", rayjob["spec"]["entrypoint"])


@pytest.mark.parametrize("wrong", ["61 2 * * *", "0 24 * * *", "0 2 * 13 *", "0 2 * *", "0 x * * *"])
def test_a_typo_in_a_schedule(wrong):
    with pytest.raises(croniter.CroniterBadCronError):
        croniter.croniter(wrong)
