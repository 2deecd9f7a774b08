"""What `dkm` and `straight_through` promise beyond the laws of all transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import palettax as px
from palettax.leaf import is_palettized, split_blocks
from tests.leaves import assert_same
from tests.tables import CHOSEN, COLUMNS, DTYPES, KEY, PAIRS, PAIRS_OF_ROWS, ROWS, data, sensitivities

COLD = 1e-5
"""A temperature at which every weight but one on a boundary takes its nearest entry."""


WEIGHTS = data("normal", 80).reshape(8, 10).astype(np.float32)
OTHERS = data("normal", 80, seed=1).reshape(8, 10).astype(np.float32)
MORE = data("normal", 160).reshape(16, 10).astype(np.float32)
VECTORS = {"granularity": PAIRS_OF_ROWS, "key": KEY}  # of `MORE`: to compile their first table takes long


def soft(nbits=2, **options):
    return px.dkm(nbits, weight_threshold=10, **options)


def hard(nbits=2, **options):
    return px.straight_through(nbits, weight_threshold=10, **options)


MAKES = {"dkm": soft, "straight through": hard}
both = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
adjoints = pytest.mark.parametrize(
    "adjoint", [px.Implicit(), px.Unrolled(), px.OneStep()], ids=lambda adjoint: type(adjoint).__name__
)


def tree(weights=WEIGHTS):
    return {"w": jnp.asarray(weights), "bias": jnp.linspace(-1, 1, 10)}


def updated(transform, weights, state=None, sensitivity=None):
    """(values, state) after an update of one leaf, from its own first table unless there is a state."""
    state = transform.init({"w": weights}) if state is None else state
    mass = None if sensitivity is None else {"w": sensitivity}
    values, state = transform.update({"w": weights}, state, sensitivity=mass)
    return np.asarray(values["w"]), state


def stored(transform, weights, state):
    return transform.finalize({"w": weights}, state)["w"].validate()


def pull(transform, weights, state, upstream=OTHERS, sensitivity=None):
    """The gradient of Σ values · upstream."""

    def score(w):
        mass = None if sensitivity is None else {"w": sensitivity}
        return (transform.update({"w": w}, state, sensitivity=mass)[0]["w"] * upstream).sum()

    return np.asarray(jax.grad(score)(jnp.asarray(weights)))


def with_lut(state, lut):
    """The state with another table for its one leaf."""
    (name,) = state.luts
    return state._replace(luts={name: jnp.asarray(lut, state.luts[name].dtype).reshape(state.luts[name].shape)})


def table(state):
    (lut,) = state.luts.values()
    return np.sort(np.asarray(lut).reshape(-1))


def lloyd_step(weights, lut):
    """The means of the cells of a table, in float64."""
    flat = np.float64(weights).reshape(-1)
    near = abs(flat[:, None] - np.float64(lut)).argmin(axis=1)
    return np.array([flat[near == j].mean() if (near == j).any() else lut[j] for j in range(len(lut))])


def cells(weights, lut):
    return abs(np.float64(weights)[..., None] - np.float64(lut)).argmin(axis=-1)


# What an update gives


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(soft, "float16"), (hard, "float32"), (soft, "float64")],
    ids=["dkm float16", "straight through float32", "dkm float64"],
)  # fmt: skip
def test_structure_shapes_and_dtypes_stay(make, dtype):
    weights = WEIGHTS.astype(DTYPES[dtype])
    params = {
        "block": [weights, weights.reshape(2, 2, 4, 5)],
        "flat": weights.reshape(-1),
        "bias": weights[0],
        "steps": np.arange(3),
        "scale": np.float32(2),
        "name": "conv",
        "none": None,
    }
    transform = make()
    state = transform.init(params)
    values, after = transform.update(params, state)
    assert jax.tree.structure(values) == jax.tree.structure(params)
    assert set(state.luts) == {"block/0", "block/1", "flat"}
    for before, now in zip(jax.tree.leaves(params), jax.tree.leaves(values), strict=True):
        if getattr(before, "size", 0) > 10:
            assert (now.shape, now.dtype) == (before.shape, before.dtype)
        else:
            assert now is before
    form = jax.tree.map(lambda a: (type(a), a.shape, a.dtype), state)
    assert jax.tree.map(lambda a: (type(a), a.shape, a.dtype), after) == form
    for lut in state.luts.values():
        assert lut.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert int(after.count) == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_colder_the_nearer_to_what_is_stored(dtype):
    weights = jnp.asarray(WEIGHTS, dtype)
    state = soft().init({"w": weights})
    distances = []
    for temperature in (3.0, 0.3, COLD):
        transform = soft(temperature=temperature)
        values, _ = updated(transform, weights, state)
        dense = np.float64(stored(transform, weights, state).depalettize())
        distances.append(abs(np.float64(values) - dense))
    assert distances[0].mean() > distances[1].mean() > 0.001
    assert distances[2].max() <= 4 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["normal", "grid", "bimodal"])
def test_at_zero_values_are_what_is_stored(kind):
    weights, moved = (data(kind, 80, seed).astype(np.float32).reshape(8, 10) for seed in (0, 1))
    transform = soft(temperature=0.0)
    state = transform.init({"w": weights})
    values, _ = updated(transform, moved, state)
    np.testing.assert_allclose(values, stored(transform, moved, state).depalettize(), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 0.0])
@adjoints
def test_in_the_cold_a_cell_moves_as_one(adjoint, temperature):
    """Σ values · upstream moves by the mean of upstream over the cell."""
    transform = soft(temperature=temperature, adjoint=adjoint)
    state = transform.init({"w": WEIGHTS})
    near = cells(WEIGHTS, table(state))
    gradient = pull(transform, WEIGHTS, state)
    for j in range(4):
        np.testing.assert_allclose(gradient[near == j], OTHERS[near == j].mean(), rtol=1e-4, atol=1e-5)


def test_the_gradient_passes_straight_through():
    transform = hard()
    state = transform.init(tree())
    np.testing.assert_array_equal(pull(transform, WEIGHTS, updated(transform, OTHERS)[1]), OTHERS)
    tangent = {"w": jnp.asarray(OTHERS), "bias": jnp.ones(10)}
    _, moved = jax.jvp(lambda p: transform.update(p, state)[0], (tree(),), (tangent,))
    np.testing.assert_array_equal(moved["w"], OTHERS)


@pytest.mark.parametrize("nbits", [1, 2, 3])
@both
def test_what_is_stored_has_exactly_as_many_values_as_entries(make, nbits):
    transform = make(nbits)
    _, state = updated(transform, WEIGHTS)
    small = stored(transform, WEIGHTS, state)
    assert small.nbits == nbits
    assert len(np.unique(small.depalettize())) == 2**nbits
    assert (np.diff(np.asarray(small.lut).reshape(-1)) > 0).all()
    entries = np.asarray(small.lut).reshape(-1)
    np.testing.assert_array_equal(abs(WEIGHTS - small.depalettize()), abs(WEIGHTS[..., None] - entries).min(axis=-1))


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_straight_through_gives_what_it_stores_while_weights_move(wrapper):
    transform = hard()
    params, state = tree(), transform.init(tree())
    update = wrapper(transform.update)
    for step in range(3):
        params = params | {"w": params["w"] + 0.1 * OTHERS * step}
        values, new = update(params, state)
        small = transform.finalize(params, state)
        small["w"].validate()
        np.testing.assert_array_equal(values["w"], small["w"].depalettize())
        assert small["bias"] is params["bias"]
        state = new


# The table


@pytest.mark.parametrize(
    ("granularity", "dtype"),
    [(px.Granularity(), "bfloat16"), (ROWS, "float32"), (PAIRS_OF_ROWS, "float32")], ids=["bfloat16", "rows", "pairs"],
)  # fmt: skip
def test_the_first_table_is_that_of_kmeans(granularity, dtype):
    params = {"w": jnp.asarray(MORE, dtype)}
    options = {"granularity": granularity, "key": KEY}
    lut = px.kmeans(2, **options).finalize(params, ())["w"].lut
    for make in MAKES.values():
        state = make(**options).init(params)
        assert state.luts["w"].shape == lut.shape
        np.testing.assert_array_equal(state.luts["w"].astype(dtype), lut)
        assert int(state.count) == 0


@pytest.mark.parametrize("make", [lambda: soft(temperature=COLD, max_steps=1), hard], ids=MAKES)
def test_a_table_starts_where_the_last_one_stopped(make):
    """Every update is one of Lloyd's steps from the table of the update before."""
    transform = make()
    state = transform.init({"w": WEIGHTS})
    for step in range(1, 4):
        weights = (WEIGHTS + 0.2 * step * OTHERS).astype(np.float32)
        expected = lloyd_step(weights, table(state))
        _, state = updated(transform, weights, state)
        np.testing.assert_allclose(table(state), expected, rtol=1e-4, atol=1e-5)
    best = np.asarray(px.kmeans_lut(weights, 2).lut)
    assert abs(table(state) - best).max() > 1e-3  # it has not started anew


