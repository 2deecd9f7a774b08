"""Fake quantization of activations, against torch and against what a scale, a zero point and a moving average are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx

import palettax as px
from palettax.activations import fake_quantize, scale_and_zero_point

RANGES = [(-1.0, 1.0), (-0.31, 2.7), (-5.0, 0.1), (0.5, 3.0), (-3.0, -0.5), (7.0, 7.0), (-1e-30, 3e-30), (-1e30, 1e29)]
LEVELS = {"int8": (-128, 127), "uint8": (0, 255)}
FLOATS = [jnp.float32, jnp.float16, jnp.bfloat16]

ranges = pytest.mark.parametrize(("low", "high"), RANGES)
dtypes = pytest.mark.parametrize("dtype", LEVELS)
floats = pytest.mark.parametrize("float_dtype", FLOATS, ids=lambda d: d.__name__)


def spread(low, high, n=5000):
    """Values in the range and on both sides of it, its ends and zero included."""
    width = max(high, 0.0) - min(low, 0.0)
    values = np.random.default_rng(0).uniform(min(low, 0.0) - width, max(high, 0.0) + width, n)
    return np.append(values, [low, high, 0.0]).astype(np.float32)


def by_torch(values, low, high, dtype, cotangent):
    scale, zero_point = scale_and_zero_point(low, high, dtype)
    leaf = torch.from_numpy(values).requires_grad_()
    result = torch.fake_quantize_per_tensor_affine(leaf, float(scale), int(zero_point), *LEVELS[dtype])
    result.backward(torch.from_numpy(cotangent))
    assert leaf.grad is not None
    return result.detach().numpy(), leaf.grad.numpy()


@ranges
@dtypes
@pytest.mark.parametrize("jit", [False, True])
def test_values_and_gradients_are_those_of_torch(low, high, dtype, jit):
    values = spread(low, high)
    cotangent = np.random.default_rng(1).standard_normal(len(values)).astype(np.float32)
    expected, expected_gradient = by_torch(values, low, high, dtype, cotangent)
    function = jax.jit(fake_quantize, static_argnums=3) if jit else fake_quantize
    result, pullback = jax.vjp(lambda v: function(v, low, high, dtype), jnp.asarray(values))
    (gradient,) = pullback(jnp.asarray(cotangent))
    scale, _ = scale_and_zero_point(low, high, dtype)
    # An ulp in the scale moves values that lie between two levels to the other one.
    tie = np.abs(values / np.float32(scale) % 1 - 0.5) < 1e-3
    assert tie.mean() < 0.05
    np.testing.assert_allclose(result[~tie], expected[~tie], rtol=1e-6)
    np.testing.assert_array_equal(gradient[~tie], expected_gradient[~tie])
    np.testing.assert_allclose(result[tie], expected[tie], atol=1.001 * float(scale), rtol=0)
    assert 0 < np.count_nonzero(gradient) < len(values)


@dtypes
@pytest.mark.parametrize(("low", "high"), RANGES[1:6])  # no tie, and above the epsilon that torch adds
def test_scale_and_zero_point_are_those_of_torch(low, high, dtype):
    observer = torch.ao.quantization.MinMaxObserver(dtype=torch.qint8 if dtype == "int8" else torch.quint8)
    observer(torch.tensor([low, high]))
    scale, zero_point = scale_and_zero_point(low, high, dtype)
    expected_scale, expected_zero_point = observer.calculate_qparams()
    np.testing.assert_allclose(scale, expected_scale.item(), rtol=1e-6)
    assert int(zero_point) == expected_zero_point.item()
    assert zero_point.dtype == dtype


@pytest.mark.parametrize("end", [1.0, 0.1, 0.7, 3e-30, 3e38, np.pi])
def test_of_a_symmetric_range_the_middle_level_is_zero(end):
    """There low / scale = -127.5 is a tie, which rounds to the even -128, compiled or not."""
    for function in (scale_and_zero_point, jax.jit(scale_and_zero_point)):
        assert function(-end, end)[1] == 0


@ranges
@dtypes
@floats
def test_zero_is_exact_and_levels_are_few_and_kept(low, high, dtype, float_dtype):
    values = jnp.asarray(spread(low, high)).astype(float_dtype)
    values = values[jnp.isfinite(values)]
    result = fake_quantize(values, low, high, dtype)
    assert result.dtype == float_dtype
    assert jnp.isfinite(result).all()
    assert len(np.unique(np.asarray(result, np.float32))) <= 256
    assert fake_quantize(jnp.zeros((), float_dtype), low, high, dtype) == 0
    assert (jnp.sign(result) * jnp.sign(values) >= 0).all()
    if float_dtype != jnp.bfloat16:
        np.testing.assert_array_equal(fake_quantize(result, low, high, dtype), result)


@ranges
@dtypes
def test_what_lies_in_the_range_moves_by_half_a_step_at_most(low, high, dtype):
    values = np.linspace(min(low, 0), max(high, 0), 3001, dtype=np.float32)
    result = np.asarray(fake_quantize(values, low, high, dtype), np.float64)
    scale = float(scale_and_zero_point(low, high, dtype)[0])
    # At the ends, rounding the zero point costs another half a step at most.
    assert np.abs(result - values)[1500] <= 0.5001 * scale
    assert np.abs(result - values).max() <= 0.5001 * scale
    assert (np.diff(result) >= 0).all()


@ranges
def test_both_dtypes_stand_for_the_same_values(low, high):
    values = spread(low, high)
    np.testing.assert_array_equal(fake_quantize(values, low, high, "int8"), fake_quantize(values, low, high, "uint8"))
    signed, unsigned = (scale_and_zero_point(low, high, dtype) for dtype in ("int8", "uint8"))
    assert signed[0] == unsigned[0]
    assert int(signed[1]) + 128 == int(unsigned[1])


def test_forward_mode_and_vmap():
    values = spread(-1.0, 1.0)
    primal, tangent = jax.jvp(lambda v: fake_quantize(v, -1.0, 1.0), (values,), (np.ones_like(values),))
    gradient = jax.grad(lambda v: fake_quantize(v, -1.0, 1.0).sum())(values)
    np.testing.assert_array_equal(tangent, gradient)
    lows, highs = jnp.array([-1.0, -2.0]), jnp.array([1.0, 0.5])
    rows = jax.vmap(fake_quantize, (None, 0, 0))(values, lows, highs)
    np.testing.assert_array_equal(rows[0], primal)
    np.testing.assert_array_equal(rows, fake_quantize(np.stack([values] * 2), lows[:, None], highs[:, None]))


def test_the_range_gets_no_gradient():
    slopes = jax.grad(lambda low, high: fake_quantize(spread(-1.0, 1.0), low, high).sum(), argnums=(0, 1))(-1.0, 1.0)
    assert slopes == (0, 0)


def test_no_range_and_values_that_are_not_finite():
    values = np.array([np.nan, np.inf, -np.inf, 0.3], np.float32)
    np.testing.assert_array_equal(fake_quantize(values, 0.0, 0.0), values)
    result, pullback = jax.vjp(lambda v: fake_quantize(v, -128.0, 127.0), values)
    np.testing.assert_array_equal(result, np.array([np.nan, 127, -128, 0], np.float32))
    np.testing.assert_array_equal(pullback(jnp.ones(4))[0], [0, 0, 0, 1])


@floats
def test_ranges_as_wide_as_the_dtype(float_dtype):
    largest = float(jnp.finfo(float_dtype).max)
    values = jnp.array([-largest, 0, largest], float_dtype)
    for low, high in [(-largest, largest), (0.0, largest), (-largest, 0.0), (-largest / 3, largest)]:
        assert jnp.isfinite(fake_quantize(values, low, high)).all()


class Identity(nnx.Module):
    """Gives back its input, so that a test chooses the outputs."""

    def __call__(self, values, *, times=1):
        return values * times


class LinenIdentity(linen.Module):
    def __call__(self, values, *, times=1):
        return values * times


class NNX:
    """Trains and evaluates a wrapped NNX module; the same for Linen below, so that every law runs on both."""

    identity = Identity

    def __init__(self, module, **options):
        self.model = px.fake_quantize_activations(module, **options)

    def train(self, *args, **kwargs):
        self.model.train()
        return nnx.jit(lambda model: model(*args, **kwargs))(self.model)

    def eval(self, *args, **kwargs):
        self.model.eval()
        return nnx.jit(lambda model: model(*args, **kwargs))(self.model)

    def range(self):
        return self.model.low[...], self.model.high[...]


class Linen:
    identity = LinenIdentity

    def __init__(self, module, **options):
        self.model, self.variables = px.fake_quantize_activations(module, **options), {}

    def train(self, *args, **kwargs):
        if not self.variables:
            self.variables = self.model.init(jax.random.key(0), *args, use_running_average=False, **kwargs)
            assert self.range() == (0, 0)
        call = jax.jit(lambda v: self.model.apply(v, *args, use_running_average=False, mutable="batch_stats", **kwargs))
        result, update = call(self.variables)
        self.variables = {**self.variables, **update}
        return result

    def eval(self, *args, **kwargs):
        if not self.variables:
            self.variables = self.model.init(jax.random.key(0), *args, use_running_average=True, **kwargs)
        return self.model.clone(use_running_average=True).apply(self.variables, *args, **kwargs)

    def range(self):
        return self.variables["batch_stats"]["low"], self.variables["batch_stats"]["high"]


both = pytest.mark.parametrize("kind", [NNX, Linen])


def batches(n=6):
    generator = np.random.default_rng(2)
    return [
        generator.normal(generator.normal(), generator.uniform(0.5, 4), (32, 3)).astype(np.float32) for _ in "a" * n
    ]


@both
@dtypes
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 1.0])
def test_the_range_is_a_moving_average(kind, dtype, momentum):
    wrapped = kind(kind.identity(), dtype=dtype, momentum=momentum)
    low = high = None
    for batch in batches():
        result = wrapped.train(batch)
        low = batch.min() if low is None else momentum * low + (1 - momentum) * batch.min()
        high = batch.max() if high is None else momentum * high + (1 - momentum) * batch.max()
        np.testing.assert_allclose(wrapped.range(), (low, high), rtol=1e-5)
        np.testing.assert_allclose(result, fake_quantize(batch, *wrapped.range(), dtype), rtol=1e-6)


@both
def test_the_moving_average_is_that_of_torch(kind):
    observer = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.1)
    wrapped = kind(kind.identity(), momentum=0.9)
    for batch in batches():
        observer(torch.from_numpy(batch))
        wrapped.train(batch)
    np.testing.assert_allclose(wrapped.range(), (observer.min_val.item(), observer.max_val.item()), rtol=1e-5)


@both
def test_eval_uses_the_range_and_leaves_it(kind):
    wrapped = kind(kind.identity())
    for batch in batches(2):
        wrapped.train(batch)
    before = wrapped.range()
    wide = 100 * batches(1)[0]
    np.testing.assert_allclose(wrapped.eval(wide), fake_quantize(wide, *before), rtol=1e-6)
    assert wrapped.range() == before


@both
@floats
def test_eval_before_any_training_changes_nothing(kind, float_dtype):
    batch = jnp.asarray(batches(1)[0], float_dtype)
    result = kind(kind.identity()).eval(batch)
    assert result.dtype == float_dtype
    np.testing.assert_array_equal(result, batch)


@both
@floats
def test_statistics_are_float32_and_outputs_keep_their_dtype(kind, float_dtype):
    wrapped = kind(kind.identity())
    batch = jnp.asarray(batches(1)[0], float_dtype)
    assert wrapped.train(batch).dtype == float_dtype
    assert all(end.dtype == jnp.float32 and end.shape == () for end in wrapped.range())
    assert wrapped.range() == (batch.min(), batch.max())


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("first", [False, True])
def test_a_batch_that_is_not_finite_moves_nothing(kind, bad, first):
    wrapped, batch = kind(kind.identity(), momentum=0.5), batches(1)[0]
    poisoned = 3 * batch
    poisoned[4, 1] = bad
    if not first:
        wrapped.train(batch)
    wrapped.train(poisoned)
    if not first:
        assert wrapped.range() == (batch.min(), batch.max())
    wrapped.train(batch)
    np.testing.assert_allclose(wrapped.range(), (batch.min(), batch.max()), rtol=1e-6)


@both
@pytest.mark.parametrize("constant", [5.0, -0.125, 1e-30, 0.0])
def test_constant_outputs_come_back(kind, constant):
    wrapped, batch = kind(kind.identity()), np.full((4, 3), constant, np.float32)
    for _ in range(3):
        np.testing.assert_allclose(wrapped.train(batch), batch, rtol=1e-6)
    np.testing.assert_allclose(wrapped.eval(batch), batch, rtol=1e-6)


@both
def test_a_layer_that_starts_at_zero_can_leave_it(kind):
    wrapped, batch = kind(kind.identity()), batches(1)[0]
    wrapped.train(np.zeros((4, 3), np.float32))
    wrapped.train(np.zeros((0, 3), np.float32))
    wrapped.train(batch)
    assert wrapped.range() == (batch.min(), batch.max())


@both
def test_arguments_are_passed_on(kind):
    wrapped, batch = kind(kind.identity()), batches(1)[0]
    wrapped.train(batch, times=2)
    assert wrapped.range() == (2 * batch.min(), 2 * batch.max())


def test_the_mode_reaches_a_module_that_has_one():
    batch = 3 + batches(1)[0]
    inner = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    px.fake_quantize_activations(inner)(batch, use_running_average=True)
    assert (inner.mean[...] == 0).all()
    wrapped = px.fake_quantize_activations(linen.BatchNorm())
    variables = wrapped.init(jax.random.key(0), batch, use_running_average=False)
    _, update = wrapped.apply(variables, batch, use_running_average=False, mutable=["batch_stats"])
    assert (update["batch_stats"]["module"]["mean"] != 0).all()
    evaluated = wrapped.apply({**variables, **update}, batch, use_running_average=True)
    assert evaluated.shape == batch.shape


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = px.fake_quantize_activations(nnx.Linear(3, 16, rngs=rngs), momentum=0.9)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, values):
        return self.out(self.dropout(nnx.relu(self.hidden(values))))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, values, *, train):
        hidden = px.fake_quantize_activations(linen.Dense(16, name="hidden"), momentum=0.9)
        return linen.Dense(1)(linen.relu(hidden(values, use_running_average=not train)))


class LinenSetup(linen.Module):
    def setup(self):
        self.hidden = px.fake_quantize_activations(linen.Dense(16))

    def __call__(self, values):
        return self.hidden(values, use_running_average=False)


def problem():
    inputs = jnp.asarray(np.random.default_rng(3).standard_normal((64, 3)), jnp.float32)
    return inputs, inputs @ jnp.array([[1.0], [-2.0], [0.5]])


def test_an_nnx_model_trains_under_jit_without_compiling_again():
    model = Net(nnx.Rngs(0))
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 4
    assert len(jax.tree.leaves(nnx.state(model, nnx.BatchStat))) == 2
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    inputs, targets = problem()
    traces = []

    @nnx.jit
    def step(model, optimizer, inputs, targets):
        traces.append(1)
        loss, gradients = nnx.value_and_grad(lambda m: ((m(inputs) - targets) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, inputs, targets)) for _ in range(100)]
    assert losses[-1] < losses[0] / 4
    assert len(traces) == 1
    assert model.hidden.low[...] < 0 < model.hidden.high[...]

    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    copy.eval()
    evaluated = copy(inputs)
    np.testing.assert_array_equal(nnx.view(model, deterministic=True, use_running_average=True)(inputs), evaluated)
    assert copy.hidden.low[...] == model.hidden.low[...]
    assert len(np.unique(copy.hidden(inputs))) <= 256


def test_a_linen_model_trains_under_jit_without_compiling_again():
    model, (inputs, targets) = LinenNet(), problem()
    variables = model.init(jax.random.key(0), inputs, train=True)
    params, stats = variables["params"], variables["batch_stats"]
    assert set(params) == {"hidden", "Dense_0"}
    optimizer = optax.adam(1e-2)
    traces = []

    @jax.jit
    def step(params, stats, state):
        traces.append(1)

        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            outputs, update = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
            return ((outputs - targets) ** 2).mean(), update["batch_stats"]

        (loss, stats_now), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), stats_now, state, loss

    state, losses = optimizer.init(params), []
    for _ in range(100):
        params, stats, state, loss = step(params, stats, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4
    assert len(traces) == 1
    before = jax.tree.leaves(stats)
    _, update = model.apply({"params": params, "batch_stats": stats}, inputs, train=False, mutable=["batch_stats"])
    assert jax.tree.leaves(update["batch_stats"]) == before


def test_a_linen_model_with_setup():
    inputs, _ = problem()
    variables = LinenSetup().init(jax.random.key(0), inputs)
    outputs, update = LinenSetup().apply(variables, inputs, mutable=["batch_stats"])
    assert set(update["batch_stats"]["hidden"]) == {"low", "high"}
    assert len(np.unique(outputs)) <= 256


def test_linen_asks_for_the_mode():
    with pytest.raises(ValueError, match="use_running_average"):
        px.fake_quantize_activations(linen.Dense(2)).init(jax.random.key(0), jnp.ones((1, 2)))


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments():
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"dtype='int4'; give 'int8' or 'uint8'"):
        px.fake_quantize_activations(linear, "int4")
    with pytest.raises(ValueError, match=r"dtype='float32'; give 'int8' or 'uint8'"):
        fake_quantize(np.ones(3, np.float32), 0.0, 1.0, "float32")
    for momentum in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"momentum=.*; give a number from 0 to 1"):
            px.fake_quantize_activations(linear, momentum=momentum)
    with pytest.raises(ValueError, match=r"found a function, no Flax module; give an instance"):
        px.fake_quantize_activations(lambda values: values)
    with pytest.raises(ValueError, match=r"found a Linear, no Flax module"):
        px.fake_quantize_activations(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"found the class Linear, no Flax module; give an instance"):
        px.fake_quantize_activations(nnx.Linear)


@both
@pytest.mark.parametrize(
    ("output", "found"), [((np.ones(2), np.ones(2)), "tuple"), (np.arange(3), "int"), (1.5, "float")], ids=str
)
def test_outputs_that_cannot_be_quantized(kind, output, found):
    bases = (nnx.Module,) if kind is NNX else (linen.Module,)
    module = type("Odd", bases, {"__call__": lambda self: output})()
    with pytest.raises(ValueError, match=rf"Odd gave {found}.*; wrap a module whose output is one float array"):
        kind(module).train()
