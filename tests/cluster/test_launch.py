"""`ray up cluster.yaml` against an AWS that is a server here: the roles are made, and the machines asked for."""

import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from clouds import SECRET, free_port
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """An endpoint, with a home of its own: Ray writes a key there."""
    home = tmp_path_factory.mktemp("home")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    server.start()
    environment = {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": yaml.safe_load((ROOT / "cluster.yaml").read_text())["provider"]["region"],
        "HOME": str(home),
    }
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
    server.stop()


@pytest.fixture(scope="module")
def roles(aws):
    """Those of aws_roles.yaml, deployed."""
    stacks = boto3.client("cloudformation")
    stacks.create_stack(
        StackName="hessian",
        TemplateBody=(ROOT / "jobs" / "clusters" / "aws_roles.yaml").read_text(),
        Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "my-bucket"}],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    (stack,) = stacks.describe_stacks(StackName="hessian")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    return boto3.client("iam")


def test_roles(roles):
    """A worker reaches the bucket and nothing else; the head may give its workers their role alone."""
    profiles = {p["InstanceProfileName"]: p["Roles"][0] for p in roles.list_instance_profiles()["InstanceProfiles"]}
    assert set(profiles) == {"hessian-head", "hessian-worker"}
    assert roles.list_role_policies(RoleName="hessian-worker")["PolicyNames"] == []
    (given,) = roles.list_attached_role_policies(RoleName="hessian-worker")["AttachedPolicies"]
    version = roles.get_policy(PolicyArn=given["PolicyArn"])["Policy"]["DefaultVersionId"]
    policy = roles.get_policy_version(PolicyArn=given["PolicyArn"], VersionId=version)["PolicyVersion"]["Document"]
    assert {statement["Resource"] for statement in policy["Statement"]} == {
        "arn:aws:s3:::my-bucket",
        "arn:aws:s3:::my-bucket/*",
    }
    own = roles.get_role_policy(RoleName="hessian-head", PolicyName="autoscaler")["PolicyDocument"]
    passed = [s["Resource"] for s in yaml.safe_load(own)["Statement"] if s["Action"] == "iam:PassRole"]
    assert passed == [profiles["hessian-worker"]["Arn"]]


def test_ray_up(roles):
    """As far as an AWS without machines goes: there is nothing behind the head's address."""
    started = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "up", "--yes", "--no-config-cache", "cluster.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "AUTOSCALER_NODE_START_WAIT_S": "5"},
        timeout=300,
    )
    machines = [m for r in boto3.client("ec2").describe_instances()["Reservations"] for m in r["Instances"]]
    assert len(machines) == 1, started.stdout + started.stderr
    (head,) = machines
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert head["InstanceType"] == "m6i.2xlarge"
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/hessian-head")
    assert (tags["ray-user-node-type"], tags["ray-cluster-name"]) == ("head", "hessian")
    assert "Waiting for SSH" in started.stdout