@both
def test_an_update_depends_on_the_state(make):
    transform = make()
    _, moved = updated(transform, OTHERS)
    (one, _), (other, _) = updated(transform, WEIGHTS), updated(transform, WEIGHTS, moved)
    assert (one != other).any()


def entries_of_use(state, weights):
    """How many entries have a weight that is nearest to them."""
    return len(np.unique(cells(weights, table(state))))


silent = pytest.mark.parametrize(
    "start", [np.zeros(8), np.full(8, 0.3), np.r_[-1.0, np.full(7, 50.0)], np.r_[np.zeros(7), 1e6]],
    ids=["zeros", "equal", "far", "one far"],
)  # fmt: skip


@silent
@both
def test_entries_that_say_nothing_are_put_to_use(make, start):
    transform = make(3)
    state = with_lut(transform.init({"w": WEIGHTS}), start)
    for _ in range(4):
        _, state = updated(transform, WEIGHTS, state)
    assert len(np.unique(table(state))) == 8
    assert len(np.unique(cells(WEIGHTS, table(state)))) == 8


@silent
@adjoints
def test_entries_that_say_nothing_leave_the_gradient_finite(adjoint, start):
    transform = soft(3, adjoint=adjoint)
    gradient = pull(transform, WEIGHTS, with_lut(transform.init({"w": WEIGHTS}), start))
    assert np.isfinite(gradient).all()
    assert gradient.any()


