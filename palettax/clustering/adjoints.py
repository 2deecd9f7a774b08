"""How soft k-means is differentiated: each adjoint is a value that runs the iteration in its own way."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from palettax.clustering.attention import Points, Scalar, attention, step, sum_blocks


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

    by one solve of the size of the table. Where that matrix has no inverse, as where two entries are about to become
    one, the gradient is that of `OneStep`.

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

    The first term of `Implicit`'s series, and all of it as the temperature falls: then ∂step/∂lut vanishes.

    References:
        Fung et al., "JFB: Jacobian-free backpropagation for implicit networks", arXiv 2103.12803.
    """

    def solve(
        self, points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar, max_steps: int, tol: float | Scalar
    ) -> Solution:
        """Step until nothing moves by more than `tol`, and once more."""
        found = _fixed_point(points, lut, temperature, max_steps, tol)
        return found._replace(lut=step(points, found.lut, temperature))


Adjoint = Unrolled | Implicit | OneStep

IMPLICIT = Implicit()


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
    lut, *rest = primals
    _, moved = jax.jvp(lambda p, t: step(p, lut, t), tuple(rest), tuple(tangents[1:]))
    inverse = jnp.linalg.inv(
        jnp.eye(lut.size, dtype=lut.dtype) - step_jacobian(*jax.lax.stop_gradient((rest[0], lut, rest[1])))
    )
    inverse = jnp.where(jnp.isfinite(inverse).all(), inverse, jnp.eye(lut.size, dtype=lut.dtype))
    return lut, jnp.matmul(inverse, moved.reshape(-1), precision="highest").reshape(lut.shape)


def step_jacobian(points: Points, lut: Float[jax.Array, "k d"], temperature: Scalar) -> Float[jax.Array, "kd kd"]:
    """∂step/∂lut: Σ mass · (place - step) · ∂attention/∂lut over Σ mass · attention."""
    k, d = lut.shape
    new = step(points, lut, temperature)

    def of_block(block: Points) -> tuple[jax.Array, jax.Array, jax.Array]:
        share, gaps = attention(block, lut, temperature)
        rates = [2 / temperature * gap * (1 if block.metric is None else block.metric[e]) for e, gap in enumerate(gaps)]
        pulls = [
            m * share * (x - new[:, e, None]) for e, (m, x) in enumerate(zip(block.mass, block.places, strict=True))
        ]
        attracted = jnp.stack([(share * m).sum(axis=1) for m in block.mass], axis=1)
        own = jnp.stack([jnp.stack([(p * r).sum(axis=1) for r in rates], axis=1) for p in pulls], axis=1)  # (k, d, d)
        left, right = jnp.stack(pulls, axis=1).reshape(k * d, -1), jnp.stack([share * r for r in rates], axis=1)
        cross = jnp.matmul(left, right.reshape(k * d, -1).T, precision="highest")
        return attracted, own, cross

    attracted, own, cross = sum_blocks(of_block, points, k)
    same = jnp.einsum("jde,jl->jdle", own, jnp.eye(k, dtype=lut.dtype)).reshape(k * d, k * d)
    used = (attracted > 1e-30 * points.mass.sum()).reshape(-1, 1)
    return jnp.where(used, (same - cross) / jnp.where(used, attracted.reshape(-1, 1), 1), 0)
