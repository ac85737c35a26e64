"""Every field of every job's config has a help that reads on its own: `--help` shows it without its class."""

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path

import docstring_parser
import pytest

JOBS = sorted(file.stem for file in Path(__file__).parents[3].glob("jobs/[!_]*.py"))
ARGUMENTS: dict[str, list[list[str]]] = {job: [[]] for job in JOBS} | {"evaluate": [[], ["--task", "vae"]]}


def configs(job: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> set[type]:
    """The job's config class and every dataclass that its fields' types name, those below them too."""
    module, given = importlib.import_module(f"jobs.{job}"), []
    monkeypatch.setattr(module, "run_job", lambda config_class, *_: given.append(config_class))
    monkeypatch.setattr("sys.argv", [job, *arguments])
    module.main()
    found, waiting = set[type](), list[object](given)
    while waiting:
        kind = waiting.pop()
        waiting += typing.get_args(kind)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in found:
            found.add(kind)
            waiting += typing.get_type_hints(kind).values()
    assert found
    return found


def helps(config_class: type) -> Iterator[tuple[str, str]]:
    """Each field and the string below it, or "", own ones in place of inherited ones."""
    written: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        params = docstring_parser.parse_from_object(base).params
        written |= {param.arg_name: param.description or "" for param in params}
    for field in dataclasses.fields(config_class):
        yield f"{config_class.__name__}.{field.name}", written.get(field.name, "")


def stands_alone(text: str) -> bool:
    """Whether this is a sentence: three words or more, a capital at its beginning, a full stop at its end."""
    return len(text.split()) >= 3 and (text[0].isupper() or text[0] in "0123456789\"'") and text.endswith(".")


@pytest.mark.parametrize(
    ("job", "arguments"), [(job, arguments) for job in JOBS for arguments in ARGUMENTS[job]]
)
def test_every_fields_help_is_a_sentence(job, arguments, monkeypatch):
    classes = sorted(configs(job, arguments, monkeypatch), key=lambda kind: kind.__name__)
    offenders = [
        f"{name}: {text!r}" for kind in classes for name, text in helps(kind) if not stands_alone(text)
    ]
    assert not offenders, "no sentence of their own:\n" + "\n".join(offenders)


def test_jobs_are_found():
    assert len(JOBS) > 10