@settings(max_examples=10)
@given(st.integers(0, 99), st.floats(0.05, 5), st.floats(-6, 4), st.floats(-2, 2))
def test_shifted_scaled_and_permuted_weights_have_such_values(seed, temperature, decades, shift):
    transform = soft(temperature=temperature)
    weights = data("normal", 80, seed).astype(np.float32)
    values, state = updated(transform, weights.reshape(8, 10))
    order = np.random.default_rng(seed).permutation(80)
    scale = 10.0**decades
    moved = ((weights[order] + shift) * scale).astype(np.float32).reshape(8, 10)
    found, after = updated(transform, moved)
    np.testing.assert_allclose(table(after) / scale - shift, table(state), atol=2e-3)
    np.testing.assert_allclose(found.reshape(-1) / scale - shift, values.reshape(-1)[order], atol=2e-3)


# Groups and vectors


@pytest.mark.parametrize(
    ("granularity", "shape", "name"),
    [(ROWS, (16, 10), "w"), (COLUMNS, (8, 20), "w"), (CHOSEN, (16, 10), "weight"),
     (px.Granularity(group_size=5, channel_axis=None), (8, 20), "kernel"),
     (px.Granularity(group_size=(8, 5), channel_axis=(0, -1)), (16, 10), "w"),
     (px.Granularity(group_size=1), (4, 2, 4, 5), "w"), (px.Granularity(group_size=40), (160,), "w"),
     (PAIRS_OF_ROWS, (16, 10), "w")],
    ids=["rows", "columns", "weight", "kernel", "blocks", "rank 4", "rank 1", "pairs"],
)  # fmt: skip
def test_groups_are_a_loop_over_groups(granularity, shape, name):
    """Tables, values and gradients."""
    n = int(np.prod(shape))
    weights, upstream = (jnp.asarray(data("normal", n, seed).reshape(shape), jnp.float32) for seed in (2, 3))
    # Vectors take long to compile.
    adjoint = px.Implicit() if granularity.vector_size == 1 else px.OneStep()
    transform = soft(granularity=granularity, key=KEY, temperature=0.5, adjoint=adjoint)
    state = transform.init({name: weights})
    values, after = transform.update({name: weights}, state)
    gradient = jax.grad(lambda w: (transform.update({name: w}, state)[0][name] * upstream).sum())(weights)

    groups = granularity.groups(shape, name)
    vectors = granularity.vector_axis_of(shape, name), granularity.vector_size
    assert after.luts[name].shape == state.luts[name].shape == (*groups, 4, granularity.vector_size)
    assert np.prod(groups) == 4
    rows = [split_blocks(np.asarray(a), groups, *vectors) for a in (weights, upstream, values[name], gradient)]
    luts = [np.asarray(s.luts[name]).reshape(-1, 4, vectors[1]) for s in (state, after)]
    for row, slope, found, moved, lut, new in zip(*rows, *luts, strict=True):
        row, lut = jnp.asarray(row), jnp.asarray(lut if vectors[1] > 1 else lut[:, 0])

        def fit(w, lut=lut):
            return px.soft_kmeans_lut(w, lut, 0.5, max_steps=10, tol=1e-3, adjoint=adjoint)

        own = np.asarray(fit(row).lut).reshape(new.shape)
        new, own = (a[np.lexsort(a.T[::-1])] for a in (new, own))
        np.testing.assert_allclose(new, own, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found, fit(row).values, rtol=1e-5, atol=1e-6)
        expected = jax.grad(lambda w, fit=fit, slope=slope: (fit(w).values * slope).sum())(row)
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5 * abs(moved).max())


