import pytest
import ray


@pytest.fixture(scope="session")
def local_ray():
    """A Ray of two cores for all tests that need one."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
