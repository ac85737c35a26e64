"""Several Ray nodes on this machine, beside the session's own Ray, with the token that both ask for."""

import contextlib
import os
from pathlib import Path
from typing import Any

from ray._private.authentication import authentication_token_setup as ray_tokens
from ray.cluster_utils import Cluster

from tests import settings

ROOT = Path(__file__).resolve().parents[2]
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def one_node_cluster() -> Cluster:
    """A head of one core. Nodes and drivers ask for a token, as ray.init has it for a local Ray."""
    ray_tokens.enable_token_auth_by_default()
    ray_tokens.ensure_token_if_auth_enabled()
    return Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})


def new_node(cluster: Cluster) -> Any:
    """One more node of one core."""
    for _ in range(3):
        with contextlib.suppress(Exception):  # 30 s to start, which a busy machine may not keep
            return cluster.add_node(**NODE)
    return cluster.add_node(**NODE)


def driver_environment() -> dict[str, str]:
    """For a driver on the cluster: of this process's Ray it may know the tokens, nothing else."""
    tokens = {key: value for key, value in os.environ.items() if key.startswith("RAY_AUTH_")}
    return {**settings.without_ray(), **tokens, "PYTHONPATH": str(ROOT)}
