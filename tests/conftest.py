import pytest
import ray

_ATTEMPTS = 4
_CLUSTERS = (
    "tests/demo/test_demo.py",
    "tests/deploy/test_scaling.py",
    "tests/pipeline/test_kills.py",
    "tests/pipeline/test_training.py",
    "tests/pipeline/test_training_faults.py",
    "tests/pipeline/test_train_vae.py",
)
"""Files whose tests start clusters, or kill at a moment that they chose: one after the other."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes, one runs all tests of a file, since they share its fixtures."""
    for item in items:
        file = item.path.relative_to(config.rootpath).as_posix()
        item.add_marker(pytest.mark.xdist_group("clusters" if file in _CLUSTERS else file))


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
