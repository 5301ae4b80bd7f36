"""The cluster files, checked as Ray's launcher and the KubeRay operator would read them."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import boto3
import pytest
import yaml
from packaging.requirements import Requirement
from pyarrow.fs import LocalFileSystem
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.data import DataContext
from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import CheckpointManager, IdColumnCheckpointManager
from ray.data.checkpoint.checkpoint_writer import PENDING_CHECKPOINT_SUFFIX
from ray.data.datasource import BlockBasedFileDatasink
from ray.data.datasource.file_datasink import _FileDatasink
from servers import free_ports

from scacam.jobs.explain import add_arguments
from scacam.pipeline.allotments import Allotment, allot, divide, rows_per_shard

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLACEHOLDER = "ami-00000000000000000"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())


def ray_version() -> str:
    """The oldest release of Ray that the project runs on."""
    requirements = (Requirement(text) for text in PROJECT["dependencies"])
    (ray,) = (requirement for requirement in requirements if requirement.name == "ray")
    (minimum,) = (bound.version for bound in ray.specifier if bound.operator == ">=")
    return f"{minimum}.0"


def test_launcher_accepts_the_cluster(config):
    validate_config(prepare_config(config))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("available_node_types", "cpu", "min_worker"), 1),
        (("head_node_type",), "heed"),
        (("available_node_types", "gpu", "min_workers"), 19),
        (("available_node_types", "gpu", "resources"), {"GPU": 0.5}),
    ],
)
def test_launcher_refuses_mistakes(config, path, value):
    *outer, last = path
    inner = config
    for key in outer:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(Exception, match=r"min_worker|head_node_type|max_workers|0\.5"):
        validate_config(prepare_config(config))


def test_cpu_workers_scale_and_gpu_workers_are_there_from_the_start(config):
    cpu, gpu = (config["available_node_types"][name] for name in ("cpu", "gpu"))
    assert cpu["min_workers"] < cpu["max_workers"]
    assert gpu["min_workers"] == gpu["max_workers"] > 0
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert cpu["max_workers"] + gpu["max_workers"] == config["max_workers"]


def test_no_port_is_opened(config):
    assert config["provider"]["security_group"]["IpPermissions"] == []
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start


def test_images_are_of_the_ray_that_is_required(config, rayjob):
    found = re.findall(r"rayproject/ray:([\d.]+)-py(\d+)", json.dumps([config, rayjob]))
    assert set(found) == {(ray_version(), PROJECT["requires-python"][2:].replace(".", ""))}
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == ray_version()


def test_setup_installs_what_the_project_depends_on(config, tmp_path):
    (remote, local), *others = config["file_mounts"].items()
    assert not others
    home = tmp_path / "scacam"
    home.mkdir()
    (home / "pyproject.toml").write_text((ROOT / local).read_text())
    write, install = config["setup_commands"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = write.replace(str(Path(remote).parent), str(home))
    subprocess.run(command, shell=True, check=True, env=environment)
    requirements = (home / "requirements.txt").read_text().splitlines()
    assert requirements == [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"]]
    assert install == f"pip install --no-cache-dir -r {Path(remote).parent}/requirements.txt"


def test_rayjob_installs_what_the_project_depends_on(rayjob):
    environment = yaml.safe_load(rayjob["spec"]["runtimeEnvYAML"])
    assert environment["pip"] == [
        text for text in PROJECT["dependencies"] if Requirement(text).name != "ray"
    ]
    assert environment["working_dir"].endswith(".zip")


def test_rayjob_runs_the_job_with_arguments_that_it_knows(rayjob):
    program, job, *arguments = rayjob["spec"]["entrypoint"].split()
    assert program == "python"
    assert (ROOT / job).is_file()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(arguments)
    assert options.output.startswith("s3://")
    groups = {
        group["groupName"]: group for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    assert options.gpus == groups["gpu"]["replicas"]  # one each


def test_rayjob_has_the_form_that_the_operator_wants(rayjob):
    """By hand after its types of `ray.io/v1`: what is required, and no field that is not there."""
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", rayjob["metadata"]["name"])
    spec = rayjob["spec"]
    assert spec.keys() <= {
        "submissionMode", "entrypoint", "runtimeEnvYAML", "backoffLimit", "rayClusterSpec",
        "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "suspend",
    }  # fmt: skip
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")
    # A fresh cluster per attempt is what backoffLimit means, and that needs the old one shut down.
    assert spec["backoffLimit"] >= 0
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster.keys() <= {
        "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
        "workerGroupSpecs",
    }  # fmt: skip
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"].keys() <= {"idleTimeoutSeconds", "upscalingMode"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head.keys() == {"serviceType", "rayStartParams", "template"}
    for group in workers:
        assert group.keys() == {
            "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
        }  # fmt: skip
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["limits"] == resources["requests"]
            assert all(isinstance(amount, str) for amount in resources["limits"].values())
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    gpu = next(group for group in workers if group["groupName"] == "gpu")
    assert gpu["minReplicas"] == gpu["maxReplicas"] > 0
    (container,) = gpu["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    ("workers", "costs", "expected"),
    [
        (8, [1.0], [8]),
        (8, [3.0, 3.0], [4, 4]),
        (16, [11.0, 101.0], [2, 14]),  # 5.5 and 7.2 per image; with one and fifteen, 11 and 6.7
        (4, [1.0, 1.0, 8.0], [1, 1, 2]),
        (2, [1.0, 5.0, 1.0], [1, 1, 1]),  # pools take turns where there are too few workers
    ],
)
def test_the_slowest_pool_gets_the_next_worker(workers, costs, expected):
    assert divide(workers, costs) == expected


@pytest.mark.parametrize(
    ("gpus", "costs", "actors", "share"),
    [
        (1, [1.0], [2], 0.5),
        (2, [1.0, 1.0, 1.0], [2, 1, 1], 0.5),
        (1, [1.0, 1.0, 1.0], [1, 1, 1], 0.333),
        (3, [1.0, 5.0], [1, 5], 0.5),
    ],
)
def test_actors_that_share_gpus_all_find_a_place(gpus, costs, actors, share):
    """All pools hold their actors at once: what Ray cannot place would wait for ever."""
    allotments = allot(costs, gpus, images=1000).networks
    assert [allotment.actors for allotment in allotments] == actors
    assert {allotment.num_gpus for allotment in allotments} == {share}
    assert sum(actors) <= gpus * int(1 / share)


@pytest.mark.parametrize(("gpus", "networks"), [(1, 1), (1, 3), (2, 3), (3, 1), (8, 2)])
def test_actors_that_decode_on_gpus_find_a_place_beside_the_others(gpus, networks):
    """Whichever GPU each gets: all shares are alike, and so many go into one."""
    of_networks, decoding = allot([1.0] * networks, gpus, images=100_000, gpu_decode=True)
    assert len(of_networks) == networks
    assert decoding is not None
    assert decoding.actors == 2 * gpus
    (share,) = {allotment.num_gpus for allotment in [*of_networks, decoding]}
    actors = sum(allotment.actors for allotment in [*of_networks, decoding])
    assert actors <= gpus * int(1 / share)


@pytest.mark.parametrize(
    ("images", "actors"), [(20, [1, 1]), (500, [2, 1]), (1_000, [4, 2]), (10_000, [8, 3])]
)
def test_an_actor_that_would_have_little_to_do_is_not_started(monkeypatch, images, actors):
    monkeypatch.setattr("scacam.pipeline.allotments.cores", lambda: 8)
    allotments = allot([0.018, 0.006], 0, images).networks
    assert [allotment.actors for allotment in allotments] == actors


@pytest.mark.parametrize("costs", [[1.0], [1.0, 1.0], [19.0, 35.0, 12.0], [1.0, 1.0, 40.0]])
@pytest.mark.parametrize("cpus", [2, 5, 64])
def test_no_pool_holds_up_cores_that_are_shared(monkeypatch, cpus, costs):
    monkeypatch.setattr("scacam.pipeline.allotments.cores", lambda: cpus)
    allotments = allot([cost / 1000 for cost in costs], 0, images=10**7).networks
    actors = [allotment.actors for allotment in allotments]
    shared = cpus / sum(costs)  # images that all cores come to, were they never idle
    assert all(many / cost >= shared for many, cost in zip(actors, costs, strict=True))
    assert max(actors) <= cpus
    assert sum(allotment.actors * allotment.num_cpus for allotment in allotments) <= cpus / 2


CORE, TWO_CORES, GPU = Allotment(1, 0.5, 0.0), Allotment(2, 0.5, 0.0), Allotment(2, 0.5, 0.5)


@pytest.mark.parametrize(
    ("images", "image_bytes", "costs", "allotments", "rows"),
    [
        (10, 150_528, [0.02], [CORE], 10),  # less than half a second of work is not divided
        (100, 150_528, [0.02], [CORE], 25),  # four shards for the one actor
        (10, 150_528, [0.2], [CORE], 3),
        (3_450, 150_528, [0.02], [TWO_CORES], 345),  # ten blocks for two, in place of nine
        (1_200, 150_528, [0.02, 0.01], [TWO_CORES, CORE], 100),  # four for each of three actors
        (10**7, 3_072, [0.02], [CORE], 512),
        (10**7, 150_528, [0.02], [CORE], 425),  # 64 MB of 224 × 224 × 3 bytes
        (10**7, 3 * 600 * 600, [0.02], [CORE], 59),
        (10**7, 150_528, [0.02, 1.8], [CORE, CORE], 33),  # a minute of the slowest
        (10**7, 3_072, [1.8], [GPU], 333),
        (10**7, 10**9, [1000.0], [GPU], 1),
    ],
)
def test_a_block_is_bounded_in_bytes_and_in_work(images, image_bytes, costs, allotments, rows):
    assert rows_per_shard(images, image_bytes, costs, allotments) == rows


def test_what_is_used_of_ray_without_being_promised_exists():
    """The upper bound in pyproject.toml is there for these."""
    assert "load_checkpoint" in vars(CheckpointManager)
    assert PENDING_CHECKPOINT_SUFFIX == ".pending"
    config = CheckpointConfig("id", "/tmp/none", override_filesystem=LocalFileSystem())
    manager = IdColumnCheckpointManager(
        checkpoint_config=config, data_context=DataContext.get_current()
    )
    assert manager.checkpoint_path == "/tmp/none"
    assert manager.filesystem is config.filesystem
    assert WRITE_UUID_KWARG_NAME == "write_uuid"
    # The sink overrides `write`, and not what the public class asks for.
    assert list(signature(BlockBasedFileDatasink.write).parameters) == ["self", "blocks", "ctx"]
    assert issubclass(BlockBasedFileDatasink, _FileDatasink)
    sink = BlockBasedFileDatasink("/tmp/none", file_format="parquet")
    assert sink.filename_provider.get_filename_for_task("uuid", 7) == "uuid_000007.parquet"


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What a process needs in its environment to take a mock server on loopback for AWS."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
    }
    moto = Path(sys.executable).parent / "moto_server"
    with (tmp_path / "moto.log").open("wb") as log:
        command = [str(moto), "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urlopen(f"{url}/moto-api/", timeout=5).close()
                break
            except (URLError, OSError):
                assert time.monotonic() < deadline, (tmp_path / "moto.log").read_text()
                time.sleep(0.2)
        yield environment
    finally:
        server.kill()
        server.wait()


LAUNCH = """
import json, sys, yaml
from ray.autoscaler._private import commands
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

