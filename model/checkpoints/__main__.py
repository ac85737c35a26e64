"""Checking our networks against recorded numbers.

    python -m model.checkpoints verify FILE...

runs each case (weights, configuration, inputs and outputs of a reference run in one file) through the same
code that loads real checkpoints, prints the largest absolute error of each output, and exits with 1 if one
is above its pass line.
"""

import argparse
import json
import sys
from pathlib import Path

from model.checkpoints.files import read_header, read_tensors
from model.checkpoints.parity import cases


def main(arguments: list[str]) -> int:
    """`verify FILE...`: 0 if every output of every case is within its pass line."""
    parser = argparse.ArgumentParser(prog="python -m model.checkpoints", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="run recorded cases and print the error of each output")
    verify.add_argument("files", nargs="+", metavar="FILE", help="a case, .safetensors or .json")
    verify.add_argument("--kind", choices=cases.KINDS, help="what the files hold, if their names do not say")
    options = parser.parse_args(arguments)
    passed = [verify_file(path, options.kind) for path in options.files]
    return 0 if all(passed) else 1


def verify_file(path: str, kind: str | None) -> bool:
    """Run one case and print each output's error; whether all are within their lines."""
    passed = True
    try:
        header = json.loads(Path(path).read_text()) if path.endswith(".json") else read_header(path)
        tensors = {} if path.endswith(".json") else read_tensors(path)
        for result in cases.check(header, tensors, path, kind):
            print(f"{Path(path).name}  {result}", flush=True)
            passed &= result.passed
    except ValueError as error:
        print(f"{path}: {error}" if path not in str(error) else error, file=sys.stderr)
        return False
    return passed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
