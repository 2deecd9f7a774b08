"""Which modules of a model are palettized, and how: by name, by type, or all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from palettax._keys import Configuration, integer, mapping, warn_caller
from palettax._names import nearest, owner_and_attribute
from palettax.torch.module_configs import (
    ModuleDKMPalettizerConfig,
    ModulePalettizerConfig,
    ModulePostTrainingPalettizerConfig,
    ModuleSKMPalettizerConfig,
)

M = TypeVar("M", bound=ModulePalettizerConfig)
P = TypeVar("P", bound="PalettizerConfig")


class Choice(NamedTuple):
    """What a configuration says of one parameter.

    Attributes:
        config: how it is palettized; None to leave it alone.
        reason: why it is left alone; empty if it is not.
        by_name: whether it is None for the name, or the type.
    """

    config: Any
    reason: str = ""
    by_name: bool = False


@dataclass
class PalettizerConfig(Configuration, Generic[M]):
    """What the configurations of all palettizers have in common.

    Each of them holds, for modules, a configuration or a dict of its keys; None, to leave them alone; or a list of
    those, of which the last whose `weight_threshold` a parameter exceeds is its own, in the order of thresholds. For a
    parameter, the first of these that there is counts: the first name that matches, the class of its module, the name
    of that class, `global_config`.

    Attributes:
        global_config: for the modules that neither a name nor a type matches. Without all three, it is the default
            configuration; with one of the others, None.
        module_type_configs: by class, such as `torch.nn.Linear`, or by its name, "Linear"; subclasses do not count.
        module_name_configs: by a regular expression that matches all of the dotted name of a module or a parameter.

    Raises:
        ValueError: what `ModulePalettizerConfig` refuses, a key that is no class or no regular expression, a value
            that is none of these. It says where.
    """

    global_config: Any = None
    module_type_configs: Annotated[Any, mapping] = field(default_factory=dict)
    module_name_configs: Annotated[Any, mapping] = field(default_factory=dict)

    _of_module: ClassVar[type[Any]] = ModulePalettizerConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        by_type, by_name = self.module_type_configs, self.module_name_configs
        self.module_type_configs, self.module_name_configs = {}, {}
        no_other = not by_type and not by_name
        self.set_global(self._of_module() if self.global_config is None and no_other else self.global_config)
        for object_type, value in by_type.items():
            self.set_module_type(object_type, value)
        for module_name, value in by_name.items():
            self.set_module_name(module_name, value)

    def set_global(self: P, global_config: Any) -> P:
        """Say what holds for modules that nothing else matches.

        Args:
            global_config: a configuration, a dict, a list of those, or None.

        Returns:
            The configuration itself.
        """
        self.global_config = self._checked("global_config", global_config)
        return self

    def set_module_type(self: P, object_type: Any, opt_config: Any) -> P:
        """Say what holds for modules of a class.

        Args:
            object_type: the class, or its name.
            opt_config: a configuration, a dict, a list of those, or None.

        Returns:
            The configuration itself.
        """
        if not isinstance(object_type, str) and not _is_module_class(object_type):
            raise ValueError(f"module_type_configs: {object_type!r}; use a module class or its name: torch.nn.Linear")
        where = f"module_type_configs[{_label(object_type)}]"
        self.module_type_configs[object_type] = self._checked(where, opt_config)
        return self

    def set_module_name(self: P, module_name: str | int, opt_config: Any) -> P:
        """Say what holds for modules, or parameters, of a name.

        Args:
            module_name: a regular expression that matches all of it. Of several names that match, the first one set
                counts.
            opt_config: a configuration, a dict, a list of those, or None.

        Returns:
            The configuration itself.
        """
        name = _pattern(module_name)
        self.module_name_configs[name] = self._checked(f"module_name_configs[{name!r}]", opt_config)
        return self

    def get_module_config(self, name: str, module: torch.nn.Module) -> M | list[M] | None:
        """What there is for a module, whatever its size.

        Args:
            name: its dotted name.
            module: the module.

        Returns:
            A configuration, a list of them in the order of thresholds, or None.
        """
        return self._found(module, name)[1]

    def for_parameter(
        self, name: str, module: torch.nn.Module, size: int, *, module_name: str | None = None
    ) -> M | None:
        """How a parameter is palettized.

        Args:
            name: its dotted name.
            module: the module that it belongs to.
            size: how many weights it has.
            module_name: that module's dotted name, where it is not what comes before the last dot of `name`.

        Returns:
            The configuration; None to leave it alone, for the reason that `choose` gives.

        Example:
            >>> config = DKMPalettizerConfig.from_dict({"module_type_configs": {"Linear": {"n_bits": 6}}})
            >>> config.for_parameter("dense.weight", torch.nn.Linear(64, 64), 4096).n_bits
            6
        """
        return self.choose(name, module, size, module_name=module_name).config

    def choose(self, name: str, module: torch.nn.Module, size: int, *, module_name: str | None = None) -> Choice:
        """How a parameter is palettized, or why it is not; the arguments are those of `for_parameter`.

        Returns:
            The configuration, or the reason.

        Example:
            >>> DKMPalettizerConfig().choose("dense.weight", torch.nn.Linear(4, 4), 16).reason
            'its 16 weights do not exceed weight_threshold=2048 of global_config'
        """
        owner = owner_and_attribute(name)[0] if module_name is None else module_name
        where, value = self._found(module, owner, name)
        configs = value if isinstance(value, list) else [] if value is None else [value]
        if not configs:
            return Choice(None, f"{where} is None", by_name=where != "global_config")
        exceeded = [config for config in configs if size > config.weight_threshold]
        if not exceeded:
            threshold = configs[0].weight_threshold
            reason = f"its {size} weights do not exceed weight_threshold={threshold} of {where}"
            return Choice(None, reason)
        return Choice(exceeded[-1])

    def warn_unmatched(self, model: torch.nn.Module) -> None:
        """Warn of every name that nothing in a model has, and of every name of a class that there is not.

        Args:
            model: the model.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        names = [*modules, *dict(model.named_parameters(remove_duplicate=False))]
        for pattern in self.module_name_configs:
            if not any(re.fullmatch(pattern, name) for name in names):
                near = nearest(pattern, map(re.escape, filter(None, names)))
                warn_caller(f"module_name_configs[{pattern!r}] matches no module and no parameter; {near}")
        classes = set(map(type, modules.values()))
        for name in self.module_type_configs:
            if isinstance(name, str) and not any(name in _spellings(known) for known in (*classes, _in_torch(name))):
                near = nearest(name, {known.__name__ for known in classes})
                warn_caller(f"module_type_configs[{name!r}] is no class of the model or of torch.nn; {near}")

    def where(self, module: torch.nn.Module) -> str:
        """Where something is said of a module that has no name; empty if that is None."""
        where, value = self._found(module)
        return "" if value is None else where

    def _found(self, module: torch.nn.Module, *names: str) -> tuple[str, Any]:
        """Where there is something for a module of these names, and what."""
        for pattern, value in self.module_name_configs.items():
            if any(re.fullmatch(pattern, name) for name in names):
                return f"module_name_configs[{pattern!r}]", value
        for known in (type(module), *_spellings(type(module))):
            if known in self.module_type_configs:
                return f"module_type_configs[{_label(known)}]", self.module_type_configs[known]
        return "global_config", self.global_config

    def _checked(self, where: str, value: Any) -> M | list[M] | None:
        if not isinstance(value, list | tuple):
            return None if value is None else self._one(where, value)
        if not value:
            raise ValueError(f"{where}={value!r}; use None to leave modules alone")
        configs = [self._one(f"{where}[{index}]", one) for index, one in enumerate(value)]
        return sorted(configs, key=attrgetter("weight_threshold"))

    def _one(self, where: str, value: Any) -> M:
        if isinstance(value, self._of_module):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r}; use a {self._of_module.__name__} or a dict of its keys")
        try:
            return self._of_module.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


