"""How soft k-means is differentiated: each adjoint is a value that runs the iteration in its own way."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from palettax.clustering.attention import Points, Scalar, attention, attracts, is_anchored, step, sum_blocks


class Solution(NamedTuple):
    """A table at which the iteration stopped, how many steps that took, and whether it moved no more."""

    lut: Float[jax.Array, "k d"]
    num_steps: Int[jax.Array, ""]
    converged: Bool[jax.Array, ""]


@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Differentiate every step, as the DKM paper does: exactly what autodiff makes of `max_steps` steps.

    Runs all of them, whatever `tol` says. The only adjoint with a gradient in the table that it starts from.

    References:
        Cho et al., "DKM: differentiable k-means clustering layer for neural network compression", arXiv 2108.12659.
    """

    def solve(
        self, points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar, max_steps: int, tol: float | Scalar
    ) -> Solution:
        """Take all steps."""

        def advance(state: tuple, _: None) -> tuple[tuple, None]:
            new = step(points, state[0], temperature)
            return (new, abs(new - state[0]).max()), None

        (lut, moved), _ = jax.lax.scan(advance, (lut, jnp.array(jnp.inf, lut.dtype)), length=max_steps)
        return Solution(lut, jnp.int32(max_steps), moved <= tol)


@dataclasses.dataclass(frozen=True)
class Implicit:
    """Differentiate the fixed point lut = step(lut, weights), not the way to it.

        dlut = (I - ∂step/∂lut)⁻¹ ∂step/∂weights · dweights

    by products of matrices of the size of the table. Where steps do not contract, so that there is no fixed point to
    speak of, as where two entries are about to become one, the gradient is that of `OneStep`. Where `max_steps` end the
    iteration before the fixed point, it is the gradient of a fixed point nearby. First derivatives only: the matrix is
    a constant to a second one.

    References:
        Jaffe et al., "IDKM: memory efficient neural network quantization via implicit, differentiable k-means",
        arXiv 2312.07759.
    """

    def solve(
        self, points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar, max_steps: int, tol: float | Scalar
    ) -> Solution:
        """Step until nothing moves by more than `tol`."""
        found = _fixed_point(points, lut, temperature, max_steps, tol)
        return found._replace(lut=_with_implicit_gradient(found.lut, points, temperature))


@dataclasses.dataclass(frozen=True)
class OneStep:
    """Differentiate the last step alone, as if the table before it were a constant.

    The first term of `Implicit`'s series, and all of it when it is so cold that no weight is shared: then ∂step/∂lut
    vanishes. First derivatives only: a second one would be of the last step too.

    References:
        Fung et al., "JFB: Jacobian-free backpropagation for implicit networks", arXiv 2103.12803.
    """

    def solve(
        self, points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar, max_steps: int, tol: float | Scalar
    ) -> Solution:
        """Step until nothing moves by more than `tol`; the last step is the one that is differentiated."""
        before = _fixed_point(points, lut, temperature, max_steps - 1, tol)
        last = step(points, before.lut, temperature)
        return Solution(last, before.num_steps + 1, abs(last - before.lut).max() <= tol)


Adjoint = Unrolled | Implicit | OneStep

IMPLICIT = Implicit()

DOUBLINGS = 12
"""Of the number of terms of a series: steps that leave more than 0.998 of a distance do not count as contracting."""


def _fixed_point(
    points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar, max_steps: int, tol: float | Scalar
) -> Solution:
    """The table that soft k-means does not move by more than `tol`; a constant to differentiation."""
    points, lut, temperature = jax.lax.stop_gradient((points, lut, temperature))

    def advance(state: tuple) -> tuple:
        lut, count, _ = state
        new = step(points, lut, temperature)
        return new, count + 1, abs(new - lut).max()

    start = lut, jnp.int32(0), jnp.array(jnp.inf, lut.dtype)
    lut, count, moved = jax.lax.while_loop(lambda s: (s[1] < max_steps) & (s[2] > tol), advance, start)
    return Solution(lut, count, moved <= tol)


@jax.custom_jvp
def _with_implicit_gradient(lut: jax.Array, points: Points, temperature: jax.Array) -> jax.Array:
    """`lut`, which is the fixed point of these points at this temperature."""
    return lut


@_with_implicit_gradient.defjvp
def _implicit_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    lut, points, temperature = primals
    _, moved = jax.jvp(lambda p, t: step(p, lut, t), (points, temperature), tangents[1:])
    jacobian = step_jacobian(points, lut, temperature)
    return lut, jnp.matmul(_inverse(jacobian), moved.reshape(-1), precision="highest").reshape(lut.shape)


def _inverse(jacobian: Float[jax.Array, "m m"]) -> Float[jax.Array, "m m"]:
    """(I - jacobian)⁻¹ = I + jacobian + jacobian² + …, if that converges; else I."""
    one, product = jnp.eye(jacobian.shape[0], dtype=jacobian.dtype), partial(jnp.matmul, precision="highest")

    def double(_: int | jax.Array, state: tuple) -> tuple:
        total, power = state
        return total + product(power, total), product(power, power)

    total, power = jax.lax.fori_loop(0, DOUBLINGS, double, (one, jacobian))
    # Not the largest against 1e-3: XLA's maximum of a batch loses NaN, which powers that overflow become.
    return jnp.where((abs(power) < 1e-3).all(), total, one)


def step_jacobian(points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar) -> Float[jax.Array, "kd kd"]:
    """∂step/∂lut: Σ mass · (place - step) · ∂attention/∂lut over Σ mass · attention."""
    k, d = lut.shape
    new = step(points, lut, temperature)

    def of_block(block: Points) -> tuple[jax.Array, jax.Array, jax.Array]:
        share, gaps = attention(block, lut, temperature)
        metric = [1.0] * d if block.metric is None else list(block.metric)
        rates = [2 / temperature * m * gap for m, gap in zip(metric, gaps, strict=True)]
        pulls = [m * share * (x - c[:, None]) for m, x, c in zip(block.mass, block.places, new.T, strict=True)]
        attracted = jnp.stack([(share * m).sum(axis=1) for m in block.mass], axis=1)
        # A weight that is all an entry's own does not move it: 1 - 1 is exactly 0, large sums would not be.
        lent = [p * (1 - share) for p in pulls]
        own = jnp.stack([jnp.stack([(p * r).sum(axis=1) for r in rates], axis=1) for p in lent], axis=1)  # (k, d, d)
        left, right = jnp.stack(pulls, axis=1).reshape(k * d, -1), jnp.stack([share * r for r in rates], axis=1)
        cross = jnp.matmul(left, right.reshape(k * d, -1).T, precision="highest")
        return attracted, own, cross

    attracted, own, cross = sum_blocks(of_block, points, k)
    one = jnp.eye(k, dtype=bool)[:, None, :, None]
    change = jnp.where(one, own[:, :, None, :], -cross.reshape(k, d, k, d)).reshape(k * d, k * d)
    used = (attracts(points, attracted) & ~is_anchored(points, new)).reshape(-1, 1)
    return jnp.where(used, change / jnp.where(used, attracted.reshape(-1, 1), 1), 0)
