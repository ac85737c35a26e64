"""What modules import, each in a process of its own: GROUPS.

GROUPS: JSON, pairs of what every module of a group may import and these modules. Prints a line [module,
everything imported] for each. It forks after what is allowed to all of its children, so that each does not
import it again.
"""

import importlib
import json
import os
import sys


def imported_by(names: list[str]) -> None:
    for name in names:
        if os.fork() == 0:
            importlib.import_module(name)
            print(json.dumps([name, sorted(sys.modules)]), flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, name


if __name__ == "__main__":
    for early, names in json.loads(sys.argv[1]):
        for name in early:
            importlib.import_module(name)
        imported_by(names)
