"""Palettizers that need no training: `PostTrainingPalettizer`, and `SKMPalettizer`, which asks the loss first."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palettax._files import replacing
from palettax._keys import warn_caller
from palettax._names import nearest
from palettax._progress import progress_bar
from palettax.leaf import PalettizedArray
from palettax.palettize import palettize
from palettax.report import Report, report
from palettax.torch.configs import PalettizerConfig, PostTrainingPalettizerConfig, SKMPalettizerConfig, checked_config
from palettax.torch.fisher import fisher_diagonal
from palettax.torch.load import copied, dense_tensors, names_by_tensor, put_tables
from palettax.torch.parameters import Parameter, check_values, checked_model, parameters_of
from palettax.torch.recipe import recipe_of
from palettax.torch.state_dict import own_tensors, to_params
from palettax.torch.tensors import to_numpy


class PostTrainingPalettizer:
    """Palettize a torch model by k-means, without data: `palettax.palettize` behind coremltools' interface.

    Args:
        model: any module.
        config: which parameters, and how; None for 4 bits, one table a tensor.

    Example:
        >>> config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
        >>> small = PostTrainingPalettizer(torch.nn.Linear(64, 64), config).compress()
        >>> len(small.weight.unique())
        4
    """

    def __init__(self, model: torch.nn.Module, config: PostTrainingPalettizerConfig | None = None) -> None:
        self._model = checked_model(model)
        self._config = checked_config(config, PostTrainingPalettizerConfig)
        self._report: Report | None = None

    def compress(self, num_kmeans_workers: int = 1, inplace: bool = False) -> torch.nn.Module:
        """Palettize the weights.

        Args:
            num_kmeans_workers: of no effect: the solver uses all cores.
            inplace: whether to write into the model, or into a copy.

        Returns:
            The model, its weights on their tables, with the `_COREML_` buffers that `palettax.coreml.from_torch` and
            coremltools' own converter read.

        Raises:
            ValueError: naming the parameter: NaN or infinities, no values (on the meta device), an integer type,
                vectors of weights that are pruned, or names of one tied parameter that are configured differently.
        """
        _warn_of_unused("num_kmeans_workers", num_kmeans_workers, 1, "the solver uses all cores")
        model, self._report = _compress(self._model, self._config, None, inplace=inplace)
        return model

    def report(self) -> Report:
        """What the last `compress` did to each parameter; print it to read it."""
        return _made(self._report, "compress")


class SKMPalettizer:
    """Palettize a torch model by k-means weighted with the diagonal of the Fisher information.

    Args:
        model: any module.
        config: which parameters, and how; None for 4 bits, one table a tensor, sensitivities of 128 examples.

    Example:
        >>> model, data = torch.nn.Linear(64, 8), [torch.randn(4, 64)]
        >>> config = SKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
        >>> small = SKMPalettizer(model, config).compress(data, lambda model, x: model(x).square().mean())
        >>> len(small.weight.unique())
        4

    Reference:
        Kim et al., "SqueezeLLM: dense-and-sparse quantization", arXiv 2306.07629.
    """

    def __init__(self, model: torch.nn.Module, config: SKMPalettizerConfig | None = None) -> None:
        self._model = checked_model(model)
        self._config = checked_config(config, SKMPalettizerConfig)
        self._report: Report | None = None

    def compute_sensitivity(
        self,
        dataloader: Iterable[Any],
        loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor],
        sensitivity_path: str | os.PathLike[str] | None = None,
        num_sensitivity_workers: int = 1,
        fsdp_auto_wrap_policy: Any = None,
    ) -> dict[str, torch.Tensor]:
        """The mean of the squared gradients of single examples, by `palettax.torch.fisher_diagonal`.

        Args:
            dataloader: batches of any size; `calibration_nsamples` examples of them are used.
            loss_fn: `loss_fn(model, batch) -> loss`.
            sensitivity_path: a file to keep them in for `compress`.
            num_sensitivity_workers: of no effect.
            fsdp_auto_wrap_policy: of no effect.

        Returns:
            A float32 tensor for each parameter, in its shape: comparable between parameters, as nothing is normalized.

        Raises:
            ValueError: as in `palettax.torch.fisher_diagonal`.
        """
        _warn_of_unused("num_sensitivity_workers", num_sensitivity_workers, 1, "examples are taken in one process")
        _warn_of_unused("fsdp_auto_wrap_policy", fsdp_auto_wrap_policy, None, "the model is taken as it is")
        fisher = fisher_diagonal(self._model, dataloader, loss_fn, num_samples=self._config.calibration_nsamples)
        own = dict(self._model.named_parameters(remove_duplicate=False))
        sensitivity = {name: torch.from_numpy(np.array(fisher[name])) for name in own}
        if sensitivity_path is not None:
            with replacing(Path(sensitivity_path)) as path:
                torch.save(sensitivity, path)
        return sensitivity

    def compress(
        self,
        dataloader: Iterable[Any] | None = None,
        loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor] | None = None,
        sensitivity_path: str | os.PathLike[str] | None = None,
        num_kmeans_workers: int = 1,
        num_sensitivity_workers: int = 1,
        inplace: bool = False,
        fsdp_auto_wrap_policy: Any = None,
    ) -> torch.nn.Module:
        """Palettize the weights where the loss cares for them.

        Args:
            dataloader: as in `compute_sensitivity`; with `loss_fn`, unless sensitivities are in a file.
            loss_fn: as in `compute_sensitivity`.
            sensitivity_path: a file of sensitivities, from `compute_sensitivity` here or of coremltools. If it exists
                it is read, and data and loss are not used; else it is written.
            num_kmeans_workers: of no effect: the solver uses all cores.
            num_sensitivity_workers: of no effect.
            inplace: whether to write into the model, or into a copy.
            fsdp_auto_wrap_policy: of no effect.

        Returns:
            The model, as `PostTrainingPalettizer.compress` gives it. A parameter that the loss does not depend on, or
            that is frozen, is clustered as if all its weights mattered alike; `report` says so.

        Raises:
            ValueError: neither data and a loss, nor a file; a file with other names or shapes; else as in
                `PostTrainingPalettizer.compress`.
        """
        _warn_of_unused("num_kmeans_workers", num_kmeans_workers, 1, "the solver uses all cores")
        with warnings.catch_warnings(action="ignore"):  # what is wrong with it, before the work; it warns at the end
            check_values(parameters_of(self._model, self._config).palettized)
        told = dataloader is not None or loss_fn is not None
        if sensitivity_path is not None and (Path(sensitivity_path).exists() or not told):
            if told:
                warn_caller(f"{sensitivity_path} exists: it is read, and data and loss are not used")
            tensors = torch.load(sensitivity_path, weights_only=True, map_location="cpu")
        elif dataloader is not None and loss_fn is not None:
            tensors = self.compute_sensitivity(
                dataloader, loss_fn, sensitivity_path, num_sensitivity_workers, fsdp_auto_wrap_policy
            )
        else:
            raise ValueError("compress needs a dataloader and a loss_fn, or the sensitivity_path of a file")
        sensitivity = {name: to_numpy(name, tensor) for name, tensor in tensors.items()}
        model, self._report = _compress(self._model, self._config, sensitivity, inplace=inplace)
        return model

    def report(self) -> Report:
        """What the last `compress` did to each parameter, and what it costs the loss; print it to read it."""
        return _made(self._report, "compress")


def _warn_of_unused(name: str, value: Any, default: Any, instead: str) -> None:
    if value != default:
        warn_caller(f"{name}={value!r} has no effect: {instead}")


def _made(made: Report | None, by: str) -> Report:
    if made is None:
        raise ValueError(f"there is nothing to report yet; call {by} first")
    return made


def _compress(
    model: torch.nn.Module, config: PalettizerConfig, sensitivity: Mapping[str, np.ndarray] | None, *, inplace: bool
) -> tuple[torch.nn.Module, Report]:
    """Palettize, write into the model or a copy, and report."""
    found, dense = parameters_of(model, config)
    check_values(found)
    leaves: dict[str, PalettizedArray] = {}
    with progress_bar("palettizing", "parameters") as advance:
        for done, parameter in enumerate(found):
            advance(done, len(found))
            leaves[parameter.name] = _palettized(parameter, sensitivity)
        advance(len(found), len(found))
    # What an earlier palettization left behind may be of other weights by now.
    before = to_params(own_tensors(dense_tensors(model)))
    # Of parameters alone: buffers have no sensitivities.
    masses = None if sensitivity is None else {name: sensitivity.get(name) for name in before}
    names = names_by_tensor(model)
    now = before | {name: leaves[p.name] for p in found for name in (p.name, *names.get(id(p.tensor), []))}
    summary = report(before, now, sensitivity=masses, weight_threshold=0)
    for name, row in summary.items():
        if row.skipped:
            summary[name] = row._replace(skipped=dense.get(name, "no parameter"))
    return put_tables(model if inplace else copied(model), leaves), summary


def _palettized(parameter: Parameter, sensitivity: Mapping[str, np.ndarray] | None) -> PalettizedArray:
    name, mass = parameter.name, None
    if sensitivity is not None:
        if name not in sensitivity:
            raise ValueError(f"{name}: there are no sensitivities of it; {nearest(name, sensitivity)}")
        mass = {name: sensitivity[name]}
    weights = {name: to_numpy(name, parameter.tensor)}
    return palettize(weights, recipe_of(parameter).post_training(), sensitivity=mass, weight_threshold=0)[name]
