from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load(CLUSTER.read_text())


def test_the_launcher_accepts_it(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_rays_schema_really_checks(cluster):
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(Exception, match="max_worker_s"):
        validate_config({**cluster, "max_worker_s": 3})


def test_the_launchers_aws_code_takes_the_network_interfaces(cluster):
    """Each needs a subnet and a group of its own, and none beside them: Ray refuses anything else."""
    pytest.importorskip("boto3")
    from ray.autoscaler._private.aws.config import _configure_node_type_from_network_interface

    node = _configure_node_type_from_network_interface(cluster["available_node_types"]["h100_worker"])
    assert len(node["node_config"]["SubnetIds"]) == 32


def test_every_h100_node_has_its_32_efa_interfaces(cluster):
    interfaces = cluster["available_node_types"]["h100_worker"]["node_config"]["NetworkInterfaces"]
    assert [one["NetworkCardIndex"] for one in interfaces] == list(range(32))
    assert [one["InterfaceType"] for one in interfaces] == ["efa"] + ["efa-only"] * 31
    assert [one["DeviceIndex"] for one in interfaces] == [0] + [1] * 31


def test_the_head_runs_no_work_and_workers_start_from_zero(cluster):
    nodes = cluster["available_node_types"]
    assert nodes["head"]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in cluster["head_start_ray_commands"][1]
    assert nodes["cpu_worker"]["min_workers"] == nodes["h100_worker"]["min_workers"] == 0
    assert nodes["h100_worker"]["resources"]["GPU"] == 8
    assert cluster["idle_timeout_minutes"] <= 5


def test_only_data_workers_are_on_spot(cluster):
    spot = {
        name: "InstanceMarketOptions" in node["node_config"]
        for name, node in cluster["available_node_types"].items()
    }
    assert spot == {"head": False, "cpu_worker": True, "h100_worker": False}


def test_the_papers_training_fits(cluster):
    scale = yaml.safe_load((CLUSTER.parent / "configs/paper/train_dit.yaml").read_text())["scale"]
    node = cluster["available_node_types"]["h100_worker"]
    assert node["max_workers"] * node["resources"]["GPU"] >= scale["num_workers"]
    assert node["resources"]["GPU"] * scale["cpus_per_worker"] <= node["resources"]["CPU"]


def test_authentication_is_on_and_the_dashboard_stays_on_loopback(cluster):
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]


def test_ray_makes_no_security_group_of_its_own(cluster):
    """Ray's own lets the whole world reach SSH; it makes one for each type that names none."""
    assert "security_group" not in cluster["provider"]
    for node in cluster["available_node_types"].values():
        config = node["node_config"]
        groups = [config.get("SecurityGroupIds")] + [
            one.get("Groups") for one in config.get("NetworkInterfaces", [])
        ]
        assert any(groups)
