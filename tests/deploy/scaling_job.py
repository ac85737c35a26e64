"""A job that asks a cluster for one placement group after another: BUNDLES.

BUNDLES: JSON, the bundles of each group. Prints the kinds of the cluster's nodes at the start, at each group,
and when the last node has gone.
"""

import json
import sys
import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group


def workers() -> list[str]:
    return sorted(
        "GPU" if node["Resources"].get("GPU") else "CPU"
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    )


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    print(json.dumps(workers()), flush=True)
    for bundles in json.loads(sys.argv[1]):
        group = placement_group(bundles)
        assert group.wait(60), "no node came"
        print(json.dumps(workers()), flush=True)
        remove_placement_group(group)
    deadline = time.monotonic() + 90
    while workers() and time.monotonic() < deadline:
        time.sleep(0.5)
    print(json.dumps(workers()), flush=True)
