"""`dkm` inside the transforms around transforms: they train, and store what they trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
from palettax.leaf import is_palettized
from tests.tables import data

COLD = 1e-5
"""A temperature at which every weight but one on a boundary takes its nearest entry."""

DENSE = data("normal", 80).reshape(8, 10).astype(np.float32)
PRUNED = np.where(abs(DENSE) > 0.3, DENSE, 0).astype(np.float32)
TARGET = data("normal", 80, seed=1).reshape(8, 10).astype(np.float32)
SEEN = np.arange(80).reshape(8, 10) % 3 > 0


def soft(nbits=2, **options):
    return px.dkm(nbits, weight_threshold=10, **options)


def sparse(inner):
    return px.keep_zeros(inner, sparse=True)


def int8(inner):
    return px.quantize_lut(inner, "int8")


def elements(inner):
    return px.masked(inner, {"w": SEEN, "bias": False})


WRAPPERS = {
    "zeros": px.keep_zeros,
    "sparse": sparse,
    "scales": px.with_channel_scale,
    "int8": int8,
    "elements": elements,
    "by_path": lambda inner: px.by_path([("w", inner)]),
    "partition": lambda inner: px.partition({"yes": inner, "no": px.identity()}, {"w": "yes", "bias": "no"}),
    "chain": lambda inner: px.chain(inner, px.identity()),
    "zeros of scales": lambda inner: px.keep_zeros(px.with_channel_scale(inner)),
    "scales of zeros": lambda inner: px.with_channel_scale(px.keep_zeros(inner)),
    "sparse of scales": lambda inner: sparse(px.with_channel_scale(inner)),
    "scales of sparse": lambda inner: px.with_channel_scale(sparse(inner)),
    "int8 of zeros": lambda inner: int8(px.keep_zeros(inner)),
    "zeros of int8": lambda inner: px.keep_zeros(int8(inner)),
    "int8 of sparse": lambda inner: int8(sparse(inner)),
    "sparse of int8": lambda inner: sparse(int8(inner)),
    "int8 of scales": lambda inner: int8(px.with_channel_scale(inner)),
    "scales of int8": lambda inner: px.with_channel_scale(int8(inner)),
    "elements of zeros": lambda inner: elements(px.keep_zeros(inner)),
    "zeros of elements": lambda inner: px.keep_zeros(elements(inner)),
    "elements of scales": lambda inner: elements(px.with_channel_scale(inner)),
    "scales of elements": lambda inner: px.with_channel_scale(elements(inner)),
    "int8 of elements": lambda inner: int8(elements(inner)),
    "by_path of zeros of scales": lambda inner: px.by_path([("w", px.keep_zeros(px.with_channel_scale(inner)))]),
}
KEEPING = [name for name in WRAPPERS if "zeros" in name or "sparse" in name]


def rows(*names):
    """Parametrizes over wrappers, of some names or all."""
    return pytest.mark.parametrize("name", names or WRAPPERS)


def tree(weights=PRUNED):
    return {"w": jnp.asarray(weights), "bias": jnp.linspace(-1, 1, 10)}


def tables(state):
    """The states of all `dkm`s inside."""
    found = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, px.DkmState))
    return [s for s in found if isinstance(s, px.DkmState)]


def descend(transform, params, state, steps=1):
    """Steps of gradient descent towards `TARGET`: params, state, and the last values and gradient."""
    for _ in range(steps):

        def loss(params, state=state):
            values, new = transform.update(params, state)
            return 0.5 * ((values["w"] - TARGET) ** 2).sum(), (values, new)

        gradient, (values, state) = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda w, g: w - 0.02 * g, params, gradient)
    return params, state, values, gradient


@rows()
def test_training_moves_weights_and_tables(name):
    transform = WRAPPERS[name](soft())
    params, state = tree(), transform.init(tree())
    _, last, values, gradient = descend(transform, params, state, steps=3)
    assert jax.tree.structure(last) == jax.tree.structure(state)
    for before, now in zip(tables(state), tables(last), strict=True):
        assert int(now.count) == 3
        assert set(now.luts) == {"w"}
        assert (now.luts["w"] != before.luts["w"]).any()
    assert (values["w"].shape, values["w"].dtype) == (DENSE.shape, np.float32)
    np.testing.assert_array_equal(values["bias"], params["bias"])
    assert np.isfinite(values["w"]).all()
    assert np.isfinite(gradient["w"]).all()
    assert (np.asarray(gradient["w"])[(PRUNED != 0) & SEEN] != 0).all()
    assert not gradient["bias"].any()


@rows()
def test_in_the_cold_values_are_what_is_stored(name):
    """After some training, with the state it left."""
    params, state, _, _ = descend(WRAPPERS[name](soft()), tree(), WRAPPERS[name](soft()).init(tree()), steps=2)
    transform = WRAPPERS[name](soft(temperature=COLD))
    params["w"] = jnp.where(PRUNED == 0, 0, params["w"])
    small = transform.finalize(params, state)
    values, _ = transform.update(params, state)
    dense = np.asarray(small["w"].validate().depalettize())
    if "int8" in name:  # chosen anew, the best of all levels; then one is set to zero
        errors = [np.square(w - params["w"]).sum() for w in (dense, values["w"])]
        assert errors[0] < (1.25 if "zeros" in name else 1.01) * errors[1]
    else:
        np.testing.assert_allclose(values["w"], dense, rtol=1e-5, atol=1e-6)
    assert small["bias"] is params["bias"]
    if "elements" in name:
        np.testing.assert_array_equal(dense[~SEEN], params["w"][~SEEN])
    if "int8" in name:
        assert small["w"].lut.dtype == np.int8
    if "scales" in name:
        assert small["w"].scale.shape == (8, 1)
    if name in KEEPING:
        assert not dense[PRUNED == 0].any()
        assert (small["w"].mask is not None) == ("sparse" in name or "elements" in name)
    assert len(np.unique(dense / (1 if small["w"].scale is None else small["w"].scale))) >= 4


@rows(*KEEPING)
def test_zeros_stay_zeros_through_steps_of_an_optimizer(name):
    transform = WRAPPERS[name](soft())
    params, state = tree(), transform.init(tree())
    where = (PRUNED == 0) & (SEEN if "elements" in name else True)
    for _ in range(3):
        params, state, values, gradient = descend(transform, params, state)
        for leaf in (values["w"], gradient["w"], params["w"]):
            assert not np.asarray(leaf)[where].any()
    others = np.asarray(gradient["w"])[(PRUNED != 0) & SEEN]
    assert others.any()


def test_an_entry_is_zero_only_where_there_are_zeros():
    """Of two groups, one has zeros."""
    weights = np.concatenate([PRUNED[:4], DENSE[:4] + 0.05])
    transform = px.keep_zeros(soft(granularity=px.Granularity(group_size=4)))
    state = transform.init({"w": weights})
    _, state = transform.update({"w": weights}, state)
    lut = np.asarray(transform.finalize({"w": weights}, state)["w"].lut)[:, 0, :, 0]
    assert (lut == 0).any(axis=1).tolist() == [True, False]


def test_what_a_bitmap_leaves_out_has_no_say():
    """Sparse: the table is that of the weights that are not zero."""
    transform = sparse(soft(temperature=0.5))
    state = transform.init(tree())
    values, after = transform.update(tree(), state)
    lut = state.luts["w"].reshape(-1)
    alone = px.soft_kmeans_lut(PRUNED[PRUNED != 0], lut, 0.5, tol=1e-3)
    np.testing.assert_allclose(after.luts["w"].reshape(-1), alone.lut, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["w"][PRUNED != 0], alone.values, rtol=1e-5, atol=1e-6)
    small = transform.finalize(tree(), state)["w"]
    np.testing.assert_array_equal(small.mask, PRUNED != 0)
    assert small.kept is None
    assert (np.asarray(small.lut) != 0).all()


@pytest.mark.parametrize("outlier", [64, np.nan])
def test_elements_that_are_left_out_pass_through_and_have_no_say(outlier):
    transform = elements(soft())
    state = transform.init(tree(DENSE))
    outliers = np.where(SEEN, DENSE, outlier).astype(np.float32)
    results = []
    for weights in (DENSE, outliers):
        _, after, values, gradient = descend(transform, tree(weights), state)
        np.testing.assert_array_equal(values["w"][~SEEN], weights[~SEEN])
        np.testing.assert_array_equal(gradient["w"][~SEEN], (weights - TARGET)[~SEEN])
        results.append((after.luts["w"], values["w"][SEEN], gradient["w"][SEEN]))
        assert int(after.skipped["w"]) == 0
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@rows("zeros", "sparse", "scales", "elements", "by_path", "chain")
def test_sensitivities_reach_the_transform_inside(name):
    """Weights whose errors cost nothing have no say."""
    transform = WRAPPERS[name](soft())
    state = transform.init(tree())
    largest = abs(PRUNED) == abs(PRUNED).max(axis=1, keepdims=True)  # these make the scales
    costs = largest | (np.arange(80).reshape(8, 10) % 2 == 0)
    mass = {"w": costs.astype(np.float32), "bias": np.ones(10, np.float32)}
    others = np.where(costs, PRUNED, PRUNED / 2)
    first, second = (transform.update(tree(w), state, sensitivity=mass)[1] for w in (PRUNED, others))
    without = transform.update(tree(), state)[1]
    for one, other, plain in zip(*map(tables, (first, second, without)), strict=True):
        np.testing.assert_allclose(one.luts["w"], other.luts["w"], rtol=1e-5, atol=1e-6)
        assert abs(one.luts["w"] - plain.luts["w"]).max() > 1e-3


def test_channel_scales_are_those_of_dividing_by_the_largest():
    """Weights over their scale, errors weighted by its square; the scale is a constant to the gradient."""
    weights = (DENSE * np.logspace(-2, 1, 8)[:, None]).astype(np.float32)
    scale = abs(weights).max(axis=1, keepdims=True)
    transform, inner = px.with_channel_scale(soft()), soft()
    state = transform.init(tree(weights))
    np.testing.assert_array_equal(state.luts["w"], inner.init(tree(weights / scale)).luts["w"])
    mass = {"w": np.broadcast_to((scale / scale.max()) ** 2, (8, 10)), "bias": None}

    def by_hand(w):
        values, new = inner.update(tree(w / scale), state, sensitivity=mass)
        return values["w"] * scale, new

    values, after = transform.update(tree(weights), state)
    expected, new = by_hand(jnp.asarray(weights))
    np.testing.assert_allclose(values["w"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.luts["w"], new.luts["w"], rtol=1e-5, atol=1e-6)
    found = jax.grad(lambda w: (transform.update(tree(w), state)[0]["w"] * TARGET).sum())(jnp.asarray(weights))
    slope = jax.grad(lambda w: (by_hand(w)[0] * TARGET).sum())(jnp.asarray(weights))
    np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-5)


def test_tables_are_narrowed_at_the_end():
    """While it trains, `quantize_lut` is the transform inside."""
    transform, inner = int8(soft()), soft()
    state = inner.init(tree(DENSE))
    found, expected = (descend(t, tree(DENSE), state) for t in (transform, inner))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    small = transform.finalize(tree(DENSE), state)["w"].validate()
    assert small.lut.dtype == np.int8
    wide = inner.finalize(tree(DENSE), state)["w"]
    errors = [np.square(leaf.depalettize() - DENSE).sum() for leaf in (small, wide)]
    assert errors[0] < 1.01 * errors[1]


def test_every_leaf_has_the_transform_of_its_path():
    params = {"fine": jnp.asarray(DENSE), "coarse": {"kernel": jnp.asarray(TARGET)}, "left": jnp.asarray(PRUNED)}
    transform = px.by_path([("fine", soft(3)), ("kernel", soft(1)), ("left", None)])
    state = transform.init(params)
    values, after = transform.update(params, state)
    luts = {name: lut.shape for s in tables(after) for name, lut in s.luts.items()}
    assert luts == {"fine": (1, 1, 8, 1), "coarse/kernel": (1, 1, 2, 1)}
    np.testing.assert_array_equal(values["left"], PRUNED)
    alone, _ = soft(3).update({"fine": DENSE}, soft(3).init({"fine": DENSE}))
    np.testing.assert_allclose(values["fine"], alone["fine"], rtol=1e-6)
    small = transform.finalize(params, after)
    assert (small["fine"].nbits, small["coarse"]["kernel"].nbits, is_palettized(small["left"])) == (3, 1, False)


def test_a_chain_trains_one_after_the_other():
    first, second = soft(3), soft(2)
    transform = px.chain(first, second)
    state = transform.init(tree(DENSE))
    values, (one, two) = transform.update(tree(DENSE), state)
    between, expected_one = first.update(tree(DENSE), state[0])
    expected, expected_two = second.update(between, state[1])
    np.testing.assert_array_equal(values["w"], expected["w"])
    np.testing.assert_array_equal(one.luts["w"], expected_one.luts["w"])
    np.testing.assert_array_equal(two.luts["w"], expected_two.luts["w"])
    small = transform.finalize(tree(DENSE), state)["w"].validate()
    assert small.nbits == 2


@pytest.mark.parametrize("name", ["int8 of scales"])
def test_compiled_as_a_whole_it_is_the_same(name):
    transform = WRAPPERS[name](soft())
    state = transform.init(tree())
    eager = descend(transform, tree(), state)[1:]
    compiled = jax.jit(lambda params, state: descend(transform, params, state)[1:])(tree(), state)
    for one, other in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@rows("zeros", "sparse", "scales", "elements", "by_path", "int8")
def test_a_leaf_that_is_not_finite_keeps_its_table(name):
    transform = WRAPPERS[name](soft())
    state = transform.init(tree())
    bad = tree() | {"w": tree()["w"].at[3, 4].set(np.nan)}
    values, after = jax.jit(transform.update)(bad, state)
    for before, now in zip(tables(state), tables(after), strict=True):
        np.testing.assert_array_equal(now.luts["w"], before.luts["w"])
        assert int(now.skipped["w"]) == 1
    rest = np.isfinite(np.asarray(bad["w"]))
    np.testing.assert_allclose(values["w"][rest], bad["w"][rest], rtol=1e-6)
    with pytest.raises(ValueError, match=r"leaf 'w' \(8, 10\) float32: 1 NaN"):
        transform.finalize(bad, after)
    back, _ = transform.update(tree(), after)
    expected, _ = transform.update(tree(), state)
    np.testing.assert_array_equal(back["w"], expected["w"])


def test_elements_that_are_left_out_are_not_counted_as_nan():
    bad = tree(DENSE) | {"w": jnp.asarray(DENSE).at[0, 1].set(np.nan)}  # the first that is seen
    transform = elements(soft())
    with pytest.raises(ValueError, match=r"leaf 'w' \(8, 10\) float32: 1 NaN"):
        transform.finalize(bad, transform.init(tree(DENSE)))
