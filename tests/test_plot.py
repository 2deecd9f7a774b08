"""What is drawn is what the library computed."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import palettax as px
import palettax.plot

matplotlib.use("Agg")
from matplotlib import pyplot

BITS = (1, 2, 3, 4)
WEIGHTS = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
PARAMS = {"first": {"kernel": WEIGHTS, "bias": np.zeros(8, np.float32)}, "last": 3 * WEIGHTS[:16]}
FITS = {"exact": [px.kmeans_lut(WEIGHTS, b) for b in BITS], "uniform": [px.uniform_lut(WEIGHTS, b) for b in BITS]}


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def lines(axes):
    """Points of every line that a legend names."""
    return {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}


def small(nbits, **how):
    return px.palettize(PARAMS, px.kmeans(nbits, **how), weight_threshold=100)


def reported(nbits, **how):
    return px.report(PARAMS, small(nbits), weight_threshold=100, **how)


def ticks(axes):
    """Where the entries of the tables are drawn, row by row."""
    return np.array([[segment[0][0] for segment in row.get_segments()] for row in axes.collections])


def test_the_histogram_has_area_one_and_a_tick_for_each_entry():
    leaf = small(2)["first"]["kernel"]
    axes = px.plot.histogram(WEIGHTS, leaf)
    (stairs,) = axes.patches
    density, edges, _ = stairs.get_data()
    assert np.isclose((density * np.diff(edges)).sum(), 1)
    np.testing.assert_array_equal(ticks(axes), np.asarray(leaf.lut, np.float64).reshape(1, 4))


def test_a_row_of_ticks_for_each_table():
    leaf = small(2, granularity=px.Granularity(group_size=8))["first"]["kernel"]
    np.testing.assert_array_equal(ticks(px.plot.histogram(WEIGHTS, leaf)), np.asarray(leaf.lut).reshape(4, 4))


def test_ticks_are_in_units_of_the_weight():
    leaf = px.palettize(PARAMS, px.quantize_lut(px.kmeans(2), "int8"), weight_threshold=100)["first"]["kernel"]
    values = np.unique(px.depalettize(leaf))
    np.testing.assert_array_equal(ticks(px.plot.histogram(WEIGHTS, leaf))[0], values)


def test_a_histogram_of_tables_without_units_is_refused():
    leaf = px.palettize(PARAMS, px.with_channel_scale(px.kmeans(2)), weight_threshold=100)["first"]["kernel"]
    with pytest.raises(ValueError, match="several scales each"):
        px.plot.histogram(WEIGHTS, leaf)


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_are_those_of_the_fits(weighted):
    mass = np.abs(WEIGHTS) if weighted else None
    fits = [px.kmeans_lut(WEIGHTS, b, sensitivity=mass) for b in BITS]
    drawn = lines(px.plot.error_against_bits(WEIGHTS, {"exact": fits[::-1]}, sensitivity=mass))
    signal = ((1 if mass is None else mass) * WEIGHTS.astype(np.float64) ** 2).sum()
    sqnr = [10 * np.log10(signal / fit.inertia) for fit in fits]
    np.testing.assert_allclose(drawn["exact"], np.transpose([BITS, sqnr]), rtol=1e-6)  # inertia is of float32
    # The exact points lie on the curve of the optimum.
    curve = drawn["the least of scalars"]
    np.testing.assert_allclose(np.interp(BITS, *curve.T), drawn["exact"][:, 1], rtol=1e-5)
    assert (np.diff(curve, axis=0) > 0).all()


def test_errors_are_what_a_report_says():
    drawn = lines(px.plot.error_against_bits(WEIGHTS, FITS))
    said = [reported(b)["first/kernel"].sqnr for b in BITS]
    np.testing.assert_allclose(drawn["exact"][:, 1], said, rtol=1e-4)
    assert (drawn["uniform"][:, 1] <= drawn["exact"][:, 1] + 1e-4).all()


def test_a_vector_shares_its_bits():
    fit = px.kmeans_lut(WEIGHTS, 4, vector_size=2, key=jax.random.key(0))
    assert lines(px.plot.error_against_bits(WEIGHTS, {"pairs": [fit]}))["pairs"][0, 0] == 2


def test_a_table_without_error_is_a_triangle():
    weights = np.array([0, 1, 2, 3] * 4, np.float32)
    axes = px.plot.error_against_bits(weights, {"exact": [px.kmeans_lut(weights, b) for b in (1, 2)]})
    drawn = lines(axes)
    assert drawn["exact"][:, 0].tolist() == [1]
    assert "no error" in drawn
    (above,) = [line for line in axes.lines if line.get_marker() == "^" and line.get_xdata().size]
    assert above.get_xdata().tolist() == [2]


@pytest.mark.parametrize(
    ("weights", "fits", "message"),
    [
        (WEIGHTS, {}, "nothing to draw"),
        (WEIGHTS, {"exact": []}, "'exact' has no points"),
        (WEIGHTS[:4], FITS, "give fits of these weights"),
        (0 * WEIGHTS, FITS, "no signal"),
        (WEIGHTS, {"rows": [jax.vmap(lambda row: px.kmeans_lut(row, 1))(WEIGHTS)]}, "of one table each"),
    ],
)
def test_no_errors_to_draw(weights, fits, message):
    with pytest.raises(ValueError, match=message):
        px.plot.error_against_bits(weights, fits)


def cells(axes):
    """Words and shades, row by row."""
    (image,) = axes.images
    shades = np.ma.filled(image.get_array().astype(float), np.nan)
    return np.array([t.get_text() for t in axes.texts]).reshape(shades.shape), shades


def test_a_report_is_a_row_for_each_leaf():
    mass = jax.tree.map(np.ones_like, PARAMS)
    report = reported(2, sensitivity=mass)
    axes = px.plot.report_heat_map(report)
    words, shades = cells(axes)
    assert [t.get_text() for t in axes.get_yticklabels()] == list(report)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["bits/weight", "SQNR dB", "bytes", "loss increase"]
    leaf = report["last"]
    assert words[2].tolist() == [
        f"{leaf.bits_per_weight:.3g}", f"{leaf.sqnr:.1f}", f"{leaf.nbytes:,}", f"{leaf.loss_increase:.2g}"
    ]  # fmt: skip
    # The dense leaf has no shade; of the others, the one that costs more is the darker.
    assert np.isnan(shades[0]).all()
    assert (shades[2, 3] > shades[1, 3]) == (leaf.loss_increase > report["first/kernel"].loss_increase)
    assert (shades[2, 1] > shades[1, 1]) == (leaf.sqnr < report["first/kernel"].sqnr)


def test_no_losses_no_column_of_them():
    assert cells(px.plot.report_heat_map(reported(2)))[0].shape == (3, 3)


def test_several_reports_are_columns_of_sqnr():
    reports = {f"{b} bits": reported(b) for b in BITS}
    axes = px.plot.report_heat_map(reports)
    words, shades = cells(axes)
    assert [t.get_text() for t in axes.get_xticklabels()] == list(reports)
    assert words[1].tolist() == [f"{r['first/kernel'].sqnr:.1f}" for r in reports.values()]
    assert words[0].tolist() == ["∞"] * 4
    assert (np.diff(shades[1:]) < 0).all()


def test_a_tied_leaf_is_not_counted_twice():
    params = {"a": WEIGHTS, "b": WEIGHTS}
    report = px.report(params, px.palettize(params, px.kmeans(2), weight_threshold=100))
    assert cells(px.plot.report_heat_map(report))[0][:, 2].tolist() == [f"{report['a'].nbytes:,}", "tied"]


def test_reports_that_are_no_map():
    other = px.report({"w": WEIGHTS}, {"w": WEIGHTS})
    for nothing in (px.Report(), {}, {"none": px.Report()}):
        with pytest.raises(ValueError, match="no leaf to draw"):
            px.plot.report_heat_map(nothing)
    with pytest.raises(ValueError, match=r"'other' is of another tree.*'w'"):
        px.plot.report_heat_map({"one": reported(2), "other": other})


def test_trajectories_are_the_tables():
    luts = np.sort(np.random.default_rng(1).normal(size=(7, 4)), axis=1)
    axes = px.plot.lut_trajectories(luts, WEIGHTS, steps=np.arange(0, 70, 10))
    np.testing.assert_array_equal([line.get_ydata() for line in axes.lines], luts.T)
    assert all((line.get_xdata() == np.arange(0, 70, 10)).all() for line in axes.lines)
    (beside,) = axes.child_axes
    (ends,) = beside.collections
    np.testing.assert_array_equal([segment[0][1] for segment in ends.get_segments()], luts[-1])
    low, high = axes.get_ylim()
    assert low <= luts.min()
    assert luts.max() <= high


def test_a_state_of_training_can_be_drawn():
    palette = px.dkm(2, weight_threshold=100)

    def step(state, scale):
        _, state = palette.update({"w": scale * WEIGHTS}, state)
        return state, state.luts["w"]

    _, luts = jax.lax.scan(step, palette.init({"w": WEIGHTS}), jnp.linspace(1, 0.5, 5))
    axes = px.plot.lut_trajectories(luts)
    tables = np.asarray(luts, np.float64).reshape(5, 4)
    np.testing.assert_array_equal([line.get_ydata() for line in axes.lines], tables.T)
    assert not axes.child_axes


@pytest.mark.parametrize(
    ("luts", "steps", "message"),
    [
        (np.zeros((0, 4)), None, "the tables of all steps"),
        (np.zeros(4), None, "the tables of all steps"),
        (np.zeros((5, 2, 3, 4, 1)), None, r"such as luts\[:, 0, 0\]"),
        (np.zeros((5, 1, 1, 4, 2)), None, "tables of vectors"),
        (np.full((5, 4), np.nan), None, "NaN"),
        (np.zeros((5, 4)), np.arange(3), "a number for each table"),
    ],
)
def test_no_trajectories(luts, steps, message, unchecked):
    with pytest.raises(ValueError, match=message):
        px.plot.lut_trajectories(luts, steps=steps)


def test_one_of_several_groups_is_what_the_error_says():
    assert len(px.plot.lut_trajectories(np.zeros((5, 2, 3, 4, 1))[:, 0, 0]).lines) == 4


def test_rate_and_distortion_are_those_of_the_leaves():
    leaves = [reported(b)["first/kernel"] for b in BITS]
    drawn = lines(px.plot.rate_distortion({"one table": leaves[::-1]}))
    np.testing.assert_array_equal(drawn["one table"], [(leaf.bits_per_weight, leaf.sqnr) for leaf in leaves])
    guide = drawn["Gaussian bound, 6.02 dB a bit"]
    np.testing.assert_allclose(guide[:, 1], 20 * np.log10(2) * guide[:, 0])
    # These weights are Gaussian.
    assert (drawn["one table"][:, 1] < np.interp(drawn["one table"][:, 0], *guide.T)).all()


def test_no_rates_to_draw(unchecked):
    with pytest.raises(ValueError, match="nothing to draw"):
        px.plot.rate_distortion({})
    with pytest.raises(ValueError, match="'a' has no points"):
        px.plot.rate_distortion({"a": []})
    with pytest.raises(ValueError, match="give a leaf: report"):
        px.plot.rate_distortion({"a": [reported(2)]})


def test_every_family_is_drawn():
    families = {f"family {n}": [(10**6 * (n + 1), 0.9, "4 bits"), (10**7, 0.9 + n / 100, "8 bits")] for n in range(8)}
    drawn = lines(px.plot.accuracy_against_size(families, (4 * 10**7, 0.98)))
    for label, points in families.items():
        np.testing.assert_allclose(drawn[label], [(size / 1e6, 100 * score) for size, score, _ in points])
    assert drawn["float16"].tolist() == [[40, 98]]
    with pytest.raises(ValueError, match="nothing to draw"):
        px.plot.accuracy_against_size({}, (4, 0.5))


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: px.plot.histogram(WEIGHTS, small(2)["first"]["kernel"], ax=ax),
        lambda ax: px.plot.error_against_bits(WEIGHTS, FITS, ax=ax),
        lambda ax: px.plot.report_heat_map(reported(2), ax=ax),
        lambda ax: px.plot.lut_trajectories(np.zeros((3, 2)), WEIGHTS, ax=ax),
        lambda ax: px.plot.rate_distortion({"one": [reported(2)["last"]]}, ax=ax),
        lambda ax: px.plot.accuracy_against_size({"one": [(10**6, 0.9, "4 bits")]}, (10**7, 0.9), ax=ax),
    ],
)
def test_axes_that_are_given_are_used(draw):
    figure, ax = pyplot.subplots()
    assert draw(ax) is ax
    figure.canvas.draw()
    assert pyplot.get_fignums() == [figure.number]
