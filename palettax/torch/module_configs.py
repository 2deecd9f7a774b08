"""How one module is palettized: the keys that users of coremltools know, checked where they are written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from enum import Enum
from typing import Annotated, Any

import torch

from palettax._keys import (
    Check,
    Configuration,
    Number,
    boolean,
    checked,
    integer,
    listed,
    number,
    one_of,
    optional,
    permutation,
    text,
    warn_caller,
)
from palettax._typing import NBITS

_SPELLINGS = {
    **dict.fromkeys(("int8", "i8", "qint8"), "int8"),
    **dict.fromkeys(("uint8", "u8", "quint8"), "uint8"),
    **dict.fromkeys(("float16", "f16"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16", "b16"), "bfloat16"),
    **dict.fromkeys(("float32", "f32"), None),
}
_SHORT = {"int8": "i8", "uint8": "u8", "float16": "f16", "bfloat16": "bf16", None: "f32"}
_LEVELS: dict[str | None, tuple[int, int, int]] = {"int8": (-128, 0, 127), "uint8": (0, 128, 255)}
"""Of integer tables: the lowest level, that of zero, and the highest."""

_QUANTIZED = {"int8": torch.qint8, "uint8": torch.quint8, None: torch.float32}

_EXACT = "weights are clustered exactly, without rounding them"
_FIRST_TABLE = "the first table is that of palettax.kmeans"
_LARGEST = "the scale of a channel is its largest magnitude, whatever the scheme"
_MEMORY = "the memory of training is in proportion to the weights, whatever the number of entries"


def _dtype(names: Collection[str | None]) -> Check:
    """The name of a dtype from any of its spellings, None for float32."""
    known = {spelling: name for spelling, name in _SPELLINGS.items() if name in names}

    def check(value: Any) -> str | None:
        if _spelling(value) not in known:
            raise ValueError(f"use {listed(known)}")
        return known[_spelling(value)]

    return check


def _spelling(value: Any) -> str:
    if isinstance(value, str | torch.dtype):
        return str(value).lower().removeprefix("torch.")
    return "f32" if value is None else repr(value)


def _integer_dtype(value: Any) -> torch.dtype | None:
    name = _dtype(("int8", "uint8", None))(value)
    return name if name is None else getattr(torch, name)


def _table_dtype(value: Any) -> str:
    return _SHORT[_dtype(_SHORT)(value)]


def _activation_dtype(value: Any) -> torch.dtype:
    return _QUANTIZED[_dtype(_QUANTIZED)(value)]


@dataclass(frozen=True)
class ModulePalettizerConfig(Configuration):
    """The keys that all three have.

    Attributes:
        n_bits: the width of an index: 1, 2, 3, 4, 6 or 8.
        lut_dtype: what tables are stored in: torch.int8 or torch.uint8; None for the dtype of the weight.
        granularity: "per_tensor", or "per_grouped_channel" for a table for every `group_size` channels.
        group_size: channels that share a table; of groups only.
        channel_axis: along which channels are grouped and `cluster_dim` weights are neighbours: 0, outputs, or 1.
        cluster_dim: weights per index; None for 1.
        enable_per_channel_scale: whether every channel on axis 0 has a scale; only of transposed convolutions it is an
            input.
        weight_threshold: weights of at most this many elements are left alone.

    Raises:
        ValueError: a value that is not among these, groups without a size or a size without groups, a group size
            that `cluster_dim` does not divide. It names the key, the value and what to use.
    """

    n_bits: Annotated[int, one_of(*NBITS)] = 4
    _: KW_ONLY
    lut_dtype: Annotated[torch.dtype | str | None, _integer_dtype] = None
    granularity: Annotated[str | Enum, one_of("per_tensor", "per_grouped_channel")] = "per_tensor"
    group_size: Annotated[int | None, optional(integer(1))] = None
    channel_axis: Annotated[int, one_of(0, 1)] = 0
    cluster_dim: Annotated[int | None, optional(integer(1), 1)] = 1
    enable_per_channel_scale: Annotated[bool, boolean] = False
    weight_threshold: Annotated[int, integer(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        size, grouped = self.group_size, self.granularity == "per_grouped_channel"
        if grouped and size is None:
            raise ValueError("group_size=None; granularity='per_grouped_channel' needs one, such as group_size=16")
        if size is not None and not grouped:
            raise ValueError(f"group_size={size}; it needs granularity='per_grouped_channel', or drop it")
        if size is not None and size % (self.cluster_dim or 1):
            raise ValueError(f"cluster_dim={self.cluster_dim}; use a divisor of group_size={size}")

    @property
    def lut_dtype_name(self) -> str | None:
        """The dtype of tables by NumPy's name; None for that of the weight."""
        return _SPELLINGS[_spelling(self.lut_dtype)]

    def n_bits_for(self, module: torch.nn.Module) -> int:
        """The width of an index in a module.

        Args:
            module: the module.

        Returns:
            `n_bits`, or the default where that depends on the module.
        """
        return self.n_bits


