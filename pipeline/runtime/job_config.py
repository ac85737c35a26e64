"""Configs: typed dataclasses from a YAML file, then command-line overrides.

An unknown key, a wrong type or a missing value stops the job before Ray starts, with one line that
names the key. `--help` prints every field's docstring.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jsonargparse import ArgumentParser
from jsonargparse import set_parsing_settings as _set_parsing_settings

C = TypeVar("C")

# Field docstrings (the string below a field) are the help.
_set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(config_class: type[C], description: str, arguments: Sequence[str] | None = None) -> C:
    """The config of a job: `--config FILE`, then overrides such as `--train.steps 100`.

    Exits with status 2 and one line on stderr if something is wrong.
    """
    parser = ArgumentParser(description=description, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class, as_group=False)
    parsed = parser.parse_args(list(arguments) if arguments is not None else None)
    try:
        values = parser.instantiate_classes(parsed).as_dict()
        values.pop("config", None)
        return config_class(**values)
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def run_job(
    config_class: type[C],
    description: str | None,
    run: Callable[[C], Any],
    arguments: Sequence[str] | None = None,
) -> Any:
    """Entry point of every `jobs/<stage>.py`: read the config, run, report a user's mistake in one line."""
    config = parse(config_class, (description or "").split("\n")[0], arguments)
    try:
        return run(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
