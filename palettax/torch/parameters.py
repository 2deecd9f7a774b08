"""Which parameters of a model are palettized, and how."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from palettax._keys import warn_caller
from palettax._names import owner_and_attribute
from palettax.leaf import Granularity
from palettax.palettize import count_nonfinite
from palettax.torch.configs import Choice, PalettizerConfig
from palettax.torch.load import names_by_tensor
from palettax.torch.state_dict import PRUNED, metadata_prefix
from palettax.torch.tensors import to_numpy

_WITH_WEIGHT = (
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


class Parameter(NamedTuple):
    """A parameter that is to be palettized.

    Attributes:
        name: its dotted name, the first of them if it is tied.
        owners: every module that it is an attribute of, with the attribute's name.
        tensor: its values; of one that is being pruned, those before the mask.
        config: how.
        nbits: the width of an index.
        granularity: which weights share a table.
        pruned: whether its zeros stay zeros.
    """

    name: str
    owners: list[tuple[nn.Module, str]]
    tensor: torch.Tensor
    config: Any
    nbits: int
    granularity: Granularity
    pruned: bool


class Chosen(NamedTuple):
    """What becomes of the parameters of a model.

    Attributes:
        palettized: those that are to be, tied ones once.
        dense: why others are left alone, by their dotted names.
    """

    palettized: list[Parameter]
    dense: dict[str, str]


class _Place(NamedTuple):
    """Where a parameter is, and the module whose configuration is its own."""

    name: str
    module: nn.Module
    attribute: str
    asked: nn.Module
    asked_name: str


def checked_model(model: Any) -> nn.Module:
    """The model, or a `ValueError` that says what it is instead."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    return model


def check_values(parameters: Iterable[Parameter]) -> None:
    """Refuse parameters with NaN or infinities, before one of them changes."""
    for parameter in parameters:
        if bad := count_nonfinite(to_numpy(parameter.name, parameter.tensor)):
            raise ValueError(
                f"{parameter.name}: {bad} NaN or infinite values; mend them, or leave it alone, as None by its name"
            )


def parameters_of(model: nn.Module, config: PalettizerConfig[Any], *, trained: bool = False) -> Chosen:
    """The parameters that the configuration asks to palettize.

    One that cannot be cut into the groups or the vectors that are asked for is left alone, with a warning.

    Args:
        model: not changed.
        config: of the whole model.
        trained: whether they will be trained. Then one may be in the course of being pruned; and the weights of layer
            norms count as others do, which else have to be asked for by type or by name. Those of recurrent layers
            always have to be: the converter takes their gates apart, and no package holds them as tables.

    Raises:
        ValueError: a parameter of no float type, on the meta device, with a parametrization, or being pruned when it
            is not to be trained; a tied one whose names are configured, or pruned, differently.
    """
    config.warn_unmatched(model)
    names = names_by_tensor(model)
    found: dict[int, Parameter] = {}
    said: dict[int, tuple[str, Any]] = {}
    reasons: dict[str, str] = {}
    warned = False
    places = list(_places(model, config))
    _warn_of_types(model, config, {type(place.asked) for place in places})
    for place in places:
        tensor = _tensor(place)
        if tensor is None:
            continue
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{place.name}: it has no shape yet; run the model once, as lazy layers need")
        choice = config.choose(place.name, place.asked, tensor.numel(), module_name=place.asked_name)
        by_default = choice.config is not None and choice.config is config.global_config
        unless_asked = (nn.RNNBase,) if trained else (nn.RNNBase, nn.LayerNorm)
        if isinstance(place.module, nn.LayerNorm) and tensor.ndim == 1:  # a pattern for many does not mean it
            by_default |= not _is_asked_for(config, place)
        if choice.config is not None and by_default and isinstance(place.module, unless_asked):
            choice = Choice(None, f"of {type(place.module).__name__}, which is palettized by type or by name only")
        reasons[place.name] = choice.reason
        if choice.config is None and not choice.by_name:
            continue
        other, agreed = said.setdefault(id(tensor), (place.name, choice.config))
        if choice.config != agreed:
            raise ValueError(
                f"{place.name}: it is tied to {other}, which is configured differently; make them equal, by one name "
                f"in module_name_configs for both: {place.name + '|' + other!r}"
            )
        if choice.config is None:
            continue
        being_pruned = _check(place, tensor, trained, choice.config.cluster_dim)
        try:
            granularity = _granularity(place.name, tensor, choice.config)
        except ValueError as error:
            warn_caller(f"{place.name} {tuple(tensor.shape)} stays dense: {error}")
            reasons[place.name], warned = str(error), True
            continue
        owners = _owners(model, place, names.get(id(tensor), []))
        whole = torch.empty(0, device=tensor.device)
        masks = [o._buffers[f"{own}_mask"] if is_being_pruned(o, own) else whole for o, own in owners]
        if not all(itertools.starmap(torch.equal, itertools.pairwise(masks))):
            raise ValueError(
                f"{place.name}: it is tied, and not all its modules prune it alike; make the pruning permanent with "
                "torch.nn.utils.prune.remove and tie it again, or configure it as None"
            )
        found.setdefault(
            id(tensor),
            Parameter(
                place.name,
                owners,
                tensor,
                choice.config,
                choice.config.n_bits_for(place.asked),
                granularity,
                pruned=being_pruned or _was_pruned(place),
            ),
        )
    dense = {
        name: _reason(names[id(tensor)], reasons) for name, tensor in model.named_parameters(remove_duplicate=False)
    }
    if not found and not warned:
        why = "; ".join(dict.fromkeys(dense.values())) or "the model has no parameters"
        warn_caller(f"no parameter is palettized: {why}")
    return Chosen(list(found.values()), {name: reason for name, reason in dense.items() if reason})


