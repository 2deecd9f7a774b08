"""Configurations whose keys check their values, read from dicts and YAML."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_origin, get_type_hints

import numpy as np

from palettax._extras import require
from palettax._names import nearest

Check = Callable[[Any], Any]
"""Gives a value in the type that its key has, or raises a ValueError that says what to use."""

Number = float | int
"""A float, as users write it."""

C = TypeVar("C", bound="Configuration")


class Configuration:
    """A dataclass read from dicts and YAML, whose annotations say what values its keys take.

    The metadata of an `Annotated` key is its `Check` and, if the key is accepted and has no effect, what there is in
    its place, of which whoever sets it is warned.

    Raises:
        ValueError: naming the key, the value and what to use.

    Example:
        >>> @dataclasses.dataclass
        ... class Sizes(Configuration):
        ...     width: Annotated[int, integer(1)] = 4
        >>> Sizes.from_yaml("width: 0")
        Traceback (most recent call last):
        ValueError: width=0; use an integer, 1 or more
    """

    def __new__(cls, *args: Any, **keys: Any) -> Any:
        for name in keys:
            if name not in _parameters(cls):
                raise TypeError(f"{name}: {cls.__name__} has no such key; {nearest(name, _parameters(cls))}")
        return super().__new__(cls)

    @classmethod
    def from_dict(cls: type[C], config_dict: Mapping[str, Any]) -> C:
        """Read a dict.

        Args:
            config_dict: values by key; a key that is absent has its default.

        Raises:
            ValueError: a key that there is not, or a value that it cannot have.
        """
        if not isinstance(config_dict, Mapping):
            raise ValueError(f"{cls.__name__} is read from a dict of its keys, not from {config_dict!r}")
        known = _parameters(cls)
        for name in config_dict:
            if name not in known:
                raise ValueError(f"{name}: {cls.__name__} has no such key; {nearest(str(name), known)}")
        return cls(**config_dict)

    @classmethod
    def from_yaml(cls: type[C], yml: Any) -> C:
        """Read YAML, which holds what `from_dict` takes.

        Args:
            yml: a path, an open file, or the YAML itself. Empty YAML is an empty dict.

        Raises:
            ValueError: no YAML, or what `from_dict` refuses.
        """
        yaml = require("yaml", "coreml")
        if isinstance(yml, os.PathLike) or (isinstance(yml, str) and not _is_yaml(yml)):
            yml = Path(yml).read_text()
        try:
            found = yaml.safe_load(yml)
        except yaml.YAMLError as error:
            raise ValueError(f"this is no YAML: {error}") from error
        return cls.from_dict({} if found is None else found)

    def as_dict(self) -> dict[str, Any]:
        """Write a dict, from which `from_dict` makes an equal configuration.

        Returns:
            Every key with its value: dtypes by name, the configurations of modules as dicts.
        """
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(cast(Any, self))}

    def __post_init__(self) -> None:
        for name, (check, *instead) in _checks(type(self)).items():
            value = checked(name, getattr(self, name), check)
            object.__setattr__(self, name, value)
            if instead and value != getattr(type(self), name):
                warn_caller(f"{name}={value!r} has no effect: {instead[0]}")


@functools.cache
def _parameters(cls: type[Any]) -> tuple[str, ...]:
    """The keys of a configuration."""
    return tuple(inspect.signature(cls.__init__).parameters)[1:]  # without self


@functools.cache
def _checks(cls: type[Configuration]) -> dict[str, tuple[Any, ...]]:
    """The metadata of the keys that have any."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__ for name, hint in hints.items() if get_origin(hint) is Annotated}


def checked(name: str, value: Any, check: Check) -> Any:
    """The value in the type that its key has.

    Args:
        name: the key.
        value: what was given; a scalar of NumPy is as good as Python's.
        check: what values the key takes.

    Raises:
        ValueError: naming the key, the value, and what to use.
    """
    try:
        return check(value.item() if isinstance(value, np.generic) else value)
    except ValueError as error:
        quoted = isinstance(value, str) and value.strip().lstrip("-").isdigit()
        raise ValueError(f"{name}={value!r}; {'drop the quotes and ' if quoted else ''}{error}") from None


def integer(lowest: Number = -math.inf) -> Check:
    """Integers that are large enough."""

    def check(value: Any) -> int:
        if type(value) is not int or value < lowest:
            raise ValueError(f"use an integer{_or_more(lowest)}")
        return value

    return check


def number(lowest: Number = -math.inf) -> Check:
    """Finite numbers that are large enough, also as text: YAML reads 1e-4, for want of a point, as text."""

    def check(value: Any) -> float:
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not lowest <= found < math.inf or math.isinf(found):
            raise ValueError(f"use a number{_or_more(lowest)}")
        return found

    return check


def one_of(*allowed: Any) -> Check:
    """Some values only, or enum members that have them."""

    def check(value: Any) -> Any:
        value = value.value if isinstance(value, Enum) else value
        # 1 == True and 4 == 4.0.
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"use {listed(allowed)}")
        return value

    return check


def optional(check: Check, absent: Any = None) -> Check:
    """What another check takes, or None, which stands for `absent`."""
    return lambda value: absent if value is None else check(value)


def boolean(value: Any) -> bool:
    """True or False."""
    return one_of(True, False)(value)


def text(value: Any) -> str:
    """Any string."""
    if not isinstance(value, str):
        raise ValueError("use a string")
    return value


def mapping(value: Any) -> dict[Any, Any]:
    """Any mapping, copied; None for an empty one, as an empty section of YAML is read."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("use a dict")
    return dict(value)


def permutation(value: Any) -> tuple[int, ...]:
    """Every axis once."""
    if not isinstance(value, list | tuple) or sorted(map(repr, value)) != sorted(map(repr, range(len(value)))):
        raise ValueError("use the axes of the weight in another order, such as (1, 0)")
    return tuple(value)


def listed(values: Iterable[Any]) -> str:
    """Values as a sentence lists them.

    Example:
        >>> listed([1, 2, "x"])
        "1, 2 or 'x'"
    """
    *first, last = map(repr, values)
    return f"{', '.join(first)} or {last}" if first else last


def warn_caller(message: str) -> None:
    """Warn of the line outside this package that led here."""
    level, frame, package = 1, sys._getframe(), __name__.partition(".")[0]
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _or_more(lowest: Number) -> str:
    return "" if lowest == -math.inf else f", {lowest} or more"


def _is_yaml(given: str) -> bool:
    return not given.strip() or any(mark in given for mark in ("\n", "{", ": "))


def _plain(value: Any) -> Any:
    if isinstance(value, Configuration):
        return value.as_dict()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value