@both
def test_vectors_are_stored_by_the_nearest(make):
    transform = make(**VECTORS)
    _, state = updated(transform, MORE)
    small = stored(transform, MORE, state)
    pairs, dense = (np.asarray(a).reshape(4, 2, 2, 10).swapaxes(2, 3) for a in (MORE, small.depalettize()))
    entries = np.asarray(small.lut).reshape(4, 1, 1, 4, 2)
    nearest = np.square(pairs[..., None, :] - entries).sum(axis=-1).min(axis=-1)
    np.testing.assert_allclose(np.square(pairs - dense).sum(axis=-1), nearest, rtol=1e-5)
    for group in dense.reshape(4, 20, 2).tolist():
        assert len(set(map(tuple, group))) == 4


# Which leaves


@both
def test_leaves_of_at_most_the_threshold_stay_dense(make):
    function = {soft: px.dkm, hard: px.straight_through}[make]
    params = {"w": jnp.asarray(WEIGHTS), "few": jnp.asarray(WEIGHTS[0])}
    for threshold, names in ((80, set()), (79, {"w"})):
        transform = function(2, weight_threshold=threshold)
        state = transform.init(params)
        assert set(state.luts) == set(state.skipped) == names
        values, _ = transform.update(params, state)
        small = transform.finalize(params, state)
        for name, leaf in params.items():
            assert is_palettized(small[name]) == (name in names)
            assert (small[name] is leaf) == (values[name] is leaf) == (name not in names)


@both
def test_the_threshold_is_2048_unless_said_otherwise(make):
    transform = {soft: px.dkm, hard: px.straight_through}[make](1)
    state = transform.init({"a": np.zeros(2048, np.float32), "b": np.zeros(2049, np.float32)})
    assert set(state.luts) == {"b"}


@both
def test_what_a_large_leaf_must_be(make):
    transform, state = make(), make().init(tree())
    for dtype in ("int64", "bool", "complex64"):
        params = {"a": {"ids": np.ones((8, 10), dtype)}}
        message = rf"leaf 'a/ids' \(8, 10\) {dtype}: weights are {dtype}"
        for call in (transform.init, lambda p: transform.update(p, state), lambda p: transform.finalize(p, state)):
            with pytest.raises(ValueError, match=message):
                call(params)


@both
def test_a_leaf_smaller_than_its_table(make):
    weights = np.array([[-1.0, 0.5, 2.0]], np.float32)
    transform = {soft: px.dkm, hard: px.straight_through}[make](3, weight_threshold=0)
    values, state = updated(transform, weights)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(stored(transform, weights, state).depalettize(), weights, rtol=1e-6)
    assert np.isfinite(pull(transform, weights, state, np.ones_like(weights))).all()


FEW = {
    "zeros": np.zeros(80),
    "constant": np.full(80, 0.1),
    "two values": data("two values", 80),
    "three values": data("grid", 80) % 3 - 0.7,
    "large constant": np.full(80, -3e20),
    "one other": np.r_[np.full(79, 2.0), 5.0],
}


@pytest.mark.parametrize("nbits", [1, 2])
@pytest.mark.parametrize("kind", FEW)
@both
def test_few_distinct_values(make, kind, nbits):
    weights = FEW[kind].reshape(8, 10).astype(np.float32)
    transform = make(nbits)
    state = transform.init({"w": weights})
    for _ in range(3):
        values, state = updated(transform, weights, state)
    assert np.isfinite(values).all()
    assert np.isfinite(table(state)).all()
    assert np.isfinite(pull(transform, weights, state)).all()
    if len(np.unique(weights)) <= 2**nbits:
        np.testing.assert_allclose(stored(transform, weights, state).depalettize(), weights, rtol=1e-6)
    if len(np.unique(weights)) == 1:
        np.testing.assert_allclose(values, weights, rtol=1e-6)


# Milestone