def _warn_of_types(model: nn.Module, config: PalettizerConfig[Any], known: set[type]) -> None:
    """Warn of configurations by type of modules none of whose parameters is a weight of a layer of torch."""
    others = [module for module in model.modules() if type(module) not in known]
    for where in dict.fromkeys(config.where(module) for module in others):
        if where.startswith("module_type_configs"):
            warn_caller(f"{where}: none of its parameters is a weight of a layer; name them in module_name_configs")


def _reason(names: list[str], reasons: dict[str, str]) -> str:
    """Why a parameter of these names is dense; empty if it is not."""
    found = [reasons[name] for name in names if name in reasons]
    if not found:
        return "not the weight of a layer, and not named by itself"
    return found[0] if all(found) else ""


def _places(model: nn.Module, config: PalettizerConfig[Any]) -> Iterator[_Place]:
    """Every weight that can be palettized, and whatever else is named."""
    seen: set[tuple[int, str]] = set()
    for place in _weights(model, config):
        seen.add((id(place.module), place.attribute))
        yield place
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in module._parameters.items():
            name = f"{path}.{attribute}" if path else attribute
            if tensor is None or (id(module), attribute) in seen:
                continue
            if _is_named(config, name, module, tensor):
                yield _Place(name, module, attribute, module, path)


def _weights(model: nn.Module, config: PalettizerConfig[Any]) -> Iterator[_Place]:
    """The weights of the layers of torch."""
    of_attention: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            of_attention.add(id(module.out_proj))
            for attribute in _OF_ATTENTION:
                owner, own = owner_and_attribute(attribute)
                asked = _asked(config, prefix, module, owner)
                yield _Place(prefix + attribute, module.get_submodule(owner), own, *asked)
        elif isinstance(module, nn.RNNBase):
            for attribute in [name for name in module._flat_weights_names if name.startswith("weight")]:
                yield _Place(prefix + attribute, module, attribute, module, path)
        elif isinstance(module, _WITH_WEIGHT) and id(module) not in of_attention:
            yield _Place(prefix + "weight", module, "weight", module, path)


def _asked(config: PalettizerConfig[Any], prefix: str, attention: nn.Module, owner: str) -> tuple[nn.Module, str]:
    """The module whose configuration a weight of an attention layer has: its own if it is named, else the layer's."""
    named = any(re.fullmatch(pattern, prefix + owner) for pattern in config.module_name_configs)
    return attention, prefix + owner if owner and named else prefix.removesuffix(".")


