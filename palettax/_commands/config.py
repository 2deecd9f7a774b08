"""The file of `--config` for trees: `global` and `by_path`, each a palette, its keys checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from palettax._commands.recipe import Palette, Rules
from palettax._keys import Configuration, boolean, integer, mapping, one_of, optional
from palettax._names import nearest
from palettax.palettize import WEIGHT_THRESHOLD

_PARTS = ("global", "by_path")


@dataclass(frozen=True)
class PaletteConfig(Configuration):
    """The keys of a `Palette`, checked."""

    mode: Annotated[str, one_of("kmeans", "uniform", "unique")] = "kmeans"
    nbits: Annotated[int | None, optional(one_of(1, 2, 3, 4, 6, 8))] = None
    group_size: Annotated[int | None, optional(integer(1))] = None
    channel_axis: Annotated[int | None, optional(integer())] = None
    vector_size: Annotated[int, integer(1)] = 1
    channel_scale: Annotated[bool, boolean] = False
    weight_threshold: Annotated[int, integer(0)] = WEIGHT_THRESHOLD


@dataclass(frozen=True)
class TreeConfig(Configuration):
    """Palettes by path, and one for what no path matches; null leaves leaves dense.

    Attributes:
        everywhere: the part `global`.
        by_path: by a regex that is searched for in the path of a leaf; the first one found counts.

    Example:
        >>> TreeConfig.from_yaml("global: {nbit: 4}").rules()
        Traceback (most recent call last):
        ValueError: global: nbit: PaletteConfig has no such key; did you mean 'nbits'?
    """

    everywhere: Any = None
    by_path: Annotated[Any, mapping] = None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> TreeConfig:
        """Read a dict of the two parts.

        Raises:
            ValueError: it is no dict, or has another part.
        """
        if not isinstance(config_dict, Mapping):
            raise ValueError(f"a configuration is a dict of {' and '.join(_PARTS)}, not {config_dict!r}")
        for key in config_dict:
            if key not in _PARTS:
                raise ValueError(f"{key}: there is no such part; {nearest(str(key), _PARTS)}")
        return cls(config_dict.get("global"), config_dict.get("by_path"))

    def rules(self) -> Rules:
        """The palettes.

        Raises:
            ValueError: naming the part and the key: a key that there is not, a value that it cannot have, no regex.
        """
        return Rules(
            _palette("global", self.everywhere),
            {_regex(key): _palette(f"by_path[{key!r}]", value) for key, value in self.by_path.items()},
        )


def _palette(where: str, value: Any) -> Palette | None:
    if value is None:
        return None
    try:
        return Palette(**PaletteConfig.from_dict(value).as_dict())
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _regex(key: Any) -> str:
    try:
        re.compile(str(key))
    except re.error as error:
        raise ValueError(f"by_path: {key!r} is no regular expression: {error}; correct it") from None
    return str(key)