@pytest.mark.parametrize("make", [lambda **o: soft(temperature=COLD, max_steps=1, **o), hard], ids=MAKES)
def test_tables_are_made_at_the_milestone(make):
    transform, traces = make(milestone=2), []
    state = first = transform.init({"w": WEIGHTS})

    @jax.jit
    def train(weights, state):
        traces.append(1)

        def score(w):
            values, new = transform.update({"w": w}, state)
            return (values["w"] * OTHERS).sum(), (values["w"], new)

        gradient, (values, new) = jax.grad(score, has_aux=True)(weights)
        return gradient, values, new

    for step in range(5):
        weights = (WEIGHTS + 0.3 * step * OTHERS).astype(np.float32)
        best = px.kmeans(2).finalize(weights, ())
        small = stored(transform, weights, state)
        gradient, values, state = train(weights, state)
        assert int(state.count) == step + 1
        if step <= 2:
            np.testing.assert_allclose(small.depalettize(), best.depalettize(), rtol=1e-4)
        if step < 2:
            np.testing.assert_array_equal(values, weights)
            np.testing.assert_array_equal(gradient, OTHERS)
            assert_same(np.asarray(state.luts["w"]), np.asarray(first.luts["w"]))
        elif step == 2:
            np.testing.assert_allclose(table(state), np.asarray(best.lut).reshape(-1), rtol=1e-4)
            np.testing.assert_allclose(values, best.depalettize(), rtol=1e-4)
        else:
            assert abs(table(state) - np.asarray(best.lut).reshape(-1)).max() > 1e-3  # it follows, and is not made anew
    assert len(traces) == 1


# Temperature


def test_a_schedule_gives_the_temperature_of_every_update():
    schedule = optax.linear_schedule(4.0, 1.0, 3)
    transform, also = soft(temperature=schedule), soft(temperature=lambda count: 4.0 - jnp.minimum(count, 3))
    state = transform.init({"w": WEIGHTS})
    for step in range(5):
        fixed, _ = updated(soft(temperature=4.0 - min(step, 3)), WEIGHTS, state)
        np.testing.assert_allclose(updated(also, WEIGHTS, state)[0], fixed, rtol=1e-6)
        values, state = updated(transform, WEIGHTS, state)
        np.testing.assert_allclose(values, fixed, rtol=1e-6)


def test_annealed_to_zero_values_are_what_is_stored():
    transform = soft(temperature=optax.linear_schedule(2.0, 0.0, 3))
    state = transform.init({"w": WEIGHTS})
    for _ in range(4):
        dense = stored(transform, WEIGHTS, state).depalettize()
        values, state = updated(transform, WEIGHTS, state)
    np.testing.assert_allclose(values, dense, rtol=1e-5)


def test_a_temperature_may_be_traced():
    state = soft().init({"w": WEIGHTS})
    update = jax.jit(lambda temperature: soft(temperature=temperature).update({"w": WEIGHTS}, state)[0]["w"])
    for temperature in (0.2, 2.0):
        fixed, _ = updated(soft(temperature=temperature), WEIGHTS, state)
        np.testing.assert_allclose(update(temperature), fixed, rtol=1e-5, atol=1e-6)
        found, _ = updated(soft(temperature=jnp.float32(temperature)), WEIGHTS, state)
        np.testing.assert_allclose(found, fixed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_an_absolute_temperature_is_in_squared_weights(scale):
    weights = (WEIGHTS * scale).astype(np.float32)
    state = soft().init({"w": weights})
    absolute = 0.5 * np.float64(weights).var() * 4.0**-2
    one, _ = updated(soft(temperature=0.5), weights, state)
    other, _ = updated(soft(temperature=absolute, relative=False), weights, state)
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * scale)


# Sensitivity


@pytest.mark.parametrize("make", [lambda: soft(temperature=0.7), hard], ids=MAKES)
def test_an_integer_sensitivity_is_as_many_weights(make):
    transform = make()
    weights = WEIGHTS.reshape(-1)[:40]
    times = np.resize([1, 3, 0, 2, 4], 40)
    repeated = np.repeat(weights, times)
    state = transform.init({"w": weights})
    state = with_lut(state, table(state) + 0.1)
    values, one = updated(transform, weights, state, times.astype(np.float32))
    expected, other = updated(transform, repeated, state)
    np.testing.assert_allclose(table(one), table(other), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.repeat(values, times), expected, rtol=1e-5, atol=1e-6)


@both
def test_weights_without_sensitivity_have_no_say(make):
    transform = make()
    sensitivity = np.resize([1.0, 0.0], (8, 10)).astype(np.float32)
    others = np.where(sensitivity > 0, WEIGHTS, -WEIGHTS.clip(-1, 1)).astype(np.float32)
    state = transform.init({"w": WEIGHTS})
    tables = [table(updated(transform, w, state, sensitivity)[1]) for w in (WEIGHTS, others)]
    np.testing.assert_allclose(*tables, rtol=1e-6)
    uniform = table(updated(transform, WEIGHTS, state)[1])
    assert abs(tables[0] - uniform).max() > 1e-3


