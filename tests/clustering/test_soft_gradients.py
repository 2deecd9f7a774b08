"""Gradients of soft k-means: each adjoint against what it claims to be, on few weights, many, and degenerate ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import palettax as px
from palettax.clustering import attention as attention_module
from palettax.clustering import soft as soft_module
from palettax.clustering.adjoints import _inverse
from tests.clustering.soft_reference import EPS, FIELDS, assert_close, conditioning, error, graded, reference, soft
from tests.tables import data

ADJOINTS = {"implicit": px.Implicit(), "unrolled": px.Unrolled(), "one step": px.OneStep()}
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)


def quantiles(weights, k):
    """A fair start: the middles of k equal shares."""
    return np.quantile(weights, (np.arange(k) + 0.5) / k).astype(weights.dtype)


def problem(kind="normal", n=60, k=4, seed=0):
    """float32 weights, a start, and sensitivities."""
    weights = data(kind, n, seed).astype(np.float32)
    sensitivity = np.random.default_rng(seed + 1).random(n).astype(np.float32) + np.float32(0.01)
    return weights, quantiles(weights, k), sensitivity


# --- Unrolled is autodiff -------------------------------------------------------------------------------------------

CASES = {
    "1 bit": ((40,), (2,), True, False),
    "2 bits": ((60,), (4,), True, True),
    "3 bits": ((33,), (8,), False, True),
    "4 bits": ((7, 9), (16,), True, False),
    "pairs": ((5, 8), (4, 2), False, False),
    "triples": ((8, 6), (4, 3), True, True),
}
"""Shape of the weights, shape of the lut, whether the temperature is relative, whether there are sensitivities."""


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.3, 30),
    kind=st.sampled_from(["normal", "grid", "offset"]),
)
def test_unrolled_is_autodiff_of_the_steps(case, seed, temperature, kind):
    """To what the rounding of the weights moves the exact result by, through steps that amplify it, and to no less than
    1e-9 in float64 and 1e-5 in float32.
    """
    shape, table, relative, weighted = CASES[case]
    rng = np.random.default_rng(seed)
    weights = data(kind, int(np.prod(shape)), seed).reshape(shape) / (20 if kind == "grid" else 1)
    weights = weights.astype(np.float32)
    vectors = np.unique(weights.reshape(-1, *table[1:]), axis=0)
    lut = rng.choice(vectors, table[0], replace=len(vectors) < table[0])
    sensitivity = rng.random(shape).astype(np.float32) + np.float32(0.01) if weighted else None
    if weighted and len(table) == 2:
        sensitivity[1, 0] = 0
    if not relative:
        temperature *= float(weights.var()) * table[0] ** (-2 / len(table))
    given = weights, lut, np.float32(temperature), sensitivity

    want = graded(reference, *given, wide=True, relative=relative)
    check(given, want, conditioning(*given, want, roundings=512, relative=relative), relative=relative)


def check(given, want, slack, **how):
    """Unrolled in float64 and in float32."""
    wide = graded(soft, *given, wide=True, adjoint=px.Unrolled(), **how)
    assert_close(wide, want, 1e-9, {name: 2.0**-29 * value for name, value in slack.items()})
    least = 1e-5 + 16 * EPS * abs(given[0].mean())  # values are as coarse as the weights
    assert_close(graded(soft, *given, adjoint=px.Unrolled(), **how), want, least, slack)


@pytest.mark.parametrize("temperature", [0.3, 30])
def test_unrolled_is_autodiff_of_the_steps_of_256_entries(temperature):
    weights, _, sensitivity = problem(n=300)
    given = weights, np.sort(weights)[:256], np.float32(temperature), sensitivity
    want = graded(reference, *given, wide=True)
    check(given, want, conditioning(*given, want))


# --- Implicit is the derivative of the fixed point ------------------------------------------------------------------

FIXED_POINTS = {
    "absolute": ((30,), (3,), False),
    "relative vectors": ((12, 4), (3, 2), True),
}


@pytest.mark.parametrize("case", FIXED_POINTS)
def test_implicit_is_the_derivative_of_what_it_converges_to(case):
    """Forward mode against central differences in a random direction in all that is given; reverse mode against it."""
    shape, table, relative = FIXED_POINTS[case]
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(shape)
    lut = weights.reshape(-1, *table[1:])[: table[0]]
    temperature = 1.0 if relative else 0.15

    def converged(weights, temperature, sensitivity):
        how = {"sensitivity": sensitivity, "relative": relative, "max_steps": 5000, "tol": 1e-14}
        fit = px.soft_kmeans_lut(weights, jnp.asarray(lut), temperature, adjoint=px.Implicit(), **how)
        return fit.lut, fit.values

    with jax.enable_x64(True):
        given = weights, np.float64(temperature), rng.random(shape) + 0.1
        along = tuple(rng.standard_normal(np.shape(a)) for a in given)
        slopes = rng.standard_normal(table), rng.standard_normal(shape)
        forward = jax.jit(lambda given, along: jax.jvp(converged, given, along))
        _, moved = forward(given, along)
        step = 1e-5
        ends = [
            forward(tuple(g + sign * step * a for g, a in zip(given, along, strict=True)), along)[0] for sign in (1, -1)
        ]
        for name, tangent, up, down in zip(FIELDS, moved, *ends, strict=False):
            assert error(tangent, (np.asarray(up) - np.asarray(down)) / (2 * step)) < 1e-6, name

        pulled = jax.jit(lambda given, slopes: jax.vjp(converged, *given)[1](slopes))(given, slopes)
        there = sum(float((s * m).sum()) for s, m in zip(slopes, moved, strict=True))
        back = sum(float((p * a).sum()) for p, a in zip(pulled, along, strict=True))
        assert there == pytest.approx(back, rel=1e-9)


def apart(n=60):
    """Weights in four clusters with nothing between them, and sensitivities."""
    rng = np.random.default_rng(0)
    weights = rng.permutation(np.resize([-3, -1, 1, 3], n)) + rng.uniform(-0.4, 0.4, n)
    return weights.astype(np.float32), np.array([-2.5, -1, 1, 3.5], np.float32), rng.random(n).astype(np.float32)


CONVERGED = {"wide": True, "max_steps": 300, "tol": 1e-14}
PROBLEMS = {"normal": problem(), "apart": apart()}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_implicit_is_unrolled_without_end(name, temperature):
    weights, lut, sensitivity = PROBLEMS[name]
    implicit, unrolled = (
        graded(soft, weights, lut, temperature, sensitivity, adjoint=adjoint, **CONVERGED)
        for adjoint in (px.Implicit(), px.Unrolled())
    )
    assert_close(implicit, unrolled, 1e-8)
    assert not implicit["by start"].any()


def test_adjoints_agree_as_the_temperature_falls():
    """Between clusters that are apart, the attention falls exponentially."""
    weights, lut, sensitivity = apart()
    gaps = []
    for temperature in (3.0, 1.0, 0.3, 0.1):
        one, *others = (
            graded(soft, weights, lut, temperature, sensitivity, adjoint=adjoint, **CONVERGED)
            for adjoint in (px.OneStep(), px.Implicit(), px.Unrolled())
        )
        gaps += [max(error(other[f], one[f]) for other in others for f in ("by weights", "by sensitivity"))]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1e-3
    assert gaps[-1] < 1e-12


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-5, 1e-6, 0.0])
def test_adjoints_agree_where_no_weight_is_shared(temperature):
    """float32, and clusters that are apart."""
    weights, lut, sensitivity = apart()
    implicit, one = (
        graded(soft, weights, lut, temperature, sensitivity, adjoint=adjoint)
        for adjoint in (px.Implicit(), px.OneStep())
    )
    assert_close(implicit, one, 1e-5)


def with_zero(weights, lut, temperature, sensitivity, **how):
    """A fit of which one entry is to stay at zero."""
    columns = (a[:, None] for a in (weights, lut, sensitivity))
    weights, lut, sensitivity = columns
    way = soft_module.Way(how["adjoint"], how["max_steps"])
    anchor = jnp.array(True)
    fit = soft_module.soft_row(weights, lut, temperature, how["tol"], sensitivity, anchor, way=way)
    return fit.lut[:, 0], fit.values[:, 0]


def test_an_entry_stays_at_zero():
    """To rounding; the others are where a fit with that entry converges, and so are their gradients."""
    weights, lut, sensitivity = PROBLEMS["normal"]
    given = weights + np.float32(0.3), lut, 1.0, sensitivity
    implicit, unrolled = (graded(with_zero, *given, adjoint=a, **CONVERGED) for a in (px.Implicit(), px.Unrolled()))
    assert abs(implicit["lut"]).min() < 1e-12
    assert_close(implicit, unrolled, 1e-8)
    x, c, s = given[0].astype(np.float64), implicit["lut"], sensitivity.astype(np.float64)
    tau = np.average((x - np.average(x, weights=s)) ** 2, weights=s) / 16
    share = np.array(jax.nn.softmax(-((x[:, None] - c) ** 2) / tau, axis=1), np.float64)
    means = (s * x) @ share / (s @ share)
    assert error(c, np.where(abs(c) < 1e-12, 0, means)) < 1e-5


# --- Laws -----------------------------------------------------------------------------------------------------------


@adjoints
@pytest.mark.parametrize("power", [-30, -6, -3, 1, 4, 30])
def test_weights_times_a_number(adjoint, power):
    """Everything scales; in float32 the product is rounded once more."""
    weights, lut, sensitivity = problem()
    scale = 10.0**power
    plain = graded(soft, weights, lut, 1.0, sensitivity, adjoint=adjoint)
    want = graded(reference, weights, lut, 1.0, sensitivity, wide=True)
    scaled = graded(soft, *((a * scale).astype(np.float32) for a in (weights, lut)), 1.0, sensitivity, adjoint=adjoint)
    degrees = dict(zip(FIELDS, [1, 1, 0, 0, 1, 1], strict=True))
    scaled = {name: np.float64(value) / scale ** degrees[name] for name, value in scaled.items()}
    assert_close(scaled, plain, 1e-5, conditioning(weights, lut, 1.0, sensitivity, want))


@adjoints
@pytest.mark.parametrize("shift", [-3, 100])
def test_weights_plus_a_number(adjoint, shift):
    weights, lut, sensitivity = problem()
    weights, lut = (np.round(a * 2**12) / np.float32(2**12) for a in (weights, lut))  # so that sums are exact
    plain = graded(soft, weights, lut, 1.0, sensitivity, adjoint=adjoint)
    want = graded(reference, weights, lut, 1.0, sensitivity, wide=True)
    moved = graded(soft, weights + np.float32(shift), lut + np.float32(shift), 1.0, sensitivity, adjoint=adjoint)
    moved = {name: value - shift if name in ("lut", "values") else value for name, value in moved.items()}
    assert_close(moved, plain, 1e-5 + 16 * abs(shift) * EPS, conditioning(weights, lut, 1.0, sensitivity, want))


@adjoints
def test_order_means_nothing(adjoint):
    weights, lut, sensitivity = problem()
    rng = np.random.default_rng(5)
    order, places = rng.permutation(60), np.array([2, 0, 3, 1])
    slopes = rng.standard_normal(4), rng.standard_normal(60)
    plain = graded(soft, weights, lut, 1.0, sensitivity, slopes=slopes, adjoint=adjoint)
    want = graded(reference, weights, lut, 1.0, sensitivity, wide=True)
    mixed = graded(
        soft,
        weights[order],
        lut[places],
        1.0,
        sensitivity[order],
        slopes=(slopes[0][places], slopes[1][order]),
        adjoint=adjoint,
    )
    back = {"lut": places, "by start": places, "values": order, "by weights": order, "by sensitivity": order}
    plain = {name: value[back[name]] if name in back else value for name, value in plain.items()}
    assert_close(mixed, plain, 1e-5, conditioning(weights, lut, 1.0, sensitivity, want))


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_sensitivity_times_a_number(scale):
    """Only ratios count. The number is a power of two: nothing is rounded otherwise."""
    weights, lut, sensitivity = problem()
    plain = graded(soft, weights, lut, 1.0, sensitivity, adjoint=px.Implicit())
    scaled = graded(soft, weights, lut, 1.0, sensitivity * np.float32(scale), adjoint=px.Implicit())
    scaled["by sensitivity"] = np.float64(scaled["by sensitivity"]) * scale
    assert_close(scaled, plain, 1e-6)


def test_sensitivity_counts_as_copies():
    weights, lut, _ = problem()
    rng = np.random.default_rng(0)
    counts = rng.permutation(np.repeat([0, 1, 1, 2], 15))
    slopes = rng.standard_normal(4), np.where(counts > 0, rng.standard_normal(60), 0)
    how = {"wide": True, "adjoint": px.Unrolled()}
    once = graded(soft, weights, lut, 1.0, counts, slopes=slopes, **how)
    copies = np.repeat(np.arange(60), counts)
    shared = slopes[0], slopes[1][copies] / counts[copies]
    often = graded(soft, weights[copies], lut, 1.0, np.ones(60), slopes=shared, **how)
    assert error(often["values"], once["values"][copies]) < 1e-12
    assert error(np.bincount(copies, often["by weights"], 60), once["by weights"]) < 1e-9
    for name in ("lut", "by start", "by temperature"):
        assert error(often[name], once[name]) < 1e-9, name


def test_rows_by_vmap_are_rows_one_by_one():
    rows = [problem(seed=seed) for seed in range(3)]
    weights, lut, sensitivity = (np.stack(a).astype(np.float64) for a in zip(*rows, strict=True))

    def score(weights, lut, sensitivity):
        fit = px.soft_kmeans_lut(weights, lut, 1.0, sensitivity=sensitivity)
        return (fit.lut**3).sum() + (fit.values**3).sum(), fit

    with jax.enable_x64(True):
        one = jax.value_and_grad(score, (0, 1, 2), has_aux=True)
        together = jax.jit(jax.vmap(one))(weights, lut, sensitivity)
        one = jax.jit(one)
        alone = [one(*row) for row in zip(weights, lut, sensitivity, strict=True)]
        for got, *want in zip(*(jax.tree.leaves(a) for a in (together, *alone)), strict=True):
            np.testing.assert_allclose(got, np.stack(want), rtol=1e-9, atol=1e-12)


def test_groups_are_rows_one_by_one(monkeypatch):
    """Two at a time, and one that is left."""
    rows = [problem(seed=seed) for seed in range(3)]
    weights, lut, sensitivity = (np.stack(a)[..., None] for a in zip(*rows, strict=True))
    monkeypatch.setattr(soft_module, "BLOCK", 2 * 60 * 4)
    way = soft_module.Way(px.Unrolled())

    @jax.jit
    def fitted(weights, temperature):
        def score(weights):
            fit = soft_module.soft_groups.__wrapped__(weights, lut, temperature, 1e-4, sensitivity, way=way)
            return (fit.values**3).sum(), fit

        return jax.value_and_grad(score, has_aux=True)(weights)

    for temperature in (1.0, 0.0):
        (_, fit), gradient = fitted(weights, temperature)
        for row, (w, start, s) in enumerate(rows):
            slopes = np.zeros(4), 3 * np.asarray(fit.values[row, :, 0]) ** 2
            alone = graded(soft, w, start, temperature, s, slopes=slopes, adjoint=px.Unrolled())
            assert error(fit.lut[row, :, 0], alone["lut"]) < 1e-5
            assert error(fit.values[row, :, 0], alone["values"]) < 1e-5
            assert error(gradient[row, :, 0], alone["by weights"]) < 1e-4


def test_blocks_of_points_add_up(monkeypatch):
    """A few points at a time, the last block not full."""
    given = *PROBLEMS["normal"][:2], 1.0, PROBLEMS["normal"][2]
    whole = graded(soft, *given, adjoint=px.Implicit(), **CONVERGED)
    monkeypatch.setattr(attention_module, "BLOCK", 4 * 17)
    soft_module.soft_row.clear_cache()
    blocks = graded(lambda *a, **how: soft(*a, **how), *given, adjoint=px.Implicit(), **CONVERGED)
    soft_module.soft_row.clear_cache()
    assert_close(blocks, whole, 1e-9)


# --- More than 65,536 weights ---------------------------------------------------------------------------------------

MANY = 131_101
"""A prime, and more than a chunk."""


def many(kind):
    """Weights, the best lut, sensitivities."""
    weights = {
        "few values": lambda: data("grid", MANY) / 20,
        "outlier": lambda: np.append(data("normal", MANY - 1), 1e4),
    }.get(kind, lambda: data(kind, MANY))().astype(np.float32)
    sensitivity = np.random.default_rng(1).random(MANY).astype(np.float32) + np.float32(0.01)
    return weights, np.asarray(px.kmeans_lut(weights, 2).lut), sensitivity


@pytest.mark.parametrize("kind", ["normal", "bimodal", "offset", "few values", "outlier"])
@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_buckets_are_right_to_their_width(kind, temperature):
    """A thousandth of a cell at the widest: gradients are right to about that, lut and values to about its square; or
    to what float32 allows, as for few weights.
    """
    given = many(kind)
    given = *given[:2], np.float32(temperature), given[2]
    want = graded(reference, *given, wide=True, max_steps=4)
    slack = conditioning(*given, want, max_steps=4)
    slack = {name: max(slack[name], 1e-5 if name in ("lut", "values") else 1e-3) for name in want}
    assert_close(graded(soft, *given, adjoint=px.Unrolled(), max_steps=4), want, 0, slack)


def test_buckets_of_half_precision_weights():
    """The values are rounded to float16, and so is their gradient."""
    weights, lut, sensitivity = many("normal")
    given = weights.astype(np.float16), lut, np.float32(1), sensitivity
    want = graded(reference, *given, wide=True, max_steps=4)
    got = graded(soft, *given, adjoint=px.Unrolled(), max_steps=4)
    assert (got["lut"].dtype, got["values"].dtype) == (np.float32, np.float16)
    assert_close(got, want, 1e-3)
    assert error(got["lut"], want["lut"]) < 1e-5


def test_buckets_of_weights_that_count_nothing():
    """What their sensitivity would change if it were not zero."""
    weights, lut, sensitivity = many("normal")
    given = weights, lut, np.float32(1), sensitivity * (weights < 1)
    want = graded(reference, *given, wide=True, max_steps=4)
    assert_close(graded(soft, *given, adjoint=px.Unrolled(), max_steps=4), want, 1e-3)


@pytest.mark.xfail(strict=True, reason="buckets are finest where attention turned before the first step")
def test_buckets_of_a_table_that_moves():
    """A start that is not near, and attention that turns within a few buckets of where the table ends."""
    weights, _, sensitivity = many("normal")
    given = weights, np.array([-2.5, -2, 1.5, 2], np.float32), np.float32(0.01), sensitivity
    want = graded(reference, *given, wide=True, max_steps=4)
    slack = conditioning(*given, want, max_steps=4)
    got = graded(soft, *given, adjoint=px.Unrolled(), max_steps=4)
    assert_close(got, want, 0.03, slack)


def test_buckets_change_nothing_for_implicit(monkeypatch):
    weights, lut, sensitivity = many("normal")
    given = weights, lut, np.float32(1), sensitivity
    found = graded(soft, *given, adjoint=px.Implicit(), max_steps=50)
    monkeypatch.setattr(soft_module, "BUCKETS", MANY)
    soft_module.soft_row.clear_cache()
    want = graded(lambda *a, **how: soft(*a, **how), *given, adjoint=px.Implicit(), max_steps=50)
    soft_module.soft_row.clear_cache()
    assert_close(found, want, 1e-3)


# --- Degenerate weights ---------------------------------------------------------------------------------------------

EVEN = np.array([-1.5, -0.5, 0.5, 1.5], np.float32)
NORMAL, QUANTILES, POSITIVE = problem()
VECTORS = NORMAL.reshape(10, 6)
DEGENERATE = {
    "constant": (np.full(60, 0.3, np.float32), EVEN, POSITIVE),
    "zeros": (np.zeros(60, np.float32), EVEN, POSITIVE),
    "two values": (data("two values", 60).astype(np.float32), EVEN, POSITIVE),
    "as many values as entries": (np.resize(EVEN, 60), EVEN, POSITIVE),
    "repeated entries": (NORMAL, np.array([-1, -1, 1, 1], np.float32), POSITIVE),
    "one entry repeated": (NORMAL, np.zeros(4, np.float32), POSITIVE),
    "remote entries": (NORMAL, np.array([-1e6, -1, 1, 1e6], np.float32), POSITIVE),
    "remote table": (NORMAL, EVEN + np.float32(1e6), POSITIVE),
    "no sensitivity": (NORMAL, EVEN, np.zeros(60, np.float32)),
    "one sensitive weight": (NORMAL, EVEN, np.eye(60, dtype=np.float32)[7]),
    "one entry": (NORMAL, EVEN[:1], POSITIVE),
    "vectors of zeros": (np.zeros((10, 6), np.float32), np.ones((4, 3), np.float32), np.ones((10, 6), np.float32)),
    "vectors without sensitivity": (
        NORMAL.reshape(10, 6),
        np.eye(4, 3, dtype=np.float32),
        np.zeros((10, 6), np.float32),
    ),
}


NEXT_TO_NOTHING = {
    "remote entry": (NORMAL, np.append(QUANTILES[:3], np.float32(4.1)), POSITIVE),
    "constant at an entry": (np.full(60, 0.5, np.float32), EVEN, POSITIVE),
    "one weight": (NORMAL[:1], EVEN, POSITIVE[:1]),
}
"""Entries that attract between 1e-30 and 1e-19 of the weights."""


def assert_sensible(given, temperature, adjoint):
    """All that comes out is finite. Values lie between entries, and entries between weights if they have moved."""
    weights, lut, sensitivity = given
    got = graded(soft, weights, lut, temperature, sensitivity, adjoint=adjoint)
    for name, value in got.items():
        assert np.isfinite(value).all(), name
    entries, values = got["lut"].reshape(lut.shape[0], -1), got["values"]
    slack = 4 * EPS * max(abs(lut).max(), abs(weights).max())
    inside = (weights.min() - slack <= entries) & (entries <= weights.max() + slack)
    assert (inside | (abs(entries - lut.reshape(entries.shape)) <= slack)).all()
    values = values.reshape(-1, entries.shape[1])
    assert (entries.min(axis=0) - slack <= values).all()
    assert (values <= entries.max(axis=0) + slack).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("adjoint", [px.Implicit(), px.Unrolled()])
@pytest.mark.parametrize("case", DEGENERATE)
def test_nothing_degenerate_breaks(case, adjoint, temperature):
    assert_sensible(DEGENERATE[case], temperature, adjoint)


@pytest.mark.parametrize("temperature", [0.0, 1e-4])
@pytest.mark.parametrize("case", sorted({*DEGENERATE, *NEXT_TO_NOTHING}))
def test_nothing_degenerate_breaks_when_it_is_cold(case, temperature):
    """Not unrolled: many steps may amplify a difference of equal entries beyond float32."""
    assert_sensible((DEGENERATE | NEXT_TO_NOTHING)[case], temperature, px.Implicit())


@pytest.mark.parametrize("case", NEXT_TO_NOTHING)
def test_entries_that_attract_next_to_nothing(case):
    assert_sensible(NEXT_TO_NOTHING[case], 1.0, px.Unrolled())


@adjoints
def test_infinite_temperature(adjoint):
    assert_sensible((NORMAL, EVEN, POSITIVE), np.inf, adjoint)


def test_a_group_whose_steps_do_not_contract_has_the_gradient_of_one_step_beside_others_that_do():
    # Powers of its Jacobian overflow in one direction and vanish in the others: NaN beside small numbers.
    expanding, contracting = np.diag([3.0] + [0.1] * 15), np.diag([0.1] * 16)
    found = jax.vmap(_inverse)(jnp.asarray(np.stack([contracting, expanding] * 8), jnp.float32))
    np.testing.assert_allclose(found[0], np.linalg.inv(np.eye(16) - contracting), rtol=1e-5)
    np.testing.assert_array_equal(found[1], np.eye(16))


def test_gradients_of_many_small_groups_stay_finite():
    weights = 0.1 * np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    transform = px.dkm(4, weight_threshold=0, max_steps=3, granularity=px.Granularity(2))
    state = transform.init(weights)

    @jax.jit
    def loss(weights, state):
        values, state = transform.update(weights, state)
        return (values**3).sum(), state

    for _ in range(6):
        (_, state), gradient = jax.value_and_grad(loss, has_aux=True)(weights, state)
        assert np.isfinite(gradient).all()
        weights = weights - 1e-3 * np.sign(gradient)
