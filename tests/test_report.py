"""`report` against numbers counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import palettax as px
from tests.leaves import forms, random_leaf
from tests.tables import DTYPES

RNG = np.random.default_rng(0)


def tree():
    return {
        "kernel": RNG.standard_normal((60, 40)).astype(np.float32),
        "half": RNG.standard_normal((40, 60)).astype(np.float16),
        "bias": np.ones(60, np.float32),
        "ids": np.arange(5),
    }


def test_numbers_of_every_leaf():
    params = tree()
    rules = px.by_path([("half", px.kmeans(2, granularity=px.Granularity(group_size=20))), ("", px.kmeans(3))])
    small = px.palettize(params, rules)
    found = px.report(params, small)
    assert list(found) == ["bias", "half", "ids", "kernel"]  # the order of the tree

    kernel = found["kernel"]
    assert kernel[:4] == ((60, 40), "float32", 3, (1, 1))
    assert kernel.nbytes == 2400 * 3 // 8 + 8 * 4
    assert kernel.nbytes_before == 2400 * 4
    assert kernel.bits_per_weight == 8 * kernel.nbytes / 2400
    assert kernel.skipped == ""

    half = found["half"]
    assert half[:4] == ((40, 60), "float16", 2, (2, 1))
    assert half.nbytes == 2400 * 2 // 8 + 2 * 4 * 2
    assert half.nbytes_before == 2400 * 2

    bias = found["bias"]
    assert bias == ((60,), "float32", None, (), 32.0, np.inf, 240, 240, "≤ weight_threshold=2048", "", None, 0)
    assert found.nbytes == kernel.nbytes + half.nbytes + 240 + params["ids"].nbytes
    assert found.nbytes_before == sum(leaf.nbytes for leaf in params.values())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sqnr(dtype):
    before = RNG.standard_normal((60, 40)).astype(dtype)
    small = px.palettize(before, px.kmeans(3))
    (leaf,) = px.report(before, small).values()
    exact, error = before.astype(np.float64), before.astype(np.float64) - np.asarray(small.depalettize(), np.float64)
    assert leaf.sqnr == pytest.approx(10 * np.log10(np.sum(exact**2) / np.sum(error**2)), rel=1e-9)


def test_six_decibels_a_bit():
    # A range of 2^b levels: signal (2^b - 1)²/12 · ..., noise 1/12 of a step²; halving the step is 20 log10(2) dB.
    before = np.linspace(-1, 1, 60_000, dtype=np.float32).reshape(300, 200)
    one, two = (px.report(before, px.palettize(before, px.kmeans(b)))[""].sqnr for b in (3, 4))
    assert two - one == pytest.approx(20 * np.log10(2), abs=0.01)
    assert one == pytest.approx(3 * 20 * np.log10(2), abs=0.01)  # (2/√12)² against (2/8/√12)²


@given(form=forms())
def test_every_form_of_a_leaf_costs_what_it_says(form):
    small = random_leaf(**form)
    (leaf,) = px.report([small.depalettize()], [small]).values()
    assert (leaf.nbytes, leaf.bits_per_weight, leaf.sqnr) == (small.nbytes, small.bits_per_weight, np.inf)
    assert leaf.dtype == np.dtype(form["dtype"]).name


def test_a_lossless_leaf_has_infinite_sqnr():
    before = np.sign(RNG.standard_normal((60, 40))).astype(np.float32)
    (leaf,) = px.report(before, px.palettize(before, px.unique())).values()
    assert leaf.sqnr == np.inf
    assert leaf.nbits == 1


def test_zeros_that_became_something_have_an_sqnr_of_minus_infinity():
    before = np.zeros((60, 40), np.float32)
    small = px.palettize(before, px.custom(lambda w: ([1.0], np.zeros(2400, int))))
    (leaf,) = px.report(before, small).values()
    assert leaf.sqnr == -np.inf


def test_why_a_leaf_is_dense():
    wide = np.arange(2401, dtype=np.float32)
    bad = wide.copy()
    bad[:3] = np.nan
    params = {"bad": bad, "few": np.ones(7, np.float32), "ids": np.arange(3000), "off": wide[:2400] % 300, "wide": wide}
    rules = px.by_path([("ids|off", None), ("", px.unique())])
    small = px.palettize(params, rules, nonfinite="keep")
    assert {name: leaf.skipped for name, leaf in px.report(params, small).items()} == {
        "bad": "3 NaN or infinite values",
        "few": "≤ weight_threshold=2048",
        "ids": "int64 is not floating",
        "off": "left dense by the transform (300 distinct values)",
        "wide": "left dense by the transform (2401 distinct values)",
    }
    assert px.report(params, small, weight_threshold=2401)["wide"].skipped == ("≤ weight_threshold=2401")
    params = {"off": wide[:1500], "on": wide[:1000]}
    small = px.palettize(params, px.by_path([("off", None), ("on", px.kmeans(2))]), weight_threshold=500)
    assert px.report(params, small)["off"].skipped == "left dense by the transform (1500 distinct values)"


def test_it_prints_a_line_for_every_leaf_and_the_total():
    params = tree()
    found = px.report(params, px.palettize(params, px.kmeans(4)))
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(params) + 1
    for line, (name, leaf) in zip(lines[1:], found.items(), strict=False):
        assert line.startswith(name)
        assert "×".join(map(str, leaf.shape)) in line
        assert f"{leaf.nbytes:,}" in line
        assert ("4 bits, 1 lut" in line) if leaf.nbits else (f"dense: {leaf.skipped}" in line)
    before, now = found.nbytes_before, found.nbytes
    assert lines[-1] == f"{before:,} bytes became {now:,}: {before / now:.2f} times smaller"


def test_an_empty_tree():
    found = px.report({}, {})
    assert (found.nbytes, found.nbytes_before) == (0, 0)
    assert "0 bytes became 0: 1.00 times smaller" in str(found)


def test_what_became_larger_is_said():
    params = {"w": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)}
    small = px.palettize(params, px.kmeans(8, granularity=px.Granularity(group_size=1)), weight_threshold=0)
    found = px.report(params, small)
    assert "8 bits, 8 lut, larger than dense" in str(found)
    assert found.summary() == f"512 bytes became {8 * 256 * 4 + 128:,}: 16.25 times larger"


def test_scalars_and_empty_leaves():
    params = {"empty": np.zeros((0, 3), np.float32), "lr": 0.1, "scalar": jnp.float32(3)}
    found = px.report(params, px.palettize(params, px.kmeans(1)))
    assert [leaf.nbytes for leaf in found.values()] == [0, 8, 4]
    assert [leaf.bits_per_weight for leaf in found.values()] == [0, 64, 32]


def test_a_tree_that_was_palettized_before():
    first = px.palettize({"w": RNG.standard_normal((60, 40)).astype(np.float32)}, px.kmeans(4))
    second = px.kmeans(2).finalize(first, ())
    (leaf,) = px.report(first, second).values()
    before, after = first["w"].depalettize(), second["w"].depalettize()
    assert leaf.nbytes_before == 9600
    assert leaf.sqnr == pytest.approx(10 * np.log10(np.sum(before**2.0) / np.sum((before - after) ** 2.0)), rel=1e-6)


def test_a_table_of_nan_is_said():
    params = {"w": np.float32([[0, np.nan], [2, 3]])}
    small = jax.jit(lambda tree: px.palettize(tree, px.kmeans(1), weight_threshold=0))(params)
    assert "NaN: in its table" in str(px.report(params, small))


def test_arguments_in_the_other_order():
    params = {"w": np.float32([[0, 1], [2, 3]])}
    with pytest.raises(ValueError, match=r"the order is report\(params, palettized\)"):
        px.report(px.palettize(params, px.kmeans(2), weight_threshold=0), params)


@pytest.mark.parametrize("other", [{}, {"w": 1.0}, [1.0, 2.0], {"a": 1.0, "b": {"c": 1.0}, "d": 1.0}])
def test_trees_that_do_not_match(other):
    with pytest.raises(ValueError, match="params and palettized are different trees"):
        px.report({"a": np.ones(3), "b": np.ones(3)}, other)


def test_predicted_loss_increase():
    """½ Σ F (w - ŵ)² of what a quadratic loss loses, leaf by leaf."""
    params = {"a": RNG.standard_normal((60, 40)), "b": 1e-3 * RNG.standard_normal((50, 60)), "c": np.ones(4)}
    curvature = {name: RNG.gamma(0.3, size=leaf.shape) for name, leaf in params.items()}
    small = px.palettize(params, px.kmeans(2), sensitivity=curvature)
    found = px.report(params, small, sensitivity=curvature)

    def loss(weights):
        return {n: (curvature[n] * (np.asarray(weights[n], np.float64) - params[n]) ** 2).sum() / 2 for n in params}

    lost = loss(px.depalettize(small))
    for name, leaf in found.items():
        assert leaf.loss_increase == pytest.approx(lost[name], rel=1e-12)
    assert found.loss_increase == pytest.approx(sum(lost.values()), rel=1e-12)
    assert found["c"].loss_increase == 0
    assert f"{found.loss_increase:.3g}" in str(found).splitlines()[-1]
    assert px.report(params, small).loss_increase is None
    with pytest.raises(ValueError, match=r"leaf 'a' is .* and its sensitivity"):
        px.report(params, small, sensitivity=curvature | {"a": np.ones(3)})


def test_zero_sensitivity_is_said_and_counts_as_one():
    weights = RNG.standard_normal((64, 64)).astype(np.float32)
    mass = np.ones_like(weights)
    mass[16:48] = 0
    groups = px.kmeans(2, granularity=px.Granularity(group_size=16))
    for small, own, unweighted in [
        (px.palettize(weights, groups, sensitivity=mass), mass, 2),
        (px.palettize(weights, px.kmeans(2), sensitivity=0 * mass), 0 * mass, 1),
    ]:
        (leaf,) = px.report(weights, small, sensitivity=own).values()
        assert leaf.unweighted == unweighted
    assert f"sensitivity is zero in {unweighted}" in str(px.report(weights, small, sensitivity=own))
    np.testing.assert_array_equal(small.depalettize(), px.palettize(weights, px.kmeans(2)).depalettize())


def test_tied_leaves_raise_the_loss_once():
    table = RNG.standard_normal((60, 40)).astype(np.float32)
    params = {"embed": table, "head": table}
    mass = RNG.gamma(0.3, size=table.shape)
    small = px.palettize(params, px.kmeans(2), sensitivity={"embed": mass, "head": mass})
    found = px.report(params, small, sensitivity={"embed": mass, "head": mass})
    assert found.loss_increase == found["embed"].loss_increase == found["head"].loss_increase
    copies = {"embed": mass.copy(), "head": mass.copy()}  # as of a tree.map
    assert px.report(params, small, sensitivity=copies).loss_increase == found.loss_increase


def test_weights_that_are_not_finite_raise_no_loss():
    weights = RNG.standard_normal((64, 64)).astype(np.float32)
    weights[0, :2] = np.nan, np.inf
    small = px.palettize({"w": weights}, px.kmeans(2), nonfinite="keep")
    assert px.report({"w": weights}, small, sensitivity={"w": np.ones((64, 64))}).loss_increase == 0
