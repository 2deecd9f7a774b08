"""`kmeans_lut`: the lookup table of least squared error."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from palettax._typing import Array, PRNGKey, is_traced
from palettax.clustering.assignment import host_assign
from palettax.clustering.checks import (
    Method,
    as_host,
    check_finite,
    check_method,
    check_nbits,
    check_sensitivity,
    check_weights,
    float64_stays,
    lut_dtype,
)
from palettax.clustering.exact import exact_clusters
from palettax.clustering.fit import LutFit
from palettax.clustering.histogram import PATTERNS, all_finite, finite_patterns, is_mass, look_up_bits, weighted_points
from palettax.clustering.host import host_call
from palettax.clustering.lloyd import lloyd


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
    The lut is differentiable in the weights: an entry is the mean of its cell, and the cells stay as they are.

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
    mass = None if sensitivity is None else as_host(sensitivity).reshape(1, -1)
    fit = kmeans_groups(as_host(weights).reshape(1, -1), nbits, mass, method, max_steps)
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
    check_method(method)
    if method == "lloyd":
        fit = _lloyd_groups(jax.lax.stop_gradient(weights), jax.lax.stop_gradient(sensitivity), 2**nbits, max_steps)
        return _with_gradient(fit, weights, sensitivity)
    n = weights.shape[1]
    results = [
        jax.ShapeDtypeStruct((2**nbits,), dtype or lut_dtype(weights)),
        jax.ShapeDtypeStruct((n,), np.uint8),
        jax.ShapeDtypeStruct((), lut_dtype(weights)),
        jax.ShapeDtypeStruct((), np.int32),
        jax.ShapeDtypeStruct((), np.bool_),
    ]
    args = [weights] if sensitivity is None else [weights, sensitivity]
    return _with_gradient(LutFit(*host_call(_exact_kmeans, results, *args)), weights, sensitivity)


def _with_gradient(fit: LutFit, weights: Array, sensitivity: Array | None) -> LutFit:
    """The fit, its lut differentiable in the weights: entries are the means of their cells, which stay as they are."""
    if not is_traced(weights):
        return fit
    mass = jnp.ones_like(weights) if sensitivity is None else jnp.asarray(sensitivity, weights.dtype)
    return fit._replace(lut=jax.vmap(_cell_means)(fit.lut, weights, jax.lax.stop_gradient(mass), fit.indices))


@jax.custom_jvp
def _cell_means(lut: Array, weights: Array, mass: Array, indices: Array) -> Array:
    """`lut`, which is the mean of the weights of each cell."""
    return lut


@_cell_means.defjvp
def _cell_means_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    lut, _, mass, indices = primals
    total = jax.ops.segment_sum(mass, indices, lut.size)
    moved = jax.ops.segment_sum(mass * tangents[1], indices, lut.size)
    return lut, jnp.where(total > 0, moved / jnp.where(total > 0, total, 1), 0).astype(lut.dtype)


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
    if not all_finite(weights) or not (sensitivity is None or is_mass(sensitivity)):
        lut[:], indices[:] = np.nan, 0
        return np.nan, 0, False
    points, heaviest = weighted_points(weights, sensitivity)
    lut[:], probes, proven = optimal_centroids(points.values, points.mass, lut.size)
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
    return heaviest * float(points.mass @ (points.values - entries[slots]) ** 2), probes, proven


def optimal_centroids(values: np.ndarray, mass: np.ndarray, k: int) -> tuple[np.ndarray, int, bool]:
    """The k ascending values of least weighted squared error; too few distinct points repeat the last."""
    if values.size > k:
        values, mass = values[mass > 0], mass[mass > 0]
    if values.size <= k:
        return np.pad(values, (0, k - values.size), mode="edge"), 0, True
    found = exact_clusters(values, mass, k)
    return found.centroids, found.probes, found.cost - found.bound <= 1e-9 * found.cost
