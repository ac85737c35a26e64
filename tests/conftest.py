from typing import Any

import pytest

from tests import settings

settings.apply()

_ATTEMPTS = 4
_CLUSTERS = (
    "tests/demo/test_demo.py",
    "tests/deploy/test_scaling.py",
    "tests/pipeline/data/test_kills.py",
    "tests/pipeline/training/runs/test_training_faults.py",
)
"""Files whose tests start clusters, or kill at a moment that they chose: one after the other."""


@pytest.hookimpl(optionalhook=True)  # unknown without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several processes, one runs all tests of a file, since they share its fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "clusters" if file in _CLUSTERS else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def local_ray():
    """A Ray of two cores for all tests that need one."""
    import ray  # not for those that need none

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


@pytest.fixture(scope="session")
def latents_root(tmp_path_factory, local_ray) -> str:
    """A data root: latents of four clips in two buckets, by a random autoencoder. Copy it to change it."""
    from model.text_encoders import TINY_ENCODERS
    from pipeline.data import precompute
    from pipeline.data.cropping import Bucket
    from tests.helpers.data_root import make_data_root
    from tests.helpers.tiny_models import save_vae

    folder = tmp_path_factory.mktemp("latents")
    url = make_data_root(folder, ["cup.mp4", "fig.jpg"], ["box.mp4", "cat.jpg"])
    vae, buckets = save_vae(folder / "vae"), [Bucket(1, 64, 64), Bucket(5, 64, 64)]
    precompute.run(
        precompute.PrecomputeConfig(data=url, vae=vae, text=TINY_ENCODERS, buckets=buckets, variants=3)
    )
    return url
