"""URLs in configs: a field of type `Url` holds a complete URL, even if a plain path was given.

A config's `__post_init__` begins with `check_urls(self)`, so that configs from a file, from the command line
and from code hold the same.
"""

import dataclasses
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pipeline.store.storage import check_url

Url = Annotated[str, "URL"]
"""A file:// or s3:// URL, absolute, without a trailing slash."""


def check_urls(config: Any, prefix: str = "") -> None:
    """Complete every `Url` of a frozen dataclass in place, also within dicts and lists.

    Where the type allows a word instead (`Url | Literal["hub"]`), the word stays. prefix: of the field's key
    in error messages, such as "model.". Raises ValueError, naming the key, for a URL that cannot be used.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        object.__setattr__(
            config, field.name, _with_whole_urls(given, hints[field.name], prefix + field.name)
        )


def _with_whole_urls(value: Any, hint: Any, key: str) -> Any:
    arms = get_args(hint)
    if hint == Url and isinstance(value, str):
        return check_url(value, key)
    if get_origin(hint) in (Union, types.UnionType):
        words = [word for arm in arms if get_origin(arm) is Literal for word in get_args(arm)]
        if value in words:
            return value
        key += f" (or {' or '.join(words)})" if words else ""
        for arm in arms:
            value = _with_whole_urls(value, arm, key)
    elif get_origin(hint) is dict and isinstance(value, dict):
        return {name: _with_whole_urls(item, arms[1], f"{key}.{name}") for name, item in value.items()}
    elif get_origin(hint) is list and isinstance(value, list):
        return [_with_whole_urls(item, arms[0], key) for item in value]
    return value
