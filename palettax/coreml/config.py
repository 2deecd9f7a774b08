"""Which weights of a program are palettized, and how: by name, by the type of op that reads them, or all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, NamedTuple

from palettax._keys import Configuration, boolean, integer, listed, mapping, one_of, optional
from palettax.coreml.package import Op, op_name
from palettax.palettize import WEIGHT_THRESHOLD

_MODES = ("kmeans", "uniform", "unique", "custom")
_GRANULARITIES = ("per_tensor", "per_grouped_channel")
_TYPE_KEY = "config_type"


def _word(*allowed: str) -> Callable[[Any], str]:
    """One of some words in any case, or an enum member that is called so."""

    def check(value: Any) -> str:
        word = value.name if isinstance(value, Enum) else value
        return one_of(*allowed)(word.lower() if isinstance(word, str) else word)

    return check


def _function(value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise ValueError("use a function of a weight that gives its table and its indices")
    return value


@dataclass(frozen=True)
class OpPalettizerConfig(Configuration):
    """How a weight is palettized.

    Attributes:
        mode: "kmeans", the table of least squared error; "uniform", equal steps from the smallest weight to the
            largest; "unique", the very values, where there are few enough; "custom", what `lut_function` gives.
        nbits: of an index: 1, 2, 3, 4, 6 or 8. For "kmeans" and "uniform" only; the other modes find it themselves.
        lut_function: for "custom": of a group's weights, `(table, indices)`, with 1 to 256 entries. A group along
            another axis than the first comes with these two axes exchanged. With `cluster_dim` d the table is (k, d),
            and there is an index for each d neighbours along the first axis.
        granularity: "per_tensor", or "per_grouped_channel": a table for every `group_size` channels.
        group_size: channels of a group; 0 for all of them.
        channel_axis: the axis that groups are cut along; None for that of the outputs of the op.
        cluster_dim: how many neighbours along the output axis share an index.
        enable_per_channel_scale: whether each output channel is divided by its largest magnitude first.
        num_kmeans_workers: accepted and not needed: all cores cluster anyway.
        weight_threshold: weights of at most this many elements stay dense.

    Raises:
        ValueError: naming the key, the value and what to use.

    Example:
        >>> OpPalettizerConfig(mode="unique", nbits=4)
        Traceback (most recent call last):
        ValueError: nbits=4; mode='unique' finds it itself: leave nbits out
    """

    mode: Annotated[str, _word(*_MODES)] = "kmeans"
    nbits: Annotated[int | None, optional(one_of(1, 2, 3, 4, 6, 8))] = None
    lut_function: Annotated[Callable[..., Any] | None, optional(_function)] = None
    granularity: Annotated[Any, _word(*_GRANULARITIES)] = "per_tensor"
    group_size: Annotated[int, integer(0)] = 32
    channel_axis: Annotated[int | None, optional(integer())] = None
    cluster_dim: Annotated[int, integer(1)] = 1
    enable_per_channel_scale: Annotated[bool, boolean] = False
    num_kmeans_workers: Annotated[int, integer(1)] = 1
    weight_threshold: Annotated[int, integer(0)] = WEIGHT_THRESHOLD

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_nbits = self.mode in ("kmeans", "uniform")
        if needs_nbits and self.nbits is None:
            raise ValueError(f"nbits=None; mode={self.mode!r} needs it: use 1, 2, 3, 4, 6 or 8")
        if not needs_nbits and self.nbits is not None:
            raise ValueError(f"nbits={self.nbits}; mode={self.mode!r} finds it itself: leave nbits out")
        if (self.mode == "custom") != (self.lut_function is not None):
            raise ValueError(f"lut_function={self.lut_function!r} with mode={self.mode!r}; mode='custom' takes one")
        if self.cluster_dim > 1 and self.mode == "uniform":
            raise ValueError(f"cluster_dim={self.cluster_dim}; mode='uniform' makes no tables of vectors")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> OpPalettizerConfig:
        """Read a dict of the keys, without `lut_function`.

        Args:
            config_dict: values by key; a key that is absent has its default.

        Raises:
            ValueError: a key that there is not, a function, or a value that a key cannot have.
        """
        if isinstance(config_dict, Mapping) and "lut_function" in config_dict:
            raise ValueError("lut_function: it cannot be read from a dict; set it in Python: OpPalettizerConfig(...)")
        return super().from_dict(config_dict)


class Choice(NamedTuple):
    """What a configuration says of one weight.

    Attributes:
        config: how it is palettized; None to leave it alone.
        where: which part of the configuration says so.
    """

    config: OpPalettizerConfig | None
    where: str


@dataclass
class OptimizationConfig(Configuration):
    """How the weights of a program are palettized.

    Each part holds a configuration, a dict of its keys, or None: leave the weight alone. For a weight, the first of
    these counts: its own name, the name of the op that reads it, the type of that op, `global_config`. The ops that
    read one weight must agree.

    Attributes:
        global_config: for what neither a name nor a type says.
        op_type_configs: by the type of op that reads the weight, such as "conv" or "linear".
        op_name_configs: by the name of the weight, as a report or `read_palettes` has it, or of the op that reads it.

    Raises:
        ValueError: what `OpPalettizerConfig` refuses. It says where.

    Example:
        >>> config = OptimizationConfig(OpPalettizerConfig(nbits=4)).set_op_type("conv", None)
        >>> config.global_config.nbits, config.op_type_configs
        (4, {'conv': None})
    """

    global_config: Any = None
    op_type_configs: Annotated[Any, mapping] = field(default_factory=dict)
    op_name_configs: Annotated[Any, mapping] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        by_type, by_name = self.op_type_configs, self.op_name_configs
        self.op_type_configs, self.op_name_configs = {}, {}
        self.set_global(self.global_config)
        for op_type, value in by_type.items():
            self.set_op_type(op_type, value)
        for name, value in by_name.items():
            self.set_op_name(name, value)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> OptimizationConfig:
        """Read a dict.

        Args:
            config_dict: the parts by name, their configurations as dicts. "config_type", here and in each of them, may
                say "OpPalettizerConfig".

        Raises:
            ValueError: a key that there is not, another type, or a value that a key cannot have.
        """
        if isinstance(config_dict, Mapping):
            config_dict = _without_type(config_dict)
        return super().from_dict(config_dict)

    @classmethod
    def of(cls, config: Any) -> OptimizationConfig:
        """A configuration as it is, or one of coremltools in the terms of this one.

        Raises:
            ValueError: it is neither, or asks for something else than palettization.
        """
        if isinstance(config, cls):
            return config
        parts = [getattr(config, part.name, ...) for part in dataclasses.fields(cls)]
        if ... in parts:
            raise ValueError(f"config is a {type(config).__name__}; give an OptimizationConfig")
        return cls(*parts)

    def set_global(self, op_config: Any) -> OptimizationConfig:
        """Say what holds where neither a name nor a type does; returns the configuration itself."""
        self.global_config = _read("global_config", op_config)
        return self

    def set_op_type(self, op_type: str, op_config: Any) -> OptimizationConfig:
        """Say what holds for the weights that ops of a type read; returns the configuration itself."""
        if op_type == "const":
            raise ValueError(
                "op_type_configs['const']: every weight is one; use set_global, or set_op_name with its name"
            )
        self.op_type_configs[op_type] = _read(f"op_type_configs[{op_type!r}]", op_config)
        return self

    def set_op_name(self, op_name: str, op_config: Any) -> OptimizationConfig:
        """Say what holds for a weight, or for those that an op reads; returns the configuration itself."""
        self.op_name_configs[op_name] = _read(f"op_name_configs[{op_name!r}]", op_config)
        return self

    def choose(self, weight: Op) -> Choice:
        """What holds for a weight.

        Args:
            weight: the op, of a constant or of what decompresses one.

        Returns:
            The configuration and where it is from.

        Raises:
            ValueError: the ops that read it do not agree.
        """
        for name in names_of(weight):
            if name in self.op_name_configs:
                return self._named(name)
        readers = weight.outputs[-1].child_ops
        if not readers:
            return Choice(None, "no op reads it: it is an output")
        choices = [self._of_reader(reader) for reader in readers]
        for reader, choice in zip(readers, choices, strict=True):
            if choice.config != choices[0].config:
                raise ValueError(
                    f"{weight.name}: two ops read it and their configurations conflict: {readers[0].name} has "
                    f"{_shown(choices[0])}, {reader.name} has {_shown(choice)}. Make them equal, or say what holds for "
                    f"the weight itself: set_op_name({weight.name!r}, ...)"
                )
        return choices[0]

    def _of_reader(self, op: Op) -> Choice:
        """What holds for the weights that an op reads."""
        if op.name in self.op_name_configs:
            return self._named(op.name)
        if op.op_type in self.op_type_configs:
            return Choice(self.op_type_configs[op.op_type], f"op_type_configs[{op.op_type!r}]")
        return Choice(self.global_config, "global_config")

    def _named(self, name: str) -> Choice:
        return Choice(self.op_name_configs[name], f"op_name_configs[{name!r}]")


def names_of(weight: Op) -> list[str]:
    """What a weight is called: its op, without the suffixes of converters too, and the constants it is made from."""
    parts = [var.op for var in weight.inputs.values() if getattr(var, "op", None) is not None]
    names = [name for part in parts if part.op_type.startswith("const") for name in names_of(part)]
    return list(dict.fromkeys([weight.name, op_name(weight.name), *names]))


def _shown(choice: Choice) -> str:
    return f"{choice.where} = {choice.config}"


def _without_type(config: Mapping[str, Any]) -> dict[str, Any]:
    """A dict without the key for its type, which can be but one."""
    found = config.get(_TYPE_KEY, OpPalettizerConfig.__name__)
    if found != OpPalettizerConfig.__name__:
        raise ValueError(f"{_TYPE_KEY}={found!r}; use {listed([OpPalettizerConfig.__name__])}")
    return {key: value for key, value in config.items() if key != _TYPE_KEY}


def _read(where: str, value: Any) -> OpPalettizerConfig | None:
    """A configuration, from a dict or from coremltools' class of the same keys."""
    if value is None or isinstance(value, OpPalettizerConfig):
        return value
    try:
        if isinstance(value, Mapping):
            return OpPalettizerConfig.from_dict(_without_type(value))
        if type(value).__name__ != OpPalettizerConfig.__name__:
            raise ValueError(f"{value!r} is no OpPalettizerConfig, no dict of its keys, and not None")
        return OpPalettizerConfig(
            **{part.name: getattr(value, part.name) for part in dataclasses.fields(OpPalettizerConfig)}
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
