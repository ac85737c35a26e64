"""The one video of a restoration, in this process, without Ray: CONFIG.pickle."""

import pickle
import sys
from pathlib import Path

from pipeline.restoration import restore
from pipeline.restoration.restore import RestoreActor, RestoreConfig


def the_row(config: RestoreConfig) -> dict:
    (row,) = restore.list_inputs(config)
    return {**row, "preview": True, "fingerprint": restore.fingerprint(config, row)}


def run(config: RestoreConfig) -> None:
    RestoreActor(config)(the_row(config))


if __name__ == "__main__":
    run(pickle.loads(Path(sys.argv[1]).read_bytes()))
