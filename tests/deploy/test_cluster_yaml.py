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


def test_the_head_runs_no_work_and_workers_start_from_zero(cluster):
    nodes = cluster["available_node_types"]
    assert nodes["head"]["resources"]["CPU"] == 0
    assert nodes["cpu_worker"]["min_workers"] == nodes["h100_worker"]["min_workers"] == 0
    assert nodes["h100_worker"]["resources"]["GPU"] == 8


def test_authentication_is_on_and_the_dashboard_stays_on_loopback(cluster):
    for command in cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]:
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]