def _is_asked_for(config: PalettizerConfig[Any], place: _Place) -> bool:
    """Whether the type of a module is configured, or its very name."""
    names = {name for pattern in config.module_name_configs for name in pattern.replace("\\", "").split("|")}
    by_type = config.where(place.asked).startswith("module_type_configs")
    return by_type or not names.isdisjoint((place.name, place.asked_name))


def _is_named(config: PalettizerConfig[Any], name: str, module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether more than a weight is meant by a name: a vector, or what a layer has beside its own, by its very own."""
    patterns = config.module_name_configs
    if tensor.ndim <= 1 or isinstance(module, (*_WITH_WEIGHT, nn.MultiheadAttention, nn.RNNBase)):
        return name in patterns
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _tensor(place: _Place) -> torch.Tensor | None:
    """The parameter, also where pruning or a parametrization has put it elsewhere."""
    own = place.module._parameters
    if own.get(place.attribute) is not None:
        return own[place.attribute]
    if f"{place.attribute}_orig" in own:
        return own[f"{place.attribute}_orig"]
    is_computed = any(name.startswith(f"{place.attribute}_") for name in own)
    if is_computed or parametrize.is_parametrized(place.module, place.attribute):
        value = getattr(place.module, place.attribute, None)
        return value if isinstance(value, torch.Tensor) else None
    return None


def _check(place: _Place, tensor: torch.Tensor, trained: bool, cluster_dim: int) -> bool:
    """Refuse what cannot be palettized; returns whether it is in the course of being pruned."""
    name, attribute = place.name, place.attribute
    if parametrize.is_parametrized(place.module, attribute):
        raise ValueError(f"{name}: it has a parametrization; torch.nn.utils.parametrize.remove_parametrizations first")
    if tensor.is_meta:
        raise ValueError(f"{name}: it is on the meta device and has no values; load its weights first")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: it is of {tensor.dtype}, and only floats are palettized; configure it as None")
    being_pruned = is_being_pruned(place.module, attribute)
    if not being_pruned and attribute not in place.module._parameters:
        others = [own for own in place.module._parameters if own.startswith(f"{attribute}_")]
        raise ValueError(
            f"{name}: it is computed from {' and '.join(others)} in each forward pass; make it a parameter again, as "
            "torch.nn.utils.remove_weight_norm or remove_spectral_norm does, or configure it as None"
        )
    if being_pruned and not trained:
        raise ValueError(f"{name}: it is being pruned; make that permanent with torch.nn.utils.prune.remove first")
    if trained and tensor.dtype == torch.float64:
        raise ValueError(f"{name}: it is of float64, in which palettes are not trained; use model.float()")
    if being_pruned and cluster_dim > 1:
        raise ValueError(
            f"{name}: it is being pruned, and the {cluster_dim} weights of a vector share an index, zeros and others; "
            "use cluster_dim=1"
        )
    return being_pruned


def is_being_pruned(module: nn.Module, attribute: str) -> bool:
    """Whether torch.nn.utils.prune computes an attribute of a module; others have masks of their own."""
    return f"{attribute}_mask" in module._buffers and f"{attribute}_orig" in module._parameters


def _was_pruned(place: _Place) -> bool:
    """Whether a pruner left word that the zeros are meant."""
    word = place.module._buffers.get(f"{metadata_prefix(place.attribute)}compression_type")
    return word is not None and PRUNED in word.reshape(-1).tolist()


def _granularity(name: str, tensor: torch.Tensor, config: Any) -> Granularity:
    """How the parameter is cut; a `ValueError` if it cannot be."""
    axis = config.channel_axis
    if config.cluster_dim > 1 and getattr(config, "cluster_permute", None) is not None:
        axis = config.cluster_permute[0] if len(config.cluster_permute) == tensor.ndim else axis
    granularity = Granularity(config.group_size, axis, config.cluster_dim)
    granularity.groups(tuple(tensor.shape), name)
    return granularity


def _owners(model: nn.Module, place: _Place, aliases: list[str]) -> list[tuple[nn.Module, str]]:
    """Every module that has the parameter."""
    owners = [(place.module, place.attribute)]
    for alias in aliases:
        path, attribute = owner_and_attribute(alias)
        owner = (model.get_submodule(path), attribute.removesuffix("_orig"))
        if all(owner[0] is not known or owner[1] != own for known, own in owners):
            owners.append(owner)
    return owners
