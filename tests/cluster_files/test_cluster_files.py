"""The files of cluster/ against the schemas, validators and parsers of what reads them.

None of it starts a cluster: that takes Kubernetes, AWS, Slurm or Docker.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from deepspeed.launcher import runner
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from physio_dist.config import DataOptions
from tests.cluster_files.shell import FOLDER, ROOT, checked, commands, header, texts, usage
from tests.tiers import require

FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".json")
NAMES = [path.relative_to(FOLDER).as_posix() for path in FILES]
KUBERNETES = sorted(FOLDER.glob("kuberay-*.yaml"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IMAGE = "REGISTRY/physio-dist:TAG"
LAUNCH = "physio_dist.launch"
SUBMIT = ["ray job submit", LAUNCH]
# What each file must start, so that a command that is not found cannot pass unseen.
STARTED = {
    "aws.yaml": {"ray up", "ray dashboard", *SUBMIT, "ray stop", "ray start"},
    "on-premises.yaml": {"ray up", "ray dashboard", *SUBMIT, "ray stop", "ray start"},
    "kuberay-cluster.yaml": set(SUBMIT),
    "kuberay-job.yaml": {LAUNCH},
    "slurm.sh": {"sbatch", "ray start", "ray health-check", LAUNCH},
    "compose.yaml": {"physio-dist shard", LAUNCH, "ray start"},
    "hostfile.example": {"deepspeed", "physio-dist report"},
    "observability/prometheus.yml": set(),
}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


@pytest.mark.parametrize("name", STARTED)
def test_file_header_lists_placeholders_and_three_commands(name: str) -> None:
    text = " ".join(header(FOLDER / name))
    assert re.search(r"[Ff]ill in", text)
    assert len(usage(FOLDER / name)) == 3
    # What is to be filled in is named, and nothing else looks like it.
    assert "CAPITALS" in text or not re.search(r"\b(REGISTRY|BUCKET_NAME|ACCOUNT|REGION)\b", text)


@pytest.mark.parametrize("name", STARTED)
def test_commands_and_options_in_files_exist(name: str) -> None:
    found = {program for text in texts(FOLDER / name) for words in commands(text) for program in checked(words)}
    assert found == STARTED[name]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ray start --head --dashbord-host=127.0.0.1", "has no --dashbord-host"),
        ("ray jobs submit -- true", "knows no jobs"),
        (f"echo a && ray job submit -- python -m {LAUNCH} --config configs/pretrain/ecg_base.yaml run.dirr=a", "dirr"),
        (f"bash -c 'python -m {LAUNCH} --config configs/pretrain/ecg_bass.yaml'", "ecg_bass"),
        ("bash tools/setup.sh; bash tools/setupp.sh", "setupp"),
        ('token="$(ray get-auth-token --generat)"', "--generat"),
    ],
)
def test_check_finds_unknown_command(text: str, told: str) -> None:
    with pytest.raises(Exception, match=re.escape(told)):
        for words in commands(text):
            checked(words)


def test_every_cluster_file_is_checked() -> None:
    assert set(NAMES) == {*STARTED, "observability/alerts.yml"}


# Kubernetes


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses unknown keys, which the API server would drop without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def crds(data_dir: Path) -> dict[str, Any]:
    """Schemas of KubeRay's kinds, from the folder of schemas beside that of the recordings."""
    folder = data_dir.parent / "schemas"
    require(folder.is_dir(), "KubeRay's resource definitions beside the recordings")
    found = {}
    for file in folder.glob("ray.io_*.yaml"):
        (document,) = [d for d in yaml.load_all(file.read_text(), yaml.CSafeLoader) if d]
        (version,) = [v for v in document["spec"]["versions"] if v["name"] == "v1"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        names = {"type": "object", "properties": {"name": {}, "labels": {}, "annotations": {}}}
        schema["properties"]["metadata"] = {**names, "additionalProperties": False, "required": ["name"]}
        found[document["spec"]["names"]["kind"]] = jsonschema.Draft202012Validator(schema)
    return found


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_manifests_match_their_schemas(file: Path, crds: dict[str, Any]) -> None:
    for document in documents(file):
        if document["apiVersion"] == "ray.io/v1":
            crds[document["kind"]].validate(document)
        else:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "enableInTreeAutoscalling", True),
        (("authOptions",), "mode", "tokens"),
        (("workerGroupSpecs", 0), "maxReplica", 3),
        (("workerGroupSpecs", 0), "maxReplicas", "3"),
        (("workerGroupSpecs", 0, "template", "spec"), "toleration", []),
        (("workerGroupSpecs", 0, "template", "spec", "tolerations", 0), "efect", "NoSchedule"),
        (("headGroupSpec", "template", "spec", "containers", 0), "envfrom", []),
    ],
)
def test_schema_finds_misspelt_field(
    crds: dict[str, Any], place: tuple[Any, ...], key: str, value: Any
) -> None:  # fmt: skip
    (cluster,) = [d for d in documents(FOLDER / "kuberay-cluster.yaml") if d["kind"] == "RayCluster"]
    part = cluster["spec"]
    for step in place:
        part = part[step]
    part[key] = value
    with pytest.raises(jsonschema.ValidationError, match=r"was unexpected|is not (one|of type)") as caught:
        crds["RayCluster"].validate(cluster)
    assert key in caught.value.message or key in caught.value.path