@both
def test_only_ratios_of_sensitivities_count(make):
    transform, mass = make(), sensitivities(80).reshape(8, 10).astype(np.float32)
    state = transform.init({"w": WEIGHTS})
    for scale in (1e-6, 1e6):
        found = updated(transform, WEIGHTS, state, mass * np.float32(scale))
        np.testing.assert_allclose(found[0], updated(transform, WEIGHTS, state, mass)[0], rtol=1e-4, atol=1e-5)
    found = updated(transform, WEIGHTS, state, np.zeros((8, 10), np.float32))
    np.testing.assert_allclose(found[0], updated(transform, WEIGHTS, state)[0], rtol=1e-5, atol=1e-6)


# Narrow tables


HALVES = ("float16", "bfloat16")
LEVELS = ("int8", "uint8", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("lut_dtype", [*HALVES, *LEVELS])
def test_narrow_tables_are_trained_as_they_are_stored(lut_dtype):
    transform = soft(temperature=COLD, lut_dtype=lut_dtype)
    _, state = updated(transform, OTHERS)
    values, after = updated(transform, WEIGHTS, state)
    small = stored(transform, WEIGHTS, state)
    np.testing.assert_allclose(values, small.depalettize(), rtol=1e-6, atol=1e-6)
    assert after.luts["w"].dtype == np.float32  # the table itself stays wide, so that it can move by little
    assert (np.float32(jnp.asarray(table(after), lut_dtype)) != table(after)).any()
    lut = np.asarray(small.lut)
    if lut_dtype in HALVES:
        assert small.scale is None
        assert lut.dtype == np.float32
        np.testing.assert_array_equal(np.float32(jnp.asarray(lut, lut_dtype)), lut)
    else:
        assert str(lut.dtype) == lut_dtype
        assert small.scale.shape == (1, 1)
        # The largest entry is the largest level.
        largest = {"int8": 127, "uint8": 127}.get(lut_dtype) or float(jnp.finfo(lut_dtype).max)
        assert abs(np.float32(lut) - (128 if lut_dtype == "uint8" else 0)).max() == largest
        np.testing.assert_allclose(small.scale * largest, abs(table(after)).max(), rtol=1e-6)


@pytest.mark.parametrize("lut_dtype", ["float16", "int8"])
def test_the_gradient_of_a_narrow_table_is_that_of_a_wide_one(lut_dtype):
    """Rounding passes it on: what is left is that values soft in a rounded table are others."""
    state = soft().init({"w": WEIGHTS})
    wide, narrow = (pull(soft(lut_dtype=d), WEIGHTS, state) for d in (None, lut_dtype))
    assert abs(wide).max() > 0.1
    np.testing.assert_allclose(narrow, wide, atol=0.05 * abs(wide).max())


def test_half_precision_weights_with_levels():
    weights = jnp.asarray(WEIGHTS, jnp.float16)
    transform = hard(lut_dtype="int8", granularity=ROWS)
    values, state = updated(transform, weights)
    small = stored(transform, weights, transform.init({"w": weights}))
    assert (small.dtype, small.scale.dtype, values.dtype) == (np.float16,) * 3
    np.testing.assert_array_equal(values, small.depalettize())
    levels = np.float64(small.lut).reshape(-1, 4)
    assert (abs(levels).max(axis=1) == 127).all()
    step = np.float64(small.scale).reshape(-1, 1)
    assert (abs(levels * step - np.sort(np.asarray(state.luts["w"]).reshape(-1, 4))) <= 0.55 * step).all()


# What arrives mid-training


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
@both
def test_a_leaf_that_is_not_finite_passes_through_and_comes_back(make, worst):
    transform = make()
    good = {"a": {"w": jnp.asarray(WEIGHTS)}, "b": jnp.asarray(OTHERS)}
    bad = {"a": {"w": good["a"]["w"].at[3, 4].set(worst)}, "b": good["b"]}
    _, state = transform.update(good, transform.init(good))
    alone = updated(transform, OTHERS, None)[1]

    (values, after), back = jax.vjp(lambda p: transform.update(p, state), bad)
    np.testing.assert_array_equal(values["a"]["w"], bad["a"]["w"])
    assert_same(np.asarray(after.luts["a/w"]), np.asarray(state.luts["a/w"]))
    assert {name: int(n) for name, n in after.skipped.items()} == {"a/w": 1, "b": 0}
    np.testing.assert_array_equal(values["b"], updated(transform, OTHERS, alone)[0])
    ones = jax.tree.map(lambda a: jnp.ones_like(a) if a.dtype == jnp.float32 else np.zeros(a.shape, jax.dtypes.float0),
                        (values, after._replace(luts=jax.tree.map(jnp.zeros_like, after.luts))))  # fmt: skip
    ones[1].luts.update(jax.tree.map(jnp.zeros_like, after.luts))
    (gradient,) = back(ones)
    np.testing.assert_array_equal(gradient["a"]["w"], 1)
    assert np.isfinite(gradient["b"]).all()

    _, after = transform.update(bad, after)
    assert int(after.skipped["a/w"]) == 2
    count = "1 NaN and 0 infinite" if np.isnan(worst) else "0 NaN and 1 infinite"
    with pytest.raises(ValueError, match=rf"leaf 'a/w' \(8, 10\) float32: {count} of 80"):
        transform.finalize(bad, after)
    with pytest.raises(ValueError, match=rf"leaf 'a/w' \(8, 10\) float32: {count} of 80"):
        transform.init(bad)

    values, again = transform.update(good, after)
    expected, _ = transform.update(good, state)
    np.testing.assert_array_equal(values["a"]["w"], expected["a"]["w"])
    assert int(again.skipped["a/w"]) == 2
    transform.finalize(good, again)["a"]["w"].validate()


@pytest.mark.parametrize("wrong", [np.nan, -1.0])
def test_a_schedule_that_gives_no_temperature_skips_all(wrong):
    transform = px.dkm(2, temperature=lambda count: jnp.where(count < 1, 1.0, wrong), weight_threshold=0)
    params = {"w": jnp.asarray(WEIGHTS)}
    values, state = transform.update(params, transform.init(params))
    assert (values["w"] != params["w"]).any()
    values, after = jax.jit(transform.update)(params, state)
    np.testing.assert_array_equal(values["w"], params["w"])
    np.testing.assert_array_equal(after.luts["w"], state.luts["w"])
    assert int(after.skipped["w"]) == 1


# Ties


@both
def test_tied_leaves_have_one_table_under_every_name(make):
    shared = jnp.asarray(WEIGHTS)
    params = {"embed": shared, "head": {"kernel": shared}}
    transform = make()
    state = transform.init(params)
    assert set(state.luts) == {"embed", "head/kernel"}
    values, after = transform.update(params, state)
    assert values["embed"] is values["head"]["kernel"]
    alone, own = updated(transform, WEIGHTS)
    np.testing.assert_array_equal(values["embed"], alone)
    compiled, new = jax.jit(transform.update)(params, state)
    for name in ("embed", "head/kernel"):
        np.testing.assert_array_equal(after.luts[name], own.luts["w"])
        np.testing.assert_allclose(new.luts[name], own.luts["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(compiled["embed"], compiled["head"]["kernel"])
    assert jax.tree.structure(new) == jax.tree.structure(jax.jit(transform.init)(params)) == jax.tree.structure(state)
    small = transform.finalize(params, new)
    assert small["embed"] is small["head"]["kernel"]


# What is refused


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [({"nbits": 5}, r"nbits=5; an index has one of \(1, 2, 3, 4, 6, 8\)"),
     ({"nbits": True}, "nbits=True"),
     ({"nbits": 2.0}, "nbits=2.0"),
     ({"granularity": 16}, "granularity=16; give a Granularity"),
     ({"granularity": PAIRS}, "vector_size=2 without a key"),
     ({"milestone": -1}, "milestone=-1; it must be an integer ≥ 0"),
     ({"milestone": 1.5}, "milestone=1.5"),
     ({"weight_threshold": -1}, "weight_threshold=-1"),
     ({"weight_threshold": None}, "weight_threshold=None"),
     ({"lut_dtype": "int4"}, "int4.*choose"),
     ({"lut_dtype": "float32"}, "float32.*choose"),
     ({"max_steps": 0}, "max_steps=0; it must be a positive integer"),
     ({"max_steps": 2.5}, "max_steps=2.5")],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_arguments_that_there_are_not(make, options, message):
    function = {soft: px.dkm, hard: px.straight_through}[make]
    with pytest.raises(ValueError, match=message):
        function(**{"nbits": 2} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1}, "temperature=-1; it must be .*≥ 0"),
     ({"temperature": float("nan")}, "temperature=nan; it must be .*≥ 0"),
     ({"temperature": jnp.float32(-0.5)}, "temperature=-0.5"),
     ({"tol": -1.0}, "tol=-1.0; it must be one number ≥ 0"),
     ({"tol": "1e-3"}, "tol=1e-3; it must be one number ≥ 0"),
     ({"adjoint": "implicit"}, r"adjoint='implicit'; give Implicit\(\), Unrolled\(\) or OneStep\(\)"),
     ({"adjoint": px.Implicit}, "give Implicit")],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_arguments_of_dkm_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        px.dkm(2, **options)


@both
def test_states_and_granularities_that_do_not_fit_name_the_leaf(make):
    transform = make()
    state = transform.init(tree())
    for call in (transform.update, transform.finalize):
        with pytest.raises(ValueError, match=r"leaf 'v' \(8, 10\) float32: the state has no table for it, only .*'w'"):
            call({"v": jnp.asarray(WEIGHTS)}, state)
    for granularity in (px.Granularity(group_size=3), px.Granularity(group_size=2, channel_axis=2)):
        with pytest.raises(ValueError, match=r"leaf 'w' \(8, 10\) float32: "):
            make(granularity=granularity).init(tree())
    for mass in (np.ones((10, 8), np.float32), -np.ones((8, 10), np.float32), np.full((8, 10), np.nan, np.float32)):
        with pytest.raises(ValueError, match=r"leaf 'w' \(8, 10\) float32: sensitivity"):
            transform.update({"w": jnp.asarray(WEIGHTS)}, state, sensitivity={"w": mass})


# Eager calls


compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **kwargs: compilations.append(event) if "backend_compile" in event else None
)


