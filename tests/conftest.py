import pytest
import ray

_ATTEMPTS = 4


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