@dataclass(frozen=True)
class ModulePostTrainingPalettizerConfig(ModulePalettizerConfig):
    """How a module is palettized after training.

    Attributes:
        enable_fast_kmeans_mode: accepted, without effect.
        rounding_precision: accepted, without effect.

    The other keys are those of `ModulePalettizerConfig`; here, `weight_threshold=0` leaves nothing alone.

    Example:
        >>> ModulePostTrainingPalettizerConfig(n_bits=2, lut_dtype="int8").lut_dtype
        torch.int8
    """

    _: KW_ONLY
    enable_fast_kmeans_mode: Annotated[bool, boolean, _EXACT] = True
    rounding_precision: Annotated[int, integer(), _EXACT] = 4


@dataclass(frozen=True)
class ModuleSKMPalettizerConfig(ModulePalettizerConfig):
    """How a module is palettized with sensitivities: the keys of `ModulePalettizerConfig`.

    Example:
        >>> ModuleSKMPalettizerConfig(granularity="per_grouped_channel", group_size=16).n_bits
        4
    """


@dataclass(frozen=True)
class ModuleDKMPalettizerConfig(ModulePalettizerConfig):
    """How a module is palettized while it is trained.

    Attributes:
        n_bits: as in `ModulePalettizerConfig`; None for 4 in `torch.nn.Linear` and 2 elsewhere.
        lut_dtype: what tables are rounded to: "i8", "u8", "f16", "bf16", or "f32" for not at all.
        milestone: the step from which on there are tables.
        quant_min: the lowest level of integer tables.
        quant_max: the highest. -128 to 127 are all levels, also of "u8".
        dtype: of activations that are quantized: torch.qint8, torch.quint8 or torch.float32.
        quantize_activations: whether they are.
        cluster_permute: the order of axes in which weights are cut into vectors; None for their own.
        kmeans_max_iter: steps of soft k-means in a forward pass, at most.
        enforce_zero: whether every table has an entry that is zero.
        palett_mode: "dkm", soft in training, or "hard"; "gsm" is taken as "dkm", with a warning.
        palett_tau: the temperature in squared weights, 0 being hard; None for one that suits weights of any size, where
            coremltools has 1e-4, which leaves small weights a single value.
        per_channel_scaling_factor_scheme: accepted, without effect: the scale of a channel is its largest magnitude.
        partition_size: refused; it is called `group_size`.
        cluster_dtype: the older name of `lut_dtype`.

    The rest is in `ModulePalettizerConfig`, or is accepted with a warning that says what there is in its place.

    Raises:
        ValueError: as `ModulePalettizerConfig`; levels that the dtype of the tables does not have; `cluster_dtype` and
            `lut_dtype` that differ.

    Example:
        >>> config = ModuleDKMPalettizerConfig(milestone=2)
        >>> config.n_bits_for(torch.nn.Linear(4, 4)), config.n_bits_for(torch.nn.Conv1d(4, 4, 3))
        (4, 2)
    """

    n_bits: Annotated[int | None, optional(one_of(*NBITS))] = None
    _: KW_ONLY
    lut_dtype: Annotated[torch.dtype | str | None, _table_dtype] = None
    weight_threshold: Annotated[int, integer(0)] = 2048
    milestone: Annotated[int, integer(0)] = 0
    quant_min: Annotated[int, integer()] = -128
    quant_max: Annotated[int, integer()] = 127
    dtype: Annotated[Any, _activation_dtype] = torch.qint8
    quantize_activations: Annotated[bool, boolean] = False
    cluster_permute: Annotated[Sequence[int] | None, optional(permutation)] = None
    kmeans_max_iter: Annotated[int, integer(1)] = 3
    enforce_zero: Annotated[bool, boolean] = False
    palett_mode: Annotated[str, one_of("dkm", "hard", "gsm")] = "dkm"
    palett_tau: Annotated[Number | None, optional(number(0))] = None
    per_channel_scaling_factor_scheme: Annotated[str, one_of("min_max", "abs"), _LARGEST] = "min_max"

    kmeans_init: Annotated[str, text, _FIRST_TABLE] = "auto"
    kmeans_n_init: Annotated[int, integer(), _FIRST_TABLE] = 10
    kmeans_opt1d_threshold: Annotated[int, integer(), _FIRST_TABLE] = 1024
    kmeans_batch_threshold: Annotated[int, integer(), _FIRST_TABLE] = 4
    kmeans_error_bnd: Annotated[Number, number(), _FIRST_TABLE] = 0.0
    palett_max_mem: Annotated[Number, number(), _MEMORY] = 1.0
    palett_min_tsize: Annotated[int, integer(), _MEMORY] = 64 * 1024
    palett_unique: Annotated[bool, boolean, _MEMORY] = False
    palett_shard: Annotated[bool, boolean, _MEMORY] = False
    palett_batch_mode: Annotated[bool, boolean, _MEMORY] = False
    palett_dist: Annotated[bool, boolean, _MEMORY] = False
    palett_lambda: Annotated[Number, number(), "coremltools does not read it either"] = 0.0
    palett_epsilon: Annotated[Number, number(), "steps end when the entries stand still"] = 1e-4
    palett_cluster_tol: Annotated[Number, number(), "an entry that repeats another is moved"] = 0.0
    add_extra_centroid: Annotated[bool, boolean, "Core ML holds 2^n_bits entries"] = False
    zero_threshold: Annotated[Number, number(), "the attention is not clamped"] = 1e-7
    prune_threshold: Annotated[Number, number(), "pruned weights stay zero"] = 1e-7
    percentage_palett_enable: Annotated[Number, number(), "the tables of all groups are trained"] = 1.0
    partition_size: InitVar[Any] = None
    cluster_dtype: InitVar[Any] = None

    def __post_init__(self, partition_size: Any, cluster_dtype: Any) -> None:
        if partition_size is not None:
            raise ValueError(
                f"partition_size={partition_size!r}; use group_size with granularity='per_grouped_channel'"
            )
        if cluster_dtype is not None:
            dtype = checked("cluster_dtype", cluster_dtype, _table_dtype)
            if self.lut_dtype is not None and checked("lut_dtype", self.lut_dtype, _table_dtype) != dtype:
                raise ValueError(
                    f"cluster_dtype={cluster_dtype!r} and lut_dtype={self.lut_dtype!r} are two names of one key; "
                    "use lut_dtype only"
                )
            object.__setattr__(self, "lut_dtype", dtype)
        super().__post_init__()
        if self.palett_mode == "gsm":
            warn_caller("palett_mode='gsm' is taken as 'dkm': soft, without the noise that it would add")
        if self.enforce_zero and (self.cluster_dim or 1) > 1:
            raise ValueError(
                f"enforce_zero=True with cluster_dim={self.cluster_dim}; a vector is not zero in part, use 1"
            )
        least, most = self.quant_min, self.quant_max
        if self.levels is not None:
            low, zero, high = _LEVELS[self.lut_dtype_name]
            if not low <= least <= zero <= most <= high:
                raise ValueError(
                    f"quant_min={least} and quant_max={most}; with lut_dtype={self.lut_dtype!r}, use "
                    f"{low} ≤ quant_min ≤ {zero} ≤ quant_max ≤ {high}"
                )
        if least >= most:
            raise ValueError(f"quant_min={least} and quant_max={most}; use a quant_min below quant_max")

    @property
    def levels(self) -> tuple[int, int] | None:
        """The lowest and the highest level of integer tables, about that of zero; None for all, and for floats."""
        if self.lut_dtype_name not in _LEVELS or (self.quant_min, self.quant_max) == (-128, 127):
            return None
        _, zero, _ = _LEVELS[self.lut_dtype_name]
        return self.quant_min - zero, self.quant_max - zero

    @property
    def activation_dtype(self) -> torch.dtype | None:
        """What activations are quantized to: torch.qint8 or torch.quint8; None where they are not."""
        return self.dtype if self.quantize_activations and self.dtype != torch.float32 else None

    def n_bits_for(self, module: torch.nn.Module) -> int:
        """The width of an index in a module.

        Args:
            module: the module.

        Returns:
            `n_bits`; where it is None, 4 for linear layers and 2 for all others.
        """
        if self.n_bits is not None:
            return self.n_bits
        return 4 if isinstance(module, torch.nn.Linear) else 2