@pytest.mark.parametrize(
    ("call", "options"),
    [("finalize", {}), ("gradient", {}), ("update", {"temperature": optax.linear_schedule(1.0, 0.1, 9)}),
     ("update", {"milestone": 3}),
     ("finalize", VECTORS)],
    ids=["finalize", "gradient", "schedule", "milestone", "pairs"],
)  # fmt: skip
def test_a_second_call_compiles_nothing(call, options):
    transform, weights = soft(**options), MORE if options is VECTORS else WEIGHTS
    state = transform.init({"w": weights})

    def run():
        if call == "gradient":
            return pull(transform, weights, state)
        return getattr(transform, call)({"w": jnp.asarray(weights)}, state)

    run()
    del compilations[:]
    run()
    assert not compilations


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("levels", [(-7, 7), (-2, 15), (0, 15), (-128, 0)])
def test_tables_use_the_levels_that_they_may(dtype, levels):
    weights = {"w": data("normal", 256).reshape(16, 16).astype(np.float32)}
    transform = px.dkm(3, weight_threshold=0, lut_dtype=dtype, levels=levels)
    state = transform.init(weights)
    values, state = transform.update(weights, state)
    small = transform.finalize(weights, state)["w"]
    found = np.asarray(small.lut).astype(int).ravel() - (128 if dtype == "uint8" else 0)
    assert levels[0] <= found.min()
    assert found.max() <= levels[1]
    assert found.min() == levels[0] or found.max() == levels[1]  # the step is no larger than it has to be
    assert np.isfinite(values["w"]).all()


