"""`kmeans_lut`: the lookup table of least squared error."""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from palettax._typing import Array, PRNGKey, is_traced
from palettax.clustering.checks import (
    Method,
    as_host,
    check_finite,
    check_nbits,
    check_sensitivity,
    check_weights,
    float64_stays,
    lut_dtype,
    resolve_method,
    vectors_of,
)
from palettax.clustering.fit import LutFit
from palettax.clustering.host import host_call
from palettax.clustering.lloyd import lloyd
from palettax.clustering.rows import fit_rows
from palettax.clustering.vectors import kmeans_vectors


@float64_stays
def kmeans_lut(
    weights: Float[Array, "*shape"],
    nbits: int,
    *,
    sensitivity: Float[Array, "*shape"] | None = None,
    vector_size: int = 1,
    method: Method | None = None,
    key: PRNGKey | None = None,
    max_steps: int = 100,
) -> LutFit:
    """Cluster weights into the 2^nbits values of least squared error.

    minimise over lut and indices:  Σ sensitivity · (weight - lut[index])²

    `method="exact"` sorts or counts the weights on the host and finds the global optimum in O(n) memory; `converged`
    says that it is proven, which fails only where doubles do not resolve the errors. `method="lloyd"` is Lloyd's
    iteration in JAX: a local optimum, which stays on the accelerator. Scalars start it from a deterministic
    spread, vectors from the best of several k-means++ starts.

    Weights with at most 2^nbits distinct values are reproduced exactly. A sensitivity of zero everywhere counts as one
    everywhere. Works under `jit` and `vmap`; values that can't be clustered then give `converged=False` and a NaN lut.
    The lut is differentiable in the weights: an entry is the mean of its cell, and the cells stay as they are.

    Args:
        weights: (*shape), float16, bfloat16, float32 or float64, finite. NumPy float64 stays float64.
        nbits: 1, 2, 3, 4, 6 or 8.
        sensitivity: (*shape), ≥ 0: what a squared error of each weight costs; None for one everywhere.
        vector_size: weights per index: neighbours on the last axis, which it divides.
        method: "exact" or "lloyd"; None for exact scalars, and for vectors, which have no exact method, lloyd.
        key: for vectors, which draw their starts at random; required there and unused for scalars.
        max_steps: Lloyd steps at most; the exact solver needs no limit.

    Returns:
        `LutFit`; lut (2^nbits,), for vectors (2^nbits, vector_size), float32 (float64 for float64), ascending.

    Raises:
        ValueError: integer or empty weights, NaN or infinities, a width Core ML can't hold, a sensitivity that is
            negative or of another shape, a vector size that does not divide the last axis, vectors without a key, an
            unknown method.

    Example:
        >>> import numpy as np, palettax as px
        >>> fit = px.kmeans_lut(np.array([0.0, 0.1, 0.9, 1.0, 5.0, 5.2], np.float32), nbits=1)
        >>> print(fit.lut.round(2), fit.indices)
        [0.5 5.1] [0 0 0 0 1 1]

    References:
        Grønlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", arXiv 1701.07204.
        Kim et al., "SqueezeLLM: dense-and-sparse quantization", arXiv 2306.07629 (the sensitivity).
        Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007 (vectors).
    """
    check_weights(weights)
    check_nbits(nbits)
    check_finite(weights)
    check_sensitivity(sensitivity, weights)
    method = resolve_method(method, vector_size, key)
    rows, mass = as_host(weights), None if sensitivity is None else as_host(sensitivity)
    shape = weights.shape
    if vector_size > 1:
        rows = vectors_of(rows, vector_size)
        mass = None if mass is None else vectors_of(mass, vector_size)
        shape = rows.shape[:-1]
    core = (1, -1) if vector_size == 1 else (1, -1, vector_size)
    mass = None if mass is None else mass.reshape(core)
    fit = kmeans_groups(rows.reshape(core), nbits, mass, method, max_steps, key)
    fit = jax.tree.map(lambda a: jnp.asarray(a[0]), fit)
    return fit._replace(indices=fit.indices.reshape(shape))


def kmeans_groups(
    weights: Float[Array, "groups n *vector"],
    nbits: int,
    sensitivity: Float[Array, "groups n *vector"] | None,
    method: Method = "exact",
    max_steps: int = 100,
    key: PRNGKey | None = None,
    *,
    dtype: np.dtype | None = None,
) -> LutFit:
    """`kmeans_lut` of every row at once, scalars or vectors; every field of the fit has a leading axis of groups.

    `dtype` is what the exact solver's lut is rounded to, before indices are found; None for `lut_dtype(weights)`.
    """
    if weights.ndim == 3:
        start = cast(PRNGKey, key)  # resolve_method has seen to it
        fit = kmeans_vectors(weights, 2**nbits, sensitivity, start, max_steps=max_steps)
        return _with_gradient(fit, weights, sensitivity)
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


def _exact_kmeans(*arrays: np.ndarray) -> None:
    """Fit every row of a batch. Arrays: weights, maybe sensitivity, then the fields of `LutFit`."""
    inputs = [a.reshape(-1, a.shape[-1]) for a in arrays[:-5]]
    tables = [a.reshape(-1, a.shape[-1]) for a in arrays[-5:-3]]
    fit_rows(inputs[0], inputs[1] if len(inputs) == 2 else None, *tables, *(a.reshape(-1) for a in arrays[-3:]))


def _with_gradient(fit: LutFit, weights: Array, sensitivity: Array | None) -> LutFit:
    """The fit, its lut differentiable in the weights: entries are the means of their cells, which stay as they are."""
    if not is_traced(weights):
        return fit
    mass = jnp.ones_like(weights) if sensitivity is None else jnp.asarray(sensitivity).astype(lut_dtype(weights))
    return fit._replace(lut=jax.vmap(_cell_means)(fit.lut, weights, jax.lax.stop_gradient(mass), fit.indices))


@jax.custom_jvp
def _cell_means(lut: Array, weights: Array, mass: Array, indices: Array) -> Array:
    """`lut`, which is the mean of the weights of each cell."""
    return lut


@_cell_means.defjvp
def _cell_means_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    lut, _, mass, indices = primals
    wide = jnp.promote_types(mass.dtype, jnp.float32)
    mass = mass.astype(wide) / jnp.maximum(mass.astype(wide).max(), jnp.finfo(wide).tiny)
    total = jax.ops.segment_sum(mass, indices, lut.shape[0])
    moved = jax.ops.segment_sum(mass * tangents[1].astype(wide), indices, lut.shape[0])
    return lut, jnp.where(total > 0, moved / jnp.where(total > 0, total, 1), 0).astype(lut.dtype)


@partial(jax.jit, static_argnums=2)
def _lloyd_groups(weights: Array, sensitivity: Array | None, k: int, max_steps: int | jax.Array) -> LutFit:
    axes = (0, None if sensitivity is None else 0)
    return jax.vmap(lambda w, s: lloyd(w, k, s, max_steps), axes)(weights, sensitivity)