@dataclass
class PostTrainingPalettizerConfig(PalettizerConfig[ModulePostTrainingPalettizerConfig]):
    """Which modules `PostTrainingPalettizer` palettizes, and how: see `PalettizerConfig`.

    Example:
        >>> config = PostTrainingPalettizerConfig.from_yaml("global_config: {n_bits: 6}")
        >>> config.set_module_name("conv1", None).as_dict()["global_config"]["n_bits"]
        6
    """

    _of_module: ClassVar[type[Any]] = ModulePostTrainingPalettizerConfig


@dataclass
class SKMPalettizerConfig(PalettizerConfig[ModuleSKMPalettizerConfig]):
    """Which modules `SKMPalettizer` palettizes, and how: see `PalettizerConfig`.

    Attributes:
        calibration_nsamples: examples that the sensitivities are the mean over.

    Example:
        >>> config = SKMPalettizerConfig.from_dict({"global_config": {"n_bits": 6}, "calibration_nsamples": 64})
        >>> config.global_config.n_bits, config.calibration_nsamples
        (6, 64)
    """

    calibration_nsamples: Annotated[int, integer(1)] = 128

    _of_module: ClassVar[type[Any]] = ModuleSKMPalettizerConfig


@dataclass
class DKMPalettizerConfig(PalettizerConfig[ModuleDKMPalettizerConfig]):
    """Which modules `DKMPalettizer` palettizes, and how: see `PalettizerConfig`.

    Example:
        >>> by_size = [{"n_bits": 4, "weight_threshold": 1000}, {"n_bits": 2, "weight_threshold": 300}]
        >>> config = DKMPalettizerConfig(module_type_configs={torch.nn.Conv2d: by_size})
        >>> config.for_parameter("conv.weight", torch.nn.Conv2d(8, 8, 3), 576).n_bits
        2
    """

    _of_module: ClassVar[type[Any]] = ModuleDKMPalettizerConfig


