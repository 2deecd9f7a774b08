"""What every `*_lut` function returns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from palettax._typing import Array


class LutFit(NamedTuple):
    """A lookup table, the index of every weight, and how the fit went.

    Attributes:
        lut: (k,), or (k, vector_size) for vectors; ascending (vectors: lexicographic). Float32, or float64 for float64
            weights, so that clustering half precision loses nothing before the caller chooses a storage dtype. A fit
            that needs fewer than k entries repeats the last.
        indices: uint8, of the weights' shape (last axis divided by vector_size); the nearest entry, the lowest on ties.
        inertia: Σ sensitivity · (weight - lut[index])².
        num_steps: work done: Lagrangian probes, Lloyd steps, or 0 for a closed form.
        converged: whether the method reached what it promises. False for weights that hold NaN or infinity, for
            weights with more distinct values than `unique_lut` may use, for Lloyd stopped by `max_steps`, and for an
            exact fit whose optimum is not proven to 1e-9: doubles do not tell some costs apart.
    """

    lut: Float[Array, "*lut"]
    indices: UInt8[Array, "*shape"]
    inertia: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    converged: Bool[Array, "*batch"]


def fit_of(
    points: Float[Array, "groups n"],
    lut: Float[Array, "groups k"],
    indices: UInt8[Array, "groups n"],
    converged: Bool[Array, " groups"] | None = None,
) -> LutFit:
    """The fit of every concrete row whose table has a closed form; `converged` is True where it is not given."""
    inertia = np.square(points - np.take_along_axis(np.asarray(lut), np.asarray(indices), axis=1)).sum(axis=1)
    converged = np.ones(len(points), bool) if converged is None else converged
    return LutFit(lut, indices, inertia, np.zeros(len(points), np.int32), converged)
