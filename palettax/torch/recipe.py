"""What a configuration asks for, as a transform of one weight."""

from __future__ import annotations

import dataclasses
import functools

import jax
import torch

from palettax.leaf import Granularity
from palettax.torch.parameters import Parameter
from palettax.transforms import (
    PaletteTransformation,
    dkm,
    keep_zeros,
    kmeans,
    quantize_lut,
    with_channel_scale,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one weight is palettized: plain values, so that equal recipes share what is compiled for them.

    Attributes:
        nbits: the width of an index.
        granularity: which weights share a table, and how many share an index.
        lut_dtype: int8 or uint8, in training float16 and bfloat16 too; None for the dtype of the weight.
        channel_scale: whether every output channel has a scale.
        pruned: whether zeros stay zeros, outside the table.
        seed: of the first tables of vectors.
    """

    nbits: int
    granularity: Granularity
    lut_dtype: str | None = None
    channel_scale: bool = False
    pruned: bool = False
    seed: int = 0

    def post_training(self) -> PaletteTransformation:
        """The transform for a weight that is no longer trained."""
        inner = self._scaled(kmeans(self.nbits, granularity=self.granularity, key=self._key))
        return self._sparse(inner if self.lut_dtype is None else quantize_lut(inner, self.lut_dtype))

    def _scaled(self, inner: PaletteTransformation) -> PaletteTransformation:
        return with_channel_scale(inner, channel_axis=0) if self.channel_scale else inner

    def _sparse(self, inner: PaletteTransformation) -> PaletteTransformation:
        return keep_zeros(inner, sparse=True) if self.pruned else inner

    @property
    def _key(self) -> jax.Array | None:
        return jax.random.key(self.seed) if self.granularity.vector_size > 1 else None


@dataclasses.dataclass(frozen=True)
class TrainedRecipe(Recipe):
    """How one weight is palettized while it is trained.

    Attributes:
        temperature: how soft, as in `dkm`.
        relative: whether it is relative to the spread of each group.
        max_steps: steps of soft k-means in a forward pass.
        levels: the lowest and the highest level of an int8 or uint8 table, about zero; None for all there are.
        zero_entry: whether each table has an entry that is zero.
    """

    temperature: float = 1.0
    relative: bool = True
    max_steps: int = 3
    levels: tuple[int, int] | None = None
    zero_entry: bool = False

    def training(self) -> PaletteTransformation:
        """The transform for a weight that is trained; one object for all equal recipes."""
        return _training(self)

    def with_pruning(self) -> TrainedRecipe:
        """The same, for a weight whose zeros stay zeros."""
        return dataclasses.replace(self, pruned=True)

    def _dkm(self) -> PaletteTransformation:
        inner = dkm(
            self.nbits,
            temperature=self.temperature,
            relative=self.relative,
            granularity=self.granularity,
            weight_threshold=0,
            lut_dtype=self.lut_dtype,
            max_steps=self.max_steps,
            levels=self.levels,
            zero_entry=self.zero_entry,
            key=self._key,
        )
        return self._sparse(self._scaled(inner))


@functools.cache
def _training(recipe: TrainedRecipe) -> PaletteTransformation:
    return recipe._dkm()


def recipe_of(parameter: Parameter) -> Recipe:
    """What the configuration of a parameter asks for; vectors draw from the seed that `torch.manual_seed` set."""
    config = parameter.config
    return Recipe(
        parameter.nbits,
        parameter.granularity,
        lut_dtype=config.lut_dtype_name,
        channel_scale=config.enable_per_channel_scale,
        pruned=parameter.pruned,
        # Of no use to scalars, for which it would have everything compiled again.
        seed=torch.initial_seed() % 2**32 if parameter.granularity.vector_size > 1 else 0,
    )


def trained_recipe_of(parameter: Parameter) -> TrainedRecipe:
    """What the configuration of a parameter asks for in training."""
    config = parameter.config
    recipe = TrainedRecipe(
        **vars(recipe_of(parameter)),
        max_steps=config.kmeans_max_iter,
        levels=config.levels,
        zero_entry=config.enforce_zero,
    )
    if config.palett_mode == "hard":
        return dataclasses.replace(recipe, temperature=0.0)
    if config.palett_tau is not None:
        return dataclasses.replace(recipe, temperature=config.palett_tau, relative=False)
    return recipe