@pytest.mark.parametrize("granularity", [px.Granularity(), px.Granularity(4)])
def test_every_table_has_an_entry_that_is_zero_where_that_is_asked_for(granularity):
    weights = {"w": 3 + data("normal", 256).reshape(16, 16).astype(np.float32)}
    transform = px.dkm(2, weight_threshold=0, zero_entry=True, granularity=granularity)
    small = transform.finalize(weights, transform.init(weights))["w"]
    assert (small.lut == 0).any(axis=-2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (-7, 7)}, "only int8 and uint8 have integer levels"),
        ({"levels": (1, 7), "lut_dtype": "int8"}, "give the lowest, -128 to 0"),
        ({"levels": (-7, 300), "lut_dtype": "int8"}, "and the highest, 0 to 127"),
        ({"levels": (0, 0), "lut_dtype": "int8"}, "give the lowest"),
        ({"zero_entry": True, "granularity": px.Granularity(vector_size=2), "key": jax.random.key(0)}, "use scalars"),
    ],
)
def test_levels_and_zeros_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        px.dkm(2, **options)


@pytest.mark.parametrize("name", ["update", "finalize"])
@pytest.mark.usefixtures("unchecked")
def test_a_state_of_another_kind_is_refused(name):
    with pytest.raises(ValueError, match=r"the state is a dict; give \(params, state\)"):
        getattr(soft(), name)({"w": WEIGHTS}, {"w": WEIGHTS})
