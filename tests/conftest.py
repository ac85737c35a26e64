from typing import Any

import pytest
import ray
from xdist.scheduler import LoadScopeScheduling

_ATTEMPTS = 4
_CLUSTERS = (
    "tests/demo/test_demo.py",
    "tests/deploy/test_scaling.py",
    "tests/pipeline/data/test_kills.py",
    "tests/pipeline/training/runs/test_train_dit.py",
    "tests/pipeline/training/runs/test_training_faults.py",
    "tests/pipeline/training/runs/test_train_vae.py",
)
"""Files whose tests start clusters, or kill at a moment that they chose: one after the other."""


class ByFile(LoadScopeScheduling):
    """Of several processes, one runs all tests of a file, since they share its fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "clusters" if file in _CLUSTERS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def local_ray():
    """A Ray of two cores for all tests that need one."""
    for attempt in range(_ATTEMPTS):
        try:
            ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            break
        except Exception as error:  # Ray gives a node 30 s to start, which a busy machine may not keep
            if "timed out during startup" not in str(error) or attempt == _ATTEMPTS - 1:
                raise
            ray.shutdown()
    yield
    ray.shutdown()
