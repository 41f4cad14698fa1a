"""infra/s3: the template is sound, and a real S3 server that is given its policies lets a run work and refuses the
rest."""

import json
import re
import subprocess
from pathlib import Path

import boto3
import pytest
import yaml
from support.programs import program
from support.runs import tiny_config, train
from support.s3 import ADMIN, s3_identity, s3_serving

from unlearn.data.storage import Storage
from unlearn.errors import StorageError

INFRA = Path(__file__).parents[2] / "infra"
BUCKETS = ("Data", "Runs", "Releases", "Logs")
RUNS, RELEASE = ("runs-role", "runs-secret"), ("release-role", "release-secret")
CYCLE = ("cycle-role", "cycle-secret")


def stack(irsa: bool = False) -> dict[str, dict]:
    """Resource -> properties of infra/s3/stack.yaml, its references put in for the stack `unlearn` of account 1."""
    text = (INFRA / "s3/stack.yaml").read_text()
    names = {"AWS::StackName": "unlearn", "AWS::AccountId": "1", "AWS::Region": "us-east-1", "AWS::Partition": "aws"}
    names |= {bucket: f"unlearn-{bucket.lower()}-1" for bucket in BUCKETS}

    def value(name: str) -> str:
        bucket = name.removesuffix(".Arn")
        return f"arn:aws:s3:::{names[bucket]}" if bucket != name and bucket in names else names.get(name, name)

    class Loader(yaml.SafeLoader):
        pass

    for tag in ("!Ref", "!GetAtt"):
        Loader.add_constructor(tag, lambda loader, node: value(node.value))
    Loader.add_constructor("!Sub", lambda loader, node: re.sub(r"\$\{([^}]+)\}", lambda m: value(m[1]), node.value))
    Loader.add_constructor("!If", lambda loader, node: loader.construct_sequence(node, deep=True)[1 if irsa else 2])
    for tag in ("!Not", "!Equals"):
        Loader.add_constructor(tag, lambda loader, node: None)
    return {name: r["Properties"] for name, r in yaml.load(text, Loader)["Resources"].items()}