def ray_cluster(file: Path) -> dict[str, Any]:
    (found,) = [d["spec"] for d in documents(file) if d["kind"] in ("RayCluster", "RayJob")]
    return found.get("rayClusterSpec", found)  # type: ignore[no-any-return]


def pods(file: Path) -> Iterator[dict[str, Any]]:
    (found,) = [d["spec"] for d in documents(file) if d["kind"] in ("RayCluster", "RayJob")]
    if "submitterPodTemplate" in found:
        yield found["submitterPodTemplate"]["spec"]
    cluster = ray_cluster(file)
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_pods_run_unprivileged_as_image_user(file: Path) -> None:
    uid = int(re.search(r"^USER (\d+)$", DOCKERFILE, re.M)[1])  # type: ignore[index]
    confined = [ray_cluster(file)["autoscalerOptions"]]
    for pod in pods(file):
        user = pod["securityContext"]
        assert user["runAsNonRoot"] and user["runAsUser"] == user["fsGroup"] == uid
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        confined += pod["containers"]
        assert all(container["image"] == IMAGE for container in pod["containers"])
    for container in confined:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }  # fmt: skip
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][kind])


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_ray_cluster_has_token_and_spot_workers(file: Path) -> None:
    spec = ray_cluster(file)
    known = {name.removeprefix("--") for option in ray_cli.commands["start"].params for name in option.opts}
    assert spec["authOptions"]["mode"] == "token"
    assert spec["rayVersion"] == ray.__version__
    head, (workers,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert set(head["rayStartParams"]) <= known and set(workers["rayStartParams"]) <= known
    assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False
    policies = [d["spec"] for d in documents(file) if d["kind"] == "NetworkPolicy"]
    (ingress,) = [policy["ingress"] for policy in policies]
    # Only from the cluster's own pods without a port; the dashboard's is open to nobody, or to those who are named.
    open_to = [rule["from"] for rule in ingress if 8265 in [port["port"] for port in rule.get("ports", ())]]
    assert bool(open_to) == (head["rayStartParams"]["dashboard-host"] == "0.0.0.0")
    assert all(rule["from"] for rule in ingress)
    assert sum("ports" not in rule for rule in ingress) == 1
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    pod = workers["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert {"cloud.google.com/gke-spot", "nvidia.com/gpu"} == {t["key"] for t in pod["tolerations"]}
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == cache_dir()
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda file: file.name)
def test_file_defines_service_accounts_of_its_pods(file: Path) -> None:
    named = re.findall(r"serviceAccountName: (\S+)", file.read_text())
    made = [d["metadata"]["name"] for d in documents(file) if d["kind"] == "ServiceAccount"]
    assert sorted(named) == sorted(made) and len(set(made)) == 2


def test_files_share_no_service_account() -> None:
    """`kubectl delete -f` of one file would take it from the other's pods."""
    made = [d["metadata"]["name"] for file in KUBERNETES for d in documents(file) if d["kind"] == "ServiceAccount"]
    assert len(set(made)) == len(made)


def home() -> str:
    name = re.search(r"useradd .* (\w+) \\", DOCKERFILE)[1]  # type: ignore[index]
    return f"/home/{name}"


def cache_dir() -> str:
    """Default of ``data.cache_dir`` in the image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home())
        patch.delenv("XDG_CACHE_HOME", raising=False)
        return DataOptions().cache_dir


# Ray's own cluster launcher


@pytest.mark.parametrize("name", ["aws.yaml", "on-premises.yaml"])
def test_ray_validates_autoscaler_files(name: str) -> None:
    given = read(name)
    validate_config(prepare_config(given))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute'"):
        validate_config(prepare_config({**given, "idle_timeout_minute": 1}))
    lines = [*given["head_start_ray_commands"], *given["worker_start_ray_commands"]]
    starts = [line for line in lines if "ray start" in line]
    assert len(starts) == 2 and all("--metrics-export-port=8080" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_aws_validates_node_configuration() -> None:
    given = read("aws.yaml")
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in given["available_node_types"].values():
        asked = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(asked, shape)
        assert not report.has_errors(), report.generate_report()
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    nodes = {name: kind["node_config"] for name, kind in given["available_node_types"].items()}
    assert nodes["gpu"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in nodes[given["head_node_type"]]
    assert len({node["IamInstanceProfile"]["Arn"] for node in nodes.values()}) == 2
    wrong = {**nodes["gpu"], "IamInstanceProfil": {}, "MinCount": 1, "MaxCount": 1}
    assert "IamInstanceProfil" in botocore.validate.ParamValidator().validate(wrong, shape).generate_report()


def test_paths_match_dockerfile() -> None:
    venv = re.search(r"PHYSIO_DIST_VENV=(\S+)", DOCKERFILE)[1]  # type: ignore[index]
    uid = re.search(r"--uid (\d+)", DOCKERFILE)[1]  # type: ignore[index]
    aws = read("aws.yaml")
    assert aws["docker"]["image"] == IMAGE
    lines = [*aws["head_start_ray_commands"], *aws["worker_start_ray_commands"], *aws["head_setup_commands"]]
    assert all(f"{venv}/bin/" in line for line in lines)
    mounts = dict(option.split()[1].split(":")[:2] for option in aws["docker"]["run_options"] if option[:2] == "-v")
    assert set(mounts.values()) == {f"{home()}/.ray", cache_dir()}
    made = " ".join(aws["initialization_commands"])
    assert all(folder in made for folder in mounts) and set(re.findall(r"-[og] (\d+)", made)) == {uid}
    copied = {word for line in re.findall(r"^COPY --chown=\S+ (.*) \S+$", DOCKERFILE, re.M) for word in line.split()}
    mounted = {there: here for there, here in read("on-premises.yaml")["file_mounts"].items() if here in copied}
    assert mounted == {f"~/physio-dist/{name}": name for name in copied}
    # KubeRay's probes ask by wget, Ray's launcher copies by rsync.
    assert all(re.search(rf"^ .*\b{word}\b", DOCKERFILE, re.M) for word in ("wget", "rsync", "openssh-client"))


# The others


@pytest.mark.integration
def test_compose_file_matches_its_specification(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*command, str(FOLDER / "compose.yaml")], check=True)
    wrong = read("compose.yaml")
    wrong["services"]["head"]["enviroment"] = {}
    (tmp_path / "compose.yaml").write_text(json.dumps(wrong))
    refused = subprocess.run([*command, str(tmp_path / "compose.yaml")], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "enviroment" in refused.stdout


@pytest.mark.integration
def test_laptop_cluster_binds_to_localhost() -> None:
    services = read("compose.yaml")["services"]
    assert set(services) == {"head", "worker", "minio", "bucket"}
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)
    assert services["worker"]["deploy"]["replicas"] == 2
    for name, service in services.items():
        assert service["env_file"] == ["laptop.env"]
        assert all(needed in services for needed in service.get("depends_on", ()))
        assert not re.search("KEY|TOKEN|PASSWORD", " ".join(service.get("environment", ()))), name
    (line,) = [line for line in usage(FOLDER / "compose.yaml") if "laptop.env" in line]
    made = set(re.findall(r"\b([A-Z_]+)=", line))
    assert made == {
        "RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD",
    }  # fmt: skip
    ignored = subprocess.run(["git", "check-ignore", "-q", "cluster/laptop.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0


@pytest.mark.integration
def test_laptop_setup_writes_private_random_keys(tmp_path: Path) -> None:
    line = next(line for line in usage(FOLDER / "compose.yaml") if "laptop.env" in line)
    (tmp_path / "cluster").mkdir()
    for _ in range(2):
        subprocess.run(["bash", "-ec", line], cwd=tmp_path, check=True)
        file = tmp_path / "cluster" / "laptop.env"
        assert file.stat().st_mode & 0o77 == 0
        made = dict(entry.split("=", 1) for entry in file.read_text().splitlines())
        assert made["MINIO_ROOT_PASSWORD"] == made["AWS_SECRET_ACCESS_KEY"] and len(made["RAY_AUTH_TOKEN"]) == 64
        file.rename(tmp_path / f"{made['RAY_AUTH_TOKEN']}.env")
    assert len(list(tmp_path.glob("*.env"))) == 2


def test_deepspeed_parses_hostfile() -> None:
    assert runner.fetch_hostfile(str(FOLDER / "hostfile.example")) == {"HOST_1": 4, "HOST_2": 4}


@pytest.mark.integration
def test_hostfile_setup_command_lists_hosts(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "hostfile").write_text((FOLDER / "hostfile.example").read_text())
    listing = re.search(r"\$\((awk .*?)\)", usage(FOLDER / "hostfile.example")[0])[1]  # type: ignore[index]
    told = subprocess.run(["bash", "-ec", listing], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["HOST_1", "HOST_2"]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_files_contain_no_secret(file: Path) -> None:
    text = file.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{32,}\b|\bgh[pous]_|\bAIza", text)
    # A key, token or password is a reference, a path or the output of a command.
    named = r"(\w*(?:TOKEN|PASSWORD|SECRET_ACCESS_KEY|auth_token))[\"']?[=:] ?[\"']?([^\s\"']+)"
    for name, value in re.findall(named, text):
        assert value[0] in "$~/", f"{name} is {value}"
    # Whoever sees a job can read its runtime environment.
    assert not re.search(r"runtime-env|runtimeEnvYAML:|env_vars", text)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_ray_environment_variables_exist_in_ray(file: Path) -> None:
    used = set(re.findall(r"\bRAY_[A-Za-z_]+\b", file.read_text()))
    # Not an option of Ray's, but what it gives the commands that start a node.
    used -= {"RAY_HEAD_IP"} if file.name in ("aws.yaml", "on-premises.yaml") else set()
    folder = Path(ray.__file__).parent
    known = subprocess.run(
        ["grep", "-rhoaE", "--include=*.py", "--include=_raylet.so", "|".join(used) or "^$", str(folder)],
        env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    assert used <= set(known)
