"""`DKMPalettizer`: tables that are trained with the weights, in any torch training loop."""

from __future__ import annotations

import warnings

import torch

from palettax._keys import warn_caller
from palettax.report import Report, report
from palettax.torch.activations import fix_output_ranges, quantize_output
from palettax.torch.attach import attach, detach, palettes_of
from palettax.torch.configs import DKMPalettizerConfig, checked_config
from palettax.torch.differentiable import Palettized
from palettax.torch.load import copied, evaluated, put_tables, tensors_by_name
from palettax.torch.parameters import Parameter, check_values, checked_model, parameters_of
from palettax.torch.recipe import trained_recipe_of
from palettax.torch.recurrent import follow_parametrizations, forget_parametrizations
from palettax.torch.tensors import to_numpy


class DKMPalettizer:
    """Train a torch model so that few values are enough for its weights: `palettax.dkm` behind coremltools' interface.

    `prepare`, then train as ever with a `step` after that of the optimizer, then `finalize`. Each palettized parameter
    gets a parametrization of `torch.nn.utils.parametrize`: in training the layer computes with soft values, in eval
    mode with those that `finalize` stores. Optimizers, state dicts, copies and wrappers see ordinary parameters.

    Args:
        model: any module, on any device.
        config: which parameters, and how; None for 4 bits in linear layers and 2 in others.

    Example:
        >>> config = DKMPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
        >>> palettizer = DKMPalettizer(torch.nn.Linear(64, 64), config)
        >>> model = palettizer.prepare()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> optimizer.step()
        >>> palettizer.step()
        >>> len(palettizer.finalize().weight.unique())
        4

    Reference:
        Cho et al., "DKM: differentiable k-means clustering layer for neural network compression", arXiv 2108.12659.
    """

    def __init__(self, model: torch.nn.Module, config: DKMPalettizerConfig | None = None) -> None:
        self._model = checked_model(model)
        self._config = checked_config(config, DKMPalettizerConfig)
        self._dense: dict[str, str] = {}
        self._prepared = False

    def prepare(self, inplace: bool = False) -> torch.nn.Module:
        """Attach the palettes.

        Args:
            inplace: whether to the model, or to a copy.

        Returns:
            The model to train, in training mode. Parameters are those that it had, under
            `parametrizations.<name>.original`.

        Raises:
            ValueError: it is prepared already; or naming the parameter, what cannot be palettized about it. One that a
                layer merges others into in eval mode (LoRA) is refused.
        """
        if palettes_of(self._model):
            raise ValueError("the model is prepared already; train it, or finalize it first")
        if not inplace:  # what torch cannot copy is refused by name
            with warnings.catch_warnings(action="ignore"):
                parameters_of(self._model, self._config, trained=True)
        model = self._model if inplace else copied(self._model)
        found, self._dense = parameters_of(model, self._config, trained=True)  # all of them before one changes
        check_values(parameter for parameter in found if parameter.config.milestone == 0)
        # Of a copy if it is to be left alone when that is an error.
        evaluated((copied(model) if inplace else model).train(), [parameter.name for parameter in found])
        for parameter in found:
            _attach(parameter)
        follow_parametrizations(model)
        for palette in palettes_of(model):
            if palette.module.milestone == 0:
                palette.enable()
        self._model, self._prepared = model.train(), True
        return self._model

    def step(self) -> None:
        """Count a step: a palette whose milestone it is starts now. Call it after the optimizer's step."""
        palettes = palettes_of(self._model)
        if not palettes:
            told = "" if self._prepared else "; call prepare, and train what it returns"
            warn_caller(f"the model has no palettes{told}")
        for palette in palettes:
            palette.step()

    def enable_fake_palett(self, flag: bool) -> None:
        """Let layers compute with palettes, or with the weights as they are, whatever their milestones.

        Tables that have been trained are gone on with.

        Args:
            flag: whether with palettes.
        """
        for palette in palettes_of(self._model):
            if flag:
                palette.enable()
            else:
                palette.module.enabled.fill_(0)

    def finalize(self, model: torch.nn.Module | None = None, inplace: bool = False) -> torch.nn.Module:
        """Put every weight on its table, and take the palettes off.

        Args:
            model: the trained model, if it is another than `prepare` gave, such as one that was loaded.
            inplace: whether to write into it, or into a copy.

        Returns:
            The model in eval mode, of plain modules, with the `_COREML_` buffers that `palettax.coreml.from_torch` and
            coremltools' own converter read. A weight whose palette was in no forward pass, or whose milestone has not
            come, stays as it is, with a warning.

        Raises:
            ValueError: naming the parameter: it holds NaN or infinities.
        """
        model = self._model if model is None else model
        model = model if inplace else copied(model)
        palettes = palettes_of(model)
        if not palettes:
            warn_caller("the model has no palettes; call prepare, and finalize what it returns")
        leaves = {palette.name: palette.palettized() for palette in palettes if palette.module.used}
        if unused := [palette.name for palette in palettes if palette.name not in leaves]:
            warn_caller(
                f"{', '.join(unused)}: no forward pass has used a palette (its milestone is to come, or "
                "enable_fake_palett(False) was called); dense"
            )
        detach(model)
        forget_parametrizations(model)
        fix_output_ranges(model)
        return put_tables(model, leaves).eval()

    def report(self) -> Report:
        """What the palettes of now would make of each parameter, and why others have none; print it to read it."""
        if not self._prepared and not palettes_of(self._model):
            raise ValueError("there is nothing to report yet; call prepare first")
        palettes = palettes_of(self._model)
        others = tensors_by_name(self._model)
        before = {name: to_numpy(name, palette.original) for palette in palettes for name in palette.names}
        before |= {name: to_numpy(name, others[name]) for name in self._dense if name in others}
        enabled = [palette for palette in palettes if palette.module.enabled]
        now = before | {name: leaf for p in enabled for leaf in [p.palettized()] for name in p.names}
        made = report(before, now, weight_threshold=0)
        waiting = {name for palette in palettes for name in palette.names if not palette.module.enabled}
        reasons = self._dense | dict.fromkeys(waiting, "its palette does not count yet")
        return Report({name: row._replace(skipped=reasons.get(name, row.skipped)) for name, row in made.items()})


def _attach(parameter: Parameter) -> None:
    """Give a parameter its palette, and its modules what they do to their output."""
    palette = Palettized(trained_recipe_of(parameter), parameter.tensor, parameter.config.milestone, parameter.name)
    for owner, attribute in parameter.owners:
        attach(palette, owner, attribute)
        if parameter.config.activation_dtype is not None:
            quantize_output(owner, parameter.config.activation_dtype)