def test_cfn_lint_has_nothing_to_say_of_the_stack():
    found = subprocess.run([program("cfn-lint"), INFRA / "s3/stack.yaml"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_only_the_pods_that_train_take_the_role_of_runs():
    accounts = [
        a["metadata"]["name"] for a in yaml.safe_load_all((INFRA / "kubernetes/base/accounts.yaml").read_text())
    ]
    component = yaml.safe_load((INFRA / "kubernetes/components/irsa/kustomization.yaml").read_text())["patches"][0]
    wanted = {name for name in accounts if re.fullmatch(component["target"]["name"], name)}
    assert wanted == {"unlearn-head", "unlearn-worker"} and "role/unlearn-runs" in component["patch"]
    pods = stack()["RunsRole"]["AssumeRolePolicyDocument"]["Statement"][0]["Condition"]["StringEquals"]
    assert set(pods["aws:RequestTag/kubernetes-service-account"]) == wanted
    irsa = json.loads(stack(irsa=True)["RunsRole"]["AssumeRolePolicyDocument"])["Statement"][0]["Condition"][
        "StringEquals"
    ]
    assert {subject.split(":")[-1] for subject in irsa["OidcIssuer:sub"]} == wanted
    associated = [r for r in stack().values() if r.get("RoleArn") == "RunsRole.Arn"]
    assert {r["ServiceAccount"] for r in associated} == wanted
    [cycle] = [r for r in stack().values() if r.get("RoleArn") == "CycleRole.Arn"]
    accounts = yaml.safe_load_all((INFRA / "kubernetes/components/cycle/accounts.yaml").read_text())
    assert cycle["ServiceAccount"] == next(a for a in accounts if a["kind"] == "ServiceAccount")["metadata"]["name"]
    pods = stack()["CycleRole"]["AssumeRolePolicyDocument"]["Statement"][0]["Condition"]["StringEquals"]
    assert pods["aws:RequestTag/kubernetes-service-account"] == cycle["ServiceAccount"]


@pytest.fixture(scope="module")
def s3_stack():
    """The URL of an S3 server with the stack's buckets, and users RUNS, RELEASE and CYCLE with its roles' policies."""
    resources = stack()
    policies = [
        {"name": name, "content": json.dumps(resources[name]["PolicyDocument"])}
        for name in ("RunsAccess", "ReleaseAccess")
    ]
    granted = {
        role: [name for name in ("RunsAccess", "ReleaseAccess") if role in resources[name]["Roles"]]
        for role in ("RunsRole", "ReleaseRole", "CycleRole")
    }
    users = [
        s3_identity(user, policyNames=granted[role])
        for user, role in ((RUNS, "RunsRole"), (RELEASE, "ReleaseRole"), (CYCLE, "CycleRole"))
    ]
    with s3_serving(users, policies) as url:
        keys = {"aws_access_key_id": ADMIN[0], "aws_secret_access_key": ADMIN[1], "region_name": "us-east-1"}
        admin = boto3.client("s3", endpoint_url=url, **keys)
        for bucket in BUCKETS:
            name, document = resources[bucket]["BucketName"], resources[f"{bucket}Policy"]["PolicyDocument"]
            admin.create_bucket(Bucket=name, ObjectLockEnabledForBucket=bucket == "Releases")
            # The server speaks no TLS here; what the first statement does is tested by itself.
            assert document["Statement"][0]["Sid"] == "OnlyTls"
            admin.put_bucket_policy(Bucket=name, Policy=json.dumps(document | {"Statement": document["Statement"][1:]}))
        yield url


def refused(action, *args) -> None:
    with pytest.raises(StorageError, match="may not do this"):
        action(*args)


def test_a_run_needs_what_its_role_grants_and_has_no_more(s3_stack, s3_user, tiny_shards, tiny_model, tmp_path):
    s3_user(ADMIN, s3_stack)
    data, runs = Storage("s3://unlearn-data-1/tiny"), Storage("s3://unlearn-runs-1/runs/7")
    for file in Path(tiny_shards).iterdir():
        data.write(file.name, file.read_bytes())
    Storage("s3://unlearn-releases-1").write("old", b"1")
    Storage("s3://unlearn-runs-1").write("elsewhere", b"1")

    s3_user(RUNS, s3_stack)
    run = tiny_config(runs.uri, data.uri, tiny_model, "training.checkpoint_every=1", "training.keep_checkpoints=1")
    train(run)
    kept = {name.split("/")[1] for name in runs.files("checkpoints")}
    assert kept == {"step-00000004"}  # the others were pruned: that is what the right to delete is for
    assert runs.is_file("model/weights.safetensors")
    assert not runs.is_file("nothing-here")  # 404, not 403: that is what the right to list is for
    refused(data.write, "new", b"1")
    refused(data.delete, "manifest.row_groups")
    for forbidden in (Storage("s3://unlearn-runs-1"), Storage("s3://unlearn-releases-1")):
        refused(forbidden.write, "x", b"1")
    refused(Storage("s3://unlearn-runs-1").read, "elsewhere")
    refused(Storage("s3://unlearn-releases-1").read, "old")

    s3_user(RELEASE, s3_stack)
    assert runs.read("config.yaml")
    refused(runs.write, "config.yaml", b"1")
    refused(runs.delete, "config.yaml")
    refused(data.read, "manifest.row_groups")

    s3_user(CYCLE, s3_stack)  # which trains and releases
    releases = Storage("s3://unlearn-releases-1")
    releases.write("certificates/v1.json", b"1")
    assert data.read("manifest.row_groups") and releases.read("certificates/v1.json")
    runs.write("of-the-cycle", b"1")
    runs.delete("of-the-cycle")
    refused(releases.delete, "certificates/v1.json")
    refused(data.write, "new", b"1")


def client(user: tuple[str, str], url: str):
    return boto3.client(
        "s3", endpoint_url=url, aws_access_key_id=user[0], aws_secret_access_key=user[1], region_name="us-east-1"
    )


def test_a_release_is_written_once_and_nobody_deletes_it(s3_stack):
    release, admin, bucket = client(RELEASE, s3_stack), client(ADMIN, s3_stack), "unlearn-releases-1"
    release.put_object(Bucket=bucket, Key="7/model", Body=b"first", IfNoneMatch="*")
    with pytest.raises(release.exceptions.ClientError, match="PreconditionFailed"):
        release.put_object(Bucket=bucket, Key="7/model", Body=b"second", IfNoneMatch="*")
    with pytest.raises(
        release.exceptions.ClientError, match="AccessDenied"
    ):  # not in AES256, which is not the bucket's key
        release.put_object(Bucket=bucket, Key="7/other", Body=b"1", IfNoneMatch="*", ServerSideEncryption="AES256")
    for who in (release, admin):  # the bucket's policy stands over the administrator's rights
        with pytest.raises(who.exceptions.ClientError, match="AccessDenied"):
            who.delete_object(Bucket=bucket, Key="7/model")
    assert release.get_object(Bucket=bucket, Key="7/model")["Body"].read() == b"first"


def test_every_access_is_logged_where_nobody_deletes(s3_stack):
    resources = stack()
    logs, rest = resources["Logs"], {name: resources[name] for name in BUCKETS if name != "Logs"}
    places = {name: bucket["LoggingConfiguration"] for name, bucket in rest.items()}
    assert {place["DestinationBucketName"] for place in places.values()} == {
        logs["BucketName"]
    } and "LoggingConfiguration" not in logs
    assert {place["LogFilePrefix"] for place in places.values()} == {f"{name.lower()}/" for name in rest}
    # What S3 wants of a bucket that it delivers logs to.
    assert logs["BucketEncryption"]["ServerSideEncryptionConfiguration"] == [
        {"ServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
    ]
    assert "ObjectLockEnabled" not in logs
    statements = {s["Sid"]: s for s in resources["LogsPolicy"]["PolicyDocument"]["Statement"]}
    delivers = statements["S3Delivers"]
    assert (delivers["Effect"], delivers["Principal"], delivers["Action"]) == (
        "Allow",
        {"Service": "logging.s3.amazonaws.com"},
        "s3:PutObject",
    )
    assert set(delivers["Condition"]["ArnLike"]["aws:SourceArn"]) == {
        f"arn:aws:s3:::{bucket['BucketName']}" for bucket in rest.values()
    }
    assert [s["Effect"] for name, s in statements.items() if name != "S3Delivers"] == ["Deny"] * 3
    admin = client(ADMIN, s3_stack)
    admin.put_object(
        Bucket="unlearn-logs-1", Key="runs/1", Body=b"1"
    )  # in the part of the log service, which this server does not know
    for who in (admin, client(RUNS, s3_stack), client(RELEASE, s3_stack)):
        with pytest.raises(who.exceptions.ClientError, match="AccessDenied"):
            who.delete_object(Bucket="unlearn-logs-1", Key="runs/1")
    for who in (client(RUNS, s3_stack), client(RELEASE, s3_stack)):
        for call in (who.get_object, who.put_object):
            with pytest.raises(who.exceptions.ClientError, match="AccessDenied"):
                call(Bucket="unlearn-logs-1", Key="runs/1")


def test_without_tls_nothing_is_answered(s3_stack):
    admin, policy = client(ADMIN, s3_stack), stack()["DataPolicy"]["PolicyDocument"]
    only_tls = json.dumps(policy).replace("unlearn-data-1", "plain")
    admin.create_bucket(Bucket="plain")
    admin.put_object(Bucket="plain", Key="x", Body=b"1")
    admin.put_bucket_policy(Bucket="plain", Policy=only_tls)
    for call in (admin.get_object, admin.head_object):
        with pytest.raises(admin.exceptions.ClientError, match="AccessDenied|403"):
            call(Bucket="plain", Key="x")
