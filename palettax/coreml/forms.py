"""Which forms of a lookup table each deployment target holds."""

from __future__ import annotations

from collections.abc import Mapping

import coremltools as ct

from palettax.leaf import PalettizedArray
from palettax.torch.names import nearest
from palettax.torch.plain import check_plain

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
        if leaf.scale is not None and target < ct.target.iOS26:
            raise ValueError(
                f"{name}: it has a scale of shape {tuple(leaf.scale.shape)}, and {target.name} keeps no scale "
                "behind a table: coremltools' own pipeline would repeat the table once per scale there. "
                "Use iOS26, or fold the scale into a table per channel (group_size=1)"
            )
        unfit = _unfit_for_packed(leaf)
        if unfit and target < ct.target.iOS18:
            raise ValueError(
                f"{name}: {' and '.join(unfit)}; {target.name} holds one table of scalars per weight, of "
                f"{', '.join(map(str, _PACKED_NBITS))} bits. Use iOS18, or palettize it per tensor in such a width"
            )


def _unfit_for_packed(leaf: PalettizedArray) -> list[str]:
    """What about a leaf the packed form, before iOS18, does not hold."""
    unfit = [f"{groups} groups along axis {axis}" for axis, groups in enumerate(leaf.groups) if groups > 1]
    if leaf.vector_size > 1:
        unfit.append(f"vectors of {leaf.vector_size}")
    if leaf.nbits not in _PACKED_NBITS:
        unfit.append(f"{leaf.nbits} bits")
    return unfit
