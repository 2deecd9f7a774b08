"""`kmeans_lut`: the lookup table of least squared error."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from palettax._typing import Array, PRNGKey
from palettax.clustering.assignment import host_assign
from palettax.clustering.checks import (
    check_finite,
    check_nbits,
    check_sensitivity,
    check_weights,
    float64_stays,
    lut_dtype,
)
from palettax.clustering.exact import exact_clusters
from palettax.clustering.fit import LutFit
from palettax.clustering.histogram import PATTERNS, Histogram, all_finite, finite_patterns, histogram, look_up_bits
from palettax.clustering.host import host_call
from palettax.clustering.lloyd import lloyd

Method = Literal["exact", "lloyd"]


@float64_stays
def kmeans_lut(
    weights: Float[Array, "*shape"],
    nbits: int,
    *,
    sensitivity: Float[Array, "*shape"] | None = None,
    vector_size: int = 1,
    method: Method = "exact",
    key: PRNGKey | None = None,
    max_steps: int = 100,
) -> LutFit:
    """Cluster weights into the 2^nbits values of least squared error.

    minimise over lut and indices:  Σ sensitivity · (weight - lut[index])²

    `method="exact"` finds the global optimum, on the host, in O(n) memory and a few linear passes. `method="lloyd"` is
    Lloyd's iteration in JAX from a deterministic start: a local optimum, which stays on the accelerator.

    Weights with at most 2^nbits distinct values are reproduced exactly. A sensitivity of zero everywhere counts as one
    everywhere. Works under `jit` and `vmap`; values that can't be clustered then give `converged=False` and a NaN lut.

    Args:
        weights: (*shape), float16, bfloat16, float32 or float64, finite. NumPy float64 stays float64.
        nbits: 1, 2, 3, 4, 6 or 8.
        sensitivity: (*shape), ≥ 0: what a squared error of each weight costs; None for one everywhere.
        vector_size: weights per index. Only 1 here.
        method: "exact" or "lloyd".
        key: unused: clustering scalars draws no random numbers.
        max_steps: Lloyd steps at most; the exact solver needs no limit.

    Returns:
        `LutFit`; lut (2^nbits,) float32 (float64 for float64), ascending.

    Raises:
        ValueError: integer or empty weights, NaN or infinities, a width Core ML can't hold, a sensitivity that is
            negative or of another shape, an unknown method.

    Example:
        >>> import numpy as np, palettax as px
        >>> fit = px.kmeans_lut(np.array([0.0, 0.1, 0.9, 1.0, 5.0, 5.2], np.float32), nbits=1)
        >>> print(fit.lut.round(2), fit.indices)
        [0.5 5.1] [0 0 0 0 1 1]

    References:
        Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", arXiv 1701.07204.
        Kim et al., "SqueezeLLM: dense-and-sparse quantization", arXiv 2306.07629 (the sensitivity).
    """
    check_weights(weights)
    check_nbits(nbits)
    check_finite(weights)
    check_sensitivity(sensitivity, weights)
    if vector_size != 1:
        raise ValueError(f"vector_size={vector_size}; only scalars (vector_size=1) can be clustered so far")
    flat = weights.reshape(1, -1)
    fit = kmeans_groups(flat, nbits, None if sensitivity is None else sensitivity.reshape(1, -1), method, max_steps)
    fit = jax.tree.map(lambda a: jnp.asarray(a[0]), fit)
    return fit._replace(indices=fit.indices.reshape(weights.shape))


def kmeans_groups(
    weights: Float[Array, "groups n"],
    nbits: int,
    sensitivity: Float[Array, "groups n"] | None,
    method: Method = "exact",
    max_steps: int = 100,
    *,
    dtype: np.dtype | None = None,
) -> LutFit:
    """`kmeans_lut` of every row at once; every field of the fit has a leading axis of groups.

    `dtype` is what the exact solver's lut is rounded to, before indices are found; None for `lut_dtype(weights)`.
    """
    n = weights.shape[1]
    if method == "lloyd":
        return _lloyd_groups(weights, sensitivity, 2**nbits, max_steps)
    if method != "exact":
        raise ValueError(f'method={method!r}; choose "exact" or "lloyd"')
    results = [
        jax.ShapeDtypeStruct((2**nbits,), dtype or lut_dtype(weights)),
        jax.ShapeDtypeStruct((n,), np.uint8),
        jax.ShapeDtypeStruct((), lut_dtype(weights)),
        jax.ShapeDtypeStruct((), np.int32),
        jax.ShapeDtypeStruct((), np.bool_),
    ]
    args = [weights] if sensitivity is None else [weights, sensitivity]
    return LutFit(*host_call(_exact_kmeans, results, *args))


@partial(jax.jit, static_argnums=(2, 3))
def _lloyd_groups(weights: Array, sensitivity: Array | None, k: int, max_steps: int) -> LutFit:
    axes = (0, None if sensitivity is None else 0)
    return jax.vmap(lambda w, s: lloyd(w, k, s, max_steps), axes)(weights, sensitivity)


def _exact_kmeans(*arrays: np.ndarray) -> None:
    """Fit every row of a batch, on all cores. Arrays: weights, maybe sensitivity, then the fields of `LutFit`."""
    inputs = [a.reshape(-1, a.shape[-1]) for a in arrays[:-5]]
    lut, indices = (a.reshape(-1, a.shape[-1]) for a in arrays[-5:-3])
    inertia, num_steps, converged = (a.reshape(-1) for a in arrays[-3:])

    def fit_row(row: int) -> None:
        sensitivity = inputs[1][row] if len(inputs) == 2 else None
        with np.errstate(over="ignore"):  # an inertia too large for float32 is infinite
            inertia[row], num_steps[row], converged[row] = _fit(inputs[0][row], sensitivity, lut[row], indices[row])

    rows = range(inputs[0].shape[0])
    if len(rows) == 1:
        fit_row(0)
        return
    with ThreadPoolExecutor(min(len(rows), os.cpu_count() or 1)) as pool:
        for _ in pool.map(fit_row, rows):
            pass


def _fit(
    weights: np.ndarray, sensitivity: np.ndarray | None, lut: np.ndarray, indices: np.ndarray
) -> tuple[float, int, bool]:
    """Fit one group: fills its lut and indices; returns inertia, probes and whether the optimum is proven."""
    weights = np.ascontiguousarray(weights)
    if (sensitivity is not None and not (sensitivity >= 0).all()) or not all_finite(weights):
        lut[:], indices[:] = np.nan, 0
        return np.nan, 0, False
    if sensitivity is not None and not sensitivity.any():
        sensitivity = None
    points = histogram(weights, sensitivity)
    centroids, probes, proven = optimal_centroids(points, lut.size)
    lut[:] = centroids
    entries = lut.astype(np.float64)
    if weights.dtype.itemsize == 2:
        patterns, values = finite_patterns(weights.dtype)
        slots = np.empty(values.size, np.uint8)
        host_assign(values, entries, slots)
        table = np.zeros(PATTERNS, np.uint8)
        table[patterns] = slots
        look_up_bits(weights.view(np.uint16), table, indices)
    else:
        host_assign(weights, entries, indices)
    slots = np.empty(points.values.size, np.uint8)
    host_assign(points.values, entries, slots)
    return float(points.mass @ (points.values - entries[slots]) ** 2), probes, proven


def optimal_centroids(points: Histogram, k: int) -> tuple[np.ndarray, int, bool]:
    """The k ascending values of least weighted squared error; too few distinct points repeat the last."""
    values, mass = points
    if values.size > k:
        values, mass = values[mass > 0], mass[mass > 0]
    if values.size <= k:
        return np.pad(values, (0, k - values.size), mode="edge"), 0, True
    found = exact_clusters(values, mass, k)
    return found.centroids, found.probes, found.cost - found.bound <= 1e-10 * found.cost
