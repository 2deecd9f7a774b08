"""Soft k-means as it is defined, all attention in one array and every step differentiated; and how to compare."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import palettax as px

FIELDS = ["lut", "values", "by weights", "by start", "by temperature", "by sensitivity"]
EPS = float(np.finfo(np.float32).eps)


def reference(weights, lut, temperature, sensitivity=None, *, relative=True, max_steps=10):
    """The lut after all steps, and the values it gives."""
    entries = lut.reshape(lut.shape[0], -1)
    k, d = entries.shape
    x = weights.reshape(-1, d)
    s = jnp.ones_like(x) if sensitivity is None else sensitivity.reshape(-1, d)
    total = s.sum(axis=1, keepdims=True)
    metric = jnp.where(total > 0, d * s / jnp.where(total > 0, total, 1), 1)
    mean = (s * x).sum(axis=0) / s.sum(axis=0)
    variance = (s * (x - mean) ** 2).sum() / s.sum()
    tau = temperature * variance * k ** (-2 / d) if relative else temperature

    def attention(entries):
        return jax.nn.softmax(-(metric[:, None] * (x[:, None] - entries) ** 2).sum(axis=-1) / tau, axis=1)

    def step(_, entries):
        return attention(entries).T @ (s * x) / (attention(entries).T @ s)

    entries = jax.lax.fori_loop(0, max_steps, step, entries)
    return entries.reshape(lut.shape), (attention(entries) @ entries).reshape(weights.shape)


def soft(weights, lut, temperature, sensitivity=None, **how):
    """The same from palettax."""
    fit = px.soft_kmeans_lut(weights, lut, temperature, sensitivity=sensitivity, **how)
    return fit.lut, fit.values


@partial(jax.jit, static_argnames=("function", "relative", "max_steps", "tol", "adjoint"))
def _graded(function, weights, lut, temperature, sensitivity, slopes, **how):
    given = (weights, lut, temperature) if sensitivity is None else (weights, lut, temperature, sensitivity)

    def score(*given):
        results = function(*given, **how)
        return sum((r.astype(s.dtype) * s).sum() for r, s in zip(results, slopes, strict=True)), results

    (_, results), gradients = jax.value_and_grad(score, range(len(given)), has_aux=True)(*given)
    return *results, *gradients


def graded(function, weights, lut, temperature, sensitivity=None, *, wide=False, slopes=None, **how):
    """lut, values, and the gradient of a combination of both in all that is given, as NumPy arrays by name.

    Args:
        function: `soft` or `reference`.
        wide: whether to compute in float64.
        slopes: what lut and values count in the combination; random ones by default.
        how: what else the function takes.
    """
    rng = np.random.default_rng(0)
    slopes = slopes or (rng.standard_normal(lut.shape), rng.standard_normal(weights.shape))
    rest = (lut, temperature, sensitivity, slopes)
    lut, temperature, sensitivity, slopes = jax.tree.map(
        lambda a: np.asarray(a, np.float64 if wide else np.float32), rest
    )
    given = np.asarray(weights, np.float64) if wide else weights, lut, temperature, sensitivity, slopes
    with jax.enable_x64(wide):
        found = jax.tree.map(np.asarray, _graded(function, *given, **how))
    return dict(zip(FIELDS, found, strict=False))


def error(got, want):
    """The largest difference over the largest magnitude; that of a gradient near zero is of order one, as the data."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return abs(got - want).max() / max(abs(want).max(), 0.01)


def assert_close(got, want, rtol, slack=None):
    """All fields within `rtol` of their largest magnitude, or within what `slack` has for them if that is more."""
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    limits = {name: rtol if slack is None else max(rtol, slack[name]) for name in want}
    assert all(errors[name] <= limits[name] for name in want), (errors, limits)


def conditioning(weights, lut, temperature, sensitivity, want, *, roundings=32, **how):
    """How far the reference moves, field by field, when weights and lut are rounded otherwise to float32: times as many
    roundings as there may be on the way. No computation in float32 can promise to be much nearer.
    """
    rng = np.random.default_rng(0)
    moved = (a + EPS * abs(a).max() * rng.choice([-1, 1], a.shape) for a in (weights, lut))
    found = graded(reference, *moved, temperature, sensitivity, wide=True, **how)
    moves = {name: roundings * error(found[name], want[name]) for name in want}
    # One draw may leave one of the gradients where it is.
    most = max(move for name, move in moves.items() if name.startswith("by"))
    return {name: most if name.startswith("by") else move for name, move in moves.items()}
