"""chain, masked, partition, by_path and custom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palettax as px
from palettax.leaf import is_palettized
from tests.tables import params


def run(transform, tree, sensitivity=None):
    return transform.finalize(tree, transform.init(tree), sensitivity=sensitivity)


def widths(tree):
    """nbits of every leaf, None for the dense ones."""
    return [x.nbits if is_palettized(x) else None for x in jax.tree.leaves(tree, is_leaf=is_palettized)]


def same_leaf(a, b):
    assert (a.nbits, a.dtype) == (b.nbits, b.dtype)
    np.testing.assert_array_equal(a.lut, b.lut)
    np.testing.assert_array_equal(a.indices, b.indices)


def of_size(size):
    return lambda tree: jax.tree.map(lambda leaf: leaf.ndim == size, tree)


def test_the_last_of_a_chain_gives_the_storage():
    tree = params()
    assert widths(run(px.chain(px.kmeans(8), px.kmeans(2)), tree)) == [2, 2, 2]
    assert run(px.chain(), tree) is tree
    assert widths(run(px.chain(px.kmeans(4), px.masked(px.kmeans(1), {"a": True, "b": [False, False]})), tree)) == [
        1,
        4,
        4,
    ]


def test_masked_leaves_are_the_very_same_objects():
    tree = params()
    transform = px.masked(px.kmeans(2), {"a": False, "b": [True, False]})
    small = run(transform, tree)
    updated, _ = transform.update(tree, transform.init(tree))
    for out in (small, updated):
        assert out["a"] is tree["a"]
        assert out["b"][1] is tree["b"][1]
    same_leaf(small["b"][0], run(px.kmeans(2), tree["b"][0]))


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ({"a": True, "b": [True, False]}, {"a": False, "b": [True, True]}, [None, 2, None]),
        ({"a": True, "b": [False, False]}, {"a": False, "b": [True, True]}, [None, None, None]),
        ({"a": True, "b": [True, False]}, of_size(2), [2, None, None]),
        (of_size(3), {"a": True, "b": [True, True]}, [None, 2, None]),
        (of_size(4), of_size(4), [None, None, 2]),
        (of_size(4), of_size(3), [None, None, None]),
    ],
)
def test_a_mask_in_a_mask_is_their_conjunction(outer, inner, expected):
    assert widths(run(px.masked(px.masked(px.kmeans(2), inner), outer), params())) == expected


def test_a_mask_of_another_structure():
    with pytest.raises(ValueError, match="mask has another structure than params"):
        run(px.masked(px.kmeans(2), {"a": True}), params())


def test_partition_by_labels():
    tree = params()
    transforms = {"fine": px.kmeans(4), 2: px.uniform(2), "none": px.identity()}
    labels = {"a": 2, "b": ["fine", "none"]}
    small = run(px.partition(transforms, labels), tree)
    assert widths(small) == [2, 4, None]
    same_leaf(small["a"], run(px.uniform(2), tree["a"]))
    same_leaf(small["b"][0], run(px.kmeans(4), tree["b"][0]))
    assert small["b"][1] is tree["b"][1]

    def by_rank(tree):
        return jax.tree.map(lambda leaf: "fine" if leaf.ndim == 2 else "none", tree)

    assert widths(run(px.partition(transforms, by_rank), tree)) == [4, None, None]


@pytest.mark.parametrize("step", ["init", "update", "finalize"])
def test_a_label_without_a_transform(step):
    transform = px.partition({"fine": px.kmeans(4)}, {"a": "fine", "b": ["coarse", "fine"]})
    with pytest.raises(ValueError, match=r"labels \['coarse'\] have no transform; there are \['fine'\]"):
        transform.init(params()) if step == "init" else getattr(transform, step)(params(), ((),))


def test_by_path_takes_the_first_rule_that_is_found_in_the_path():
    tree = params()
    small = run(px.by_path([("b/1", px.kmeans(8)), ("b", px.kmeans(4)), ("^a$", px.kmeans(2))]), tree)
    assert widths(small) == [2, 4, 8]
    small = run(px.by_path([("b", px.kmeans(4)), ("b/1|a", px.kmeans(8))]), tree)
    assert widths(small) == [8, 4, 4]


def test_by_path_leaves_the_rest_dense():
    tree = params()
    transform = px.by_path([("b/0", None), ("b", px.kmeans(1))])
    for out in (run(transform, tree), transform.update(tree, transform.init(tree))[0]):
        assert out["a"] is tree["a"]
        assert out["b"][0] is tree["b"][0]
    assert widths(run(transform, tree)) == [None, None, 1]


def test_a_regex_that_is_found_nowhere():
    with pytest.raises(ValueError, match=r"regex 'conv[.]' matches no leaf; the leaves are a, b/0, b/1$"):
        run(px.by_path([(".*", px.kmeans(1)), ("conv.", px.kmeans(2))]), params())
    many = {f"w{i:02}": jnp.ones(2) for i in range(9)}
    with pytest.raises(ValueError, match=r"the leaves are w00, w01, w02, w03, w04, w05, w06, w07, …$"):
        run(px.by_path([("no", None)]), many)


def test_a_rule_shadowed_by_an_earlier_one_is_no_error():
    assert widths(run(px.by_path([("", px.kmeans(1)), ("^a$", px.kmeans(2))]), params())) == [1, 1, 1]


def test_rules_see_leaves_hidden_by_a_mask():
    rules = px.by_path([("^a$", px.kmeans(1)), ("b", px.kmeans(2))])
    assert widths(run(px.masked(rules, {"a": False, "b": [True, False]}), params())) == [None, 2, None]


def test_combinators_nest_in_each_other():
    tree = params()
    inner = px.by_path([("b/1", px.kmeans(8)), ("b", px.kmeans(4)), ("^a$", px.kmeans(2))])
    nested = px.partition(
        {"rules": px.chain(inner, px.identity()), "none": px.identity()}, {"a": "none", "b": ["rules", "rules"]}
    )
    assert widths(run(nested, tree)) == [None, 4, 8]
    assert widths(run(px.masked(nested, of_size(4)), tree)) == [None, None, 8]


def test_palettized_leaves_pass_through_or_are_palettized_again():
    tree = params()
    small = run(px.kmeans(4), tree)
    some = px.masked(px.kmeans(1), {"a": True, "b": [False, False]})
    again = run(some, small)
    assert again["b"][0] is small["b"][0]
    same_leaf(again["a"], run(px.kmeans(1), small["a"].depalettize()))
    updated, _ = some.update(small, some.init(small))
    np.testing.assert_array_equal(updated["a"], px.depalettize(again)["a"])
    np.testing.assert_array_equal(px.depalettize(updated)["b"][0], small["b"][0].depalettize())
    assert widths(run(px.by_path([("b", px.kmeans(2))]), small)) == [4, 2, 2]


@pytest.mark.parametrize(
    "transform",
    [
        px.identity(),
        px.kmeans(1),
        px.chain(),
        px.chain(px.identity()),
        px.masked(px.kmeans(1), {"a": True, "b": [False, False]}),
        px.by_path([("^a$", px.kmeans(1)), ("b/0", None)]),
    ],
    ids=["identity", "kmeans", "empty chain", "chain", "masked", "by_path"],
)
def test_update_leaves_every_leaf_dense(transform):
    small = run(px.kmeans(4), params())
    updated, _ = transform.update(small, transform.init(small))
    assert widths(updated) == [None, None, None]


@pytest.mark.parametrize(
    "combine",
    [
        lambda t: t,
        lambda t: px.chain(px.identity(), t),
        lambda t: px.masked(t, {"a": True, "b": [True, False]}),
        lambda t: px.masked(px.masked(t, of_size(3)), {"a": False, "b": [True, True]}),
        lambda t: px.partition({0: px.uniform(2), 1: t}, {"a": 0, "b": [1, 1]}),
        lambda t: px.by_path([("b/1", None), ("b", t)]),
    ],
    ids=["alone", "chain", "masked", "masked twice", "partition", "by_path"],
)
def test_sensitivity_reaches_its_leaf(combine):
    tree = params()
    sensitivity = jax.tree.map(np.square, params(seed=1))
    transform = combine(px.kmeans(2))
    small = run(transform, tree, sensitivity)
    alone = run(px.kmeans(2), tree["b"][0], sensitivity["b"][0])
    assert not np.array_equal(alone.lut, run(px.kmeans(2), tree["b"][0]).lut)
    same_leaf(small["b"][0], alone)
    updated, _ = transform.update(tree, transform.init(tree), sensitivity=sensitivity)
    np.testing.assert_array_equal(updated["b"][0], alone.depalettize())


@pytest.mark.parametrize(
    "transform", [px.kmeans(2), px.masked(px.kmeans(2), of_size(2)), px.by_path([("b", px.kmeans(2))])]
)
def test_a_sensitivity_of_another_structure(transform):
    with pytest.raises(ValueError, match="sensitivity has another structure than params; give it one entry per leaf"):
        run(transform, params(), {"a": np.ones((8, 10))})


def test_a_bad_sensitivity_names_its_leaf():
    tree = params()
    sensitivity = jax.tree.map(np.ones_like, tree)
    for bad, message in (
        (np.ones((10, 8), np.float32), r"sensitivity is \(10, 8\)"),
        (-np.ones((4, 2, 10), np.float32), "80 negative"),
    ):
        sensitivity["b"][0] = bad
        with pytest.raises(ValueError, match=rf"leaf 'b/0' \(4, 2, 10\) float32: .*{message}"):
            run(px.kmeans(2), tree, sensitivity)


WEIGHTS = np.random.default_rng(0).choice(np.array([-3.0, 0.5, 2.0], np.float32), (8, 10))


def unsorted_lut(weights):
    return np.array([2.0, -3.0, 0.5]), np.where(weights == 2, 0, np.where(weights == -3, 1, 2))


def test_a_custom_lut_is_sorted_and_padded_and_keeps_its_values():
    small = run(px.custom(unsorted_lut), WEIGHTS)
    assert np.ravel(small.lut).tolist() == [-3.0, 0.5, 2.0, 2.0]
    np.testing.assert_array_equal(small.depalettize(), WEIGHTS)


def test_custom_lists_will_do():
    small = run(px.custom(lambda w: ([-1.0, 1.0], [int(x > 0) for x in w])), WEIGHTS)
    assert small.nbits == 1
    np.testing.assert_array_equal(small.depalettize(), np.sign(WEIGHTS))


def test_a_custom_function_keeps_what_it_chose_even_if_another_entry_is_nearer():
    chosen = np.random.default_rng(1).integers(0, 3, 80)
    lut = np.array([5.0, -5.0, 0.0], np.float32)
    small = run(px.custom(lambda w: (lut, chosen)), WEIGHTS)
    np.testing.assert_array_equal(np.ravel(small.depalettize()), lut[chosen])


def test_custom_with_a_fit_is_the_transform_of_that_fit():
    weights = params()["a"]
    rows = px.Granularity(group_size=4)
    same_leaf(
        run(px.custom(lambda w: px.kmeans_lut(w, 3), granularity=rows), weights),
        run(px.kmeans(3, granularity=rows), weights),
    )


def test_custom_is_called_once_per_group_and_takes_the_width_of_the_longest():
    calls = []

    def first_values(weights):
        calls.append(weights.shape)
        lut = np.unique(np.asarray(weights))
        return lut, np.searchsorted(lut, np.asarray(weights))

    weights = np.concatenate([np.arange(10) % 5, np.arange(10) % 2]).astype(np.float32).reshape(4, 5)
    small = run(px.custom(first_values, granularity=px.Granularity(group_size=2)), weights)
    assert calls == [(10,), (10,)]
    assert small.nbits == 3
    assert small.lut[1, 0, :, 0].tolist() == [0.0] + [1.0] * 7
    np.testing.assert_array_equal(small.depalettize(), weights)


@pytest.mark.parametrize("jit", [False, True])
def test_custom_of_vectors_is_sorted_and_padded_too(jit):
    granularity = px.Granularity(group_size=4, vector_size=2, vector_axis=1)
    # Five pairs, in no order, of which the second group lacks two.
    lut = np.float32([[1, 2], [-1, 5], [1, 0], [3, 3], [-1, 4]])
    chosen = np.arange(40).reshape(2, 20) % np.array([[5], [3]])
    weights = lut[chosen].reshape(8, 10)
    calls = []

    def nearest(vectors):
        calls.append(vectors.shape)
        return lut, ((vectors[:, None] - lut) ** 2).sum(axis=2).argmin(axis=1)

    transform = px.custom(nearest, granularity=granularity)
    small = (jax.jit(lambda w: transform.finalize(w, ())) if jit else lambda w: run(transform, w))(weights)
    assert calls == [(20, 2)] * 2
    assert (small.nbits, small.lut.shape, small.indices.shape) == (3, (2, 1, 8, 2), (8, 5))
    assert small.lut[1, 0].tolist() == [[-1, 4], [-1, 5], [1, 0], [1, 2], *[[3, 3]] * 4]
    np.testing.assert_array_equal(small.depalettize(), weights)
    if not jit:
        for answer, message in (
            (([1.0, 2.0], [0] * 20), "give 1 to 256 rows of 2"),
            ((lut, [0] * 19), "for 20 vectors"),
        ):
            with pytest.raises(ValueError, match=message):
                run(px.custom(lambda v, answer=answer: answer, granularity=granularity), weights)


def test_a_custom_fit_that_did_not_converge_leaves_the_leaf_dense():
    weights = np.arange(400, dtype=np.float32).reshape(20, 20)
    transform = px.custom(lambda w: px.unique_lut(w, 8))
    assert run(transform, weights) is weights
    np.testing.assert_array_equal(transform.update(weights, ())[0], weights)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (([], np.zeros(80, int)), r"a lut of shape \(0,\); give one row of 1 to 256 values"),
        ((np.zeros(257), np.zeros(80, int)), r"a lut of shape \(257,\)"),
        ((np.zeros((2, 2)), np.zeros(80, int)), r"a lut of shape \(2, 2\)"),
        (([0.0, 1.0], np.zeros(79, int)), "79 indices for 80 weights; give one each"),
        (([0.0, 1.0], np.full(80, 2)), "indices outside its lut of 2 values"),
        (([0.0, 1.0], np.full(80, -1)), "indices outside its lut of 2 values"),
        (([0.0, np.nan], np.zeros(80, int)), "1 NaN and 0 infinite of 2 values"),
        (([0.0, np.inf], np.zeros(80, int)), "0 NaN and 1 infinite of 2 values"),
    ],
)
def test_bad_custom_answers_name_the_leaf(answer, message):
    with pytest.raises(ValueError, match=rf"leaf 'w' \(8, 10\) float32: .*{message}"):
        run(px.custom(lambda w: answer), {"w": WEIGHTS})


def test_custom_of_256_entries_is_the_longest():
    small = run(px.custom(lambda w: (np.arange(256.0), np.arange(80))), WEIGHTS)
    assert small.nbits == 8
    np.testing.assert_array_equal(np.ravel(small.depalettize()), np.arange(80))


def test_a_unique_that_does_not_fit_is_dense_and_under_jit_not_passed_off_as_the_weight():
    weights = jnp.arange(20.0).reshape(4, 5)
    transform = px.unique(2)
    assert run(transform, weights) is weights
    np.testing.assert_array_equal(jax.jit(transform.update)(weights, ())[0], weights)
    assert bool(jnp.isnan(jax.jit(transform.finalize)(weights, ()).depalettize()).all())


WRAPPERS = {
    "chain": px.chain,
    "masked": lambda inner: px.masked(inner, lambda _: True),
    "by_path": lambda inner: px.by_path([("w", inner)]),
    "partition": lambda inner: px.partition({"w": inner}, {"w": "w"}),
    "with_channel_scale": px.with_channel_scale,
    "keep_zeros": px.keep_zeros,
    "quantize_lut": lambda inner: px.quantize_lut(inner, "int8"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_transform_is_refused_at_once(wrapper):
    with pytest.raises(ValueError, match=r" is 4; give a transform, such as kmeans\(4\)"):
        wrapper(4)