config = commands._bootstrap_config(yaml.safe_load(sys.stdin), no_config_cache=True)
provider = _get_node_provider(config["provider"], config["cluster_name"])
for name, kind in config["available_node_types"].items():
    provider.create_node(kind["node_config"], {TAG_RAY_USER_NODE_TYPE: name}, 1)
json.dump(config, sys.stdout)
"""


@pytest.mark.long
def test_cluster_starts_on_a_mock_of_aws(config, aws):
    """Keys, roles, subnets, a security group and one node of each type; nothing is logged in to."""
    ec2 = boto3.client(
        "ec2",
        config["provider"]["region"],
        endpoint_url=aws["AWS_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    image = ec2.describe_images()["Images"][0]["ImageId"]
    text = (ROOT / "cluster.yaml").read_text()
    assert PLACEHOLDER in text
    launched = launch(text.replace(PLACEHOLDER, image), aws)
    assert launched.returncode == 0, launched.stderr
    resolved = json.loads(launched.stdout[launched.stdout.index("{") :])
    resources = {name: kind["resources"] for name, kind in resolved["available_node_types"].items()}
    assert resources["head"]["CPU"] == 0
    assert resources["cpu"]["CPU"] == 16
    assert (resources["gpu"]["CPU"], resources["gpu"]["GPU"]) == (8, 1)

    reservations = ec2.describe_instances()["Reservations"]
    instances = [instance for group in reservations for instance in group["Instances"]]
    lifecycles = {i["InstanceType"]: i.get("InstanceLifecycle") for i in instances}
    assert lifecycles == {"m6i.xlarge": None, "c6i.4xlarge": "spot", "g5.2xlarge": "spot"}

    groups = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["scacam"]}])[
        "SecurityGroups"
    ]
    (group,) = groups
    from_anywhere = [rule for rule in group["IpPermissions"] if rule.get("IpRanges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_anywhere] == [(22, 22)]


@pytest.mark.long
def test_mock_of_aws_finds_a_mistake_that_the_schema_does_not(config, aws):
    text = (ROOT / "cluster.yaml").read_text().replace("MarketType", "MarketTyp")
    validate_config(prepare_config(yaml.safe_load(text)))
    launched = launch(text, aws)
    assert launched.returncode != 0
    assert "MarketTyp" in launched.stderr + launched.stdout


def launch(text: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LAUNCH]
    return subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, timeout=600
    )