def checked_config(config: Any, kind: type[Any]) -> Any:
    """The configuration, that of all defaults for None, or a `ValueError` that says what it is instead."""
    if not isinstance(config, kind | None):
        wanted, found = kind.__name__, type(config)
        if found.__name__ == wanted:
            raise ValueError(f"config is the {wanted} of {found.__module__}; give that of palettax.torch")
        raise ValueError(f"config is a {found.__name__}, not a {wanted}; {wanted}.from_dict reads a dict")
    return kind() if config is None else config


def _pattern(name: Any) -> str:
    """The name of a module as a regular expression; YAML reads that of a numbered one, 0, as an integer."""
    name = str(name) if type(name) is int else name
    if not isinstance(name, str):
        raise ValueError(f"module_name_configs: {name!r} is no string; put quotes around it")
    try:
        re.compile(name)
    except re.error as error:
        raise ValueError(f"module_name_configs: {name!r} is no regular expression: {error}; correct it") from None
    return name


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.nn.Module)


def _label(module_type: type | str) -> str:
    return repr(module_type) if isinstance(module_type, str) else module_type.__name__


def _spellings(module_type: type) -> Iterable[str]:
    """What a class is called: by its name, and by where it is."""
    name = module_type.__name__
    spellings = [name, f"{module_type.__module__}.{module_type.__qualname__}"]
    return spellings + [f"nn.{name}", f"torch.nn.{name}"] * (getattr(torch.nn, name, None) is module_type)


def _in_torch(name: str) -> type:
    """The class of torch.nn with the last part of a name, or what all of them are."""
    found = getattr(torch.nn, name.rpartition(".")[2], None)
    return found if isinstance(found, type) else torch.nn.Module
