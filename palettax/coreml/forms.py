"""Which forms of a lookup table each deployment target holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import coremltools as ct
import numpy as np

from palettax._names import nearest
from palettax.leaf import PalettizedArray, as_numpy, has_levels, scaled_lut, tables_per_scale
from palettax.leaf.plain import check_plain

_PACKED_NBITS = (1, 2, 4, 6, 8)


def parse_target(target: ct.target | str) -> ct.target:
    """The deployment target by member or by name.

    Args:
        target: a member of `coremltools.target`, or its name.

    Returns:
        The member.

    Raises:
        ValueError: no such target, or one before iOS16, which knows no lookup tables.

    Example:
        >>> parse_target("macOS15").name
        'iOS18'
    """
    if isinstance(target, str):
        if target not in ct.target.__members__:
            raise ValueError(f"minimum_deployment_target={target!r}; {nearest(target, ct.target.__members__)}")
        target = ct.target[target]
    if target < ct.target.iOS16:
        raise ValueError(f"minimum_deployment_target={target.name} has no lookup tables; use iOS16 or later")
    return target


def check_forms(leaves: Mapping[str, PalettizedArray], target: ct.target) -> None:
    """Refuse the leaves that the target cannot hold, before anything is converted.

    Args:
        leaves: the palettized weights by name.
        target: the deployment target.

    Raises:
        ValueError: naming the leaf, its form, and what to do about it.
    """
    for name, leaf in leaves.items():
        check_plain(name, leaf, blocked_scale=True)
        unfit = _unfit_for_packed(leaf)
        if unfit and target < ct.target.iOS18:
            raise ValueError(
                f"{name}: {' and '.join(unfit)}; {target.name} holds one float table of scalars per weight, of "
                f"{', '.join(map(str, _PACKED_NBITS))} bits. Use {_targets_for(leaf)}, or palettize it in that form"
            )


def _unfit_for_packed(leaf: PalettizedArray) -> list[str]:
    """What about a leaf the packed form, before iOS18, does not hold."""
    unfit = [f"{groups} groups along axis {axis}" for axis, groups in enumerate(leaf.groups) if groups > 1]
    if leaf.vector_size > 1:
        unfit.append(f"vectors of {leaf.vector_size}")
    if leaf.nbits not in _PACKED_NBITS:
        unfit.append(f"{leaf.nbits} bits")
    if has_levels(leaf):
        unfit.append(f"a table of {leaf.lut.dtype} levels")
    elif leaf.scale is not None:
        unfit.append(f"a scale of shape {tuple(leaf.scale.shape)}")
    if leaf.mask is not None:
        unfit.append("a mask")
    return unfit


def _targets_for(leaf: PalettizedArray) -> str:
    """The targets that hold a leaf which the packed form does not."""
    if leaf.scale is None or leaf.mask is not None:
        return "iOS18 or iOS26"
    multiplied = "a table for every block of its scale" if has_levels(leaf) else "its scale multiplied into tables"
    return f"iOS18, which holds it with {multiplied}, or iOS26, which holds it as it is"


def in_package(leaf: PalettizedArray, target: ct.target) -> PalettizedArray:
    """What a leaf looks like in a package: the same weight, bit for bit, in the form that the target holds.

    Before iOS26 no scale stays behind a dense table. There a float table is multiplied with it, in the weight's own
    dtype, and a table of levels is repeated until each has one scale, which then stands in front of it. A mask that
    leaves nothing on the table gives way to a table of zeros.

    Args:
        leaf: a palettized weight that `check_forms` has passed.
        target: the deployment target.

    Returns:
        The leaf as NumPy arrays.

    Example:
        >>> lut = np.array([-1.0, 0.5], np.float32).reshape(1, 1, 2, 1)
        >>> scale = np.array([[2.0], [4.0]], np.float32)
        >>> leaf = PalettizedArray(lut, np.eye(2, dtype=np.uint8), scale, nbits=1)
        >>> in_package(leaf, ct.target.iOS18).lut.reshape(2, 2).tolist()
        [[-2.0, 1.0], [-4.0, 2.0]]
    """
    leaf = as_numpy(leaf)
    if leaf.mask is not None:
        # Sparse ops carry a scale at every target that has them, but no package should hold tensors of no length.
        return leaf if leaf.mask.any() else _zeros(leaf)
    if leaf.scale is None or target >= ct.target.iOS26:
        return leaf
    leaf = tables_per_scale(leaf)
    return leaf if has_levels(leaf) else dataclasses.replace(leaf, lut=scaled_lut(leaf), scale=None)


def _zeros(leaf: PalettizedArray) -> PalettizedArray:
    """A weight of nothing but zeros as a table."""
    lut = np.zeros((*(1,) * leaf.ndim, 2**leaf.nbits, 1), leaf.dtype)
    return PalettizedArray(lut, leaf.indices, nbits=leaf.nbits)


def target_of(mlmodel: ct.models.MLModel) -> ct.target:
    """The deployment target of a package."""
    version = mlmodel.get_spec().specificationVersion
    return max(target for target in ct.target if target.value <= version)
