"""`dkm` in training loops as people write them."""

import subprocess
import sys
from functools import cache

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import palettax as px
from palettax.leaf import is_palettized
from tests.tables import data

INPUTS = data("normal", 16 * 8, seed=2).reshape(16, 8).astype(np.float32)
TARGETS = data("normal", 16 * 10, seed=3).reshape(16, 10).astype(np.float32)
DRIFT = data("normal", 80, seed=1).reshape(8, 10).astype(np.float32)


def soft(nbits=2, **options):
    return px.dkm(nbits, weight_threshold=10, **options)


MAKES = {"dkm": soft, "straight through": lambda **options: px.straight_through(2, weight_threshold=10, **options)}
both = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def start(seed=0):
    """A linear layer, (8, 10), and its bias, which has no table."""
    return {"w": jnp.asarray(data("normal", 80, seed).reshape(8, 10), jnp.float32), "bias": jnp.zeros(10)}


def loss_of(transform, forward=lambda params, x: x @ params["w"] + params["bias"]):
    def loss(params, state, x=INPUTS, y=TARGETS):
        values, state = transform.update(params, state)
        return ((forward(values, x) - y) ** 2).mean(), state

    return loss


def step_of(transform, optimizer, loss=None):
    """A step of training: (params, state, moments) -> (the same, loss)."""
    loss = loss or loss_of(transform)

    def step(carry, _=None):
        params, state, moments = carry
        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state)
        change, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, change), state, moments), value

    return step


def begin(transform, optimizer, params=None):
    params = start() if params is None else params
    return params, transform.init(params), optimizer.init(params)


def assert_close(found, expected, tolerance=1e-4):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance / 10)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@both
def test_a_scan_is_a_loop_and_a_schedule_is_not_traced_anew(make):
    """The state is a carry; the loss falls; a step that is compiled once serves all temperatures."""
    options = {"temperature": optax.linear_schedule(2.0, 0.1, 20)} if make is soft else {}
    transform, optimizer, traces = make(**options), optax.adam(0.02), []

    @jax.jit
    def step(carry):
        traces.append(1)
        return step_of(transform, optimizer)(carry)

    carry, losses = begin(transform, optimizer), []
    for _ in range(20):
        carry, value = step(carry)
        losses.append(float(value))
    assert len(traces) == 1
    assert int(carry[1].count) == 20
    assert min(losses[10:]) < losses[0]
    scanned, values = jax.lax.scan(step_of(transform, optimizer), begin(transform, optimizer), length=20)
    np.testing.assert_allclose(values[:5], losses[:5], rtol=1e-4)
    # What rounds otherwise may lead to another cell: some steps later, all that can be said is how good it is.
    np.testing.assert_allclose(values, losses, rtol=0.05)
    assert int(scanned[1].count) == 20


def test_training_finds_weights_that_lie_on_a_table():
    """Of a layer with four values: what is stored fits better than kmeans of the weights that training began with."""
    key = jax.random.key(0)
    best = jnp.asarray([-1.0, -0.2, 0.3, 0.9])[jax.random.randint(key, (8, 10), 0, 4)]
    inputs = jax.random.normal(key, (64, 8))
    targets = inputs @ best
    noisy = {"w": best + 0.3 * jax.random.normal(key, (8, 10)), "bias": jnp.zeros(10)}
    transform, optimizer = soft(temperature=optax.linear_schedule(1.0, 1e-4, 150)), optax.adam(0.02)

    def loss(params, state):
        values, state = transform.update(params, state)
        return ((inputs @ values["w"] + values["bias"] - targets) ** 2).mean(), state

    train = jax.jit(lambda carry: jax.lax.scan(step_of(transform, optimizer, loss), carry, length=200)[0])
    params, state, _ = train(begin(transform, optimizer, noisy))

    def error(params):
        return float(((inputs @ px.depalettize(params)["w"] + params["bias"] - targets) ** 2).mean())

    small = transform.finalize(params, state)
    assert error(small) < 0.5 * error(px.by_path([("w", px.kmeans(2))]).finalize(noisy, ((), ())))
    assert len(np.unique(small["w"].depalettize())) == 4


@cache
def thirty_steps():
    """Of gradient descent towards `DRIFT`, in units of the weights; compiled once."""
    transform = soft()

    @jax.jit
    def run(params, state, scale):
        def step(carry, _):
            params, state = carry

            def loss(params):
                values, new = transform.update(params, state)
                return 0.5 * ((values["w"] - DRIFT * scale) ** 2).sum(), new

            (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            return (jax.tree.map(lambda w, g: w - 0.02 * g, params, gradient), state), value

        return jax.lax.scan(step, (params, state), length=30)

    return transform, run


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e4])
def test_no_scale_of_weights_collapses(scale):
    transform, run = thirty_steps()
    params = {"w": start()["w"] * scale, "bias": jnp.zeros(10)}
    (params, state), losses = run(params, transform.init(params), scale)
    assert losses[-1] < losses[0]
    small = transform.finalize(params, state)["w"].validate()
    assert np.bincount(np.asarray(small.indices).reshape(-1), minlength=4).min() > 0
    assert len(np.unique(np.round(np.float64(small.lut) / scale, 3))) == 4


def test_flax_nnx():
    graph, params = nnx.split(nnx.Sequential(nnx.Linear(8, 10, rngs=nnx.Rngs(0)), nnx.relu))
    transform, optimizer = soft(), optax.adam(0.02)
    loss = loss_of(transform, lambda values, x: nnx.merge(graph, values)(x))
    step = jax.jit(step_of(transform, optimizer, loss))
    carry = begin(transform, optimizer, params)
    assert set(carry[1].luts) == {"layers/0/kernel"}
    losses = []
    for _ in range(5):
        carry, value = step(carry)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    params, state, _ = carry
    small = transform.finalize(params, state)
    assert [is_palettized(leaf) for leaf in jax.tree.leaves(small, is_leaf=is_palettized)] == [False, True]
    trained = nnx.merge(graph, px.depalettize(small))
    assert len(np.unique(trained.layers[0].kernel[...])) == 4
    assert np.isfinite(trained(INPUTS)).all()


def test_flax_linen():
    model = nn.Dense(10)
    params = model.init(jax.random.key(0), INPUTS)
    transform, optimizer = soft(), optax.sgd(0.05)
    step = jax.jit(step_of(transform, optimizer, loss_of(transform, model.apply)))
    carry = begin(transform, optimizer, params)
    assert set(carry[1].luts) == {"params/kernel"}
    carry, first = step(carry)
    for _ in range(4):
        carry, last = step(carry)
    assert float(last) < float(first)
    small = transform.finalize(*carry[:2])
    predicted = model.apply(px.depalettize(small), INPUTS)
    expected = INPUTS @ np.asarray(small["params"]["kernel"].depalettize()) + small["params"]["bias"]
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


def test_equinox():
    model = eqx.nn.MLP(8, 10, width_size=10, depth=0, key=jax.random.key(0))
    transform = soft()
    state = transform.init(model)
    assert set(state.luts) == {"layers/0/weight"}

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def whole(model, state):
        values, state = transform.update(model, state)
        return ((jax.vmap(values)(INPUTS) - TARGETS) ** 2).mean(), state

    (value, after), gradient = whole(model, state)
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def parts(arrays, state):
        values, state = transform.update(arrays, state)
        return ((jax.vmap(eqx.combine(values, static))(INPUTS) - TARGETS) ** 2).mean(), state

    (other, others), slope = jax.value_and_grad(parts, has_aux=True)(arrays, state)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    assert_close(after, others)
    assert_close(jax.tree.leaves(gradient), jax.tree.leaves(slope))
    assert np.abs(gradient.layers[0].weight).max() > 0
    small = transform.finalize(model, after)
    assert small.activation is model.activation
    assert is_palettized(small.layers[0].weight)
    assert np.isfinite(jax.vmap(px.depalettize(small))(INPUTS)).all()


def test_accumulated_gradients():
    """Weights move in every second step, by the mean of the two gradients; tables move in every one."""
    transform, optimizer = soft(), optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
    loss = loss_of(transform)
    step = jax.jit(step_of(transform, optimizer, loss))
    slope = jax.jit(jax.grad(loss, has_aux=True))
    carry = begin(transform, optimizer)
    for _ in range(2):
        params, state, _ = carry
        one, halfway = slope(params, state)
        other, after = slope(params, halfway)
        carry, _ = step(carry)
        assert_equal(carry[0], params)
        carry, _ = step(carry)
        expected = jax.tree.map(lambda w, a, b: w - 0.1 * (a + b) / 2, params, one, other)
        assert_close(carry[0], expected, 1e-5)
        assert_close(carry[1], after, 1e-5)
    assert int(carry[1].count) == 4


def test_a_rematerialized_forward_pass():
    transform = soft()
    state = transform.init(start())
    plain = loss_of(transform)
    (value, after), gradient = jax.value_and_grad(plain, has_aux=True)(start(), state)
    (again, others), slope = jax.value_and_grad(jax.checkpoint(plain), has_aux=True)(start(), state)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert_close(others, after, 1e-5)
    assert_close(slope, gradient)


def test_an_ensemble():
    """`vmap` over models and their states is a loop over them."""
    transform = soft()
    members = [start(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    states = jax.vmap(transform.init)(stacked)
    assert_close(states, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(transform.init, members)), 1e-6)
    moved = stacked | {"w": stacked["w"] + 0.1 * DRIFT}

    def one(params, state):
        values, state = transform.update(params, state)
        return (values["w"] * DRIFT).sum(), (values, state)

    gradient, (values, after) = jax.vmap(jax.grad(one, has_aux=True))(moved, states)
    for i in range(3):
        params, state = jax.tree.map(lambda a, i=i: a[i], (moved, states))
        slope, (own, new) = jax.grad(one, has_aux=True)(params, state)
        found = jax.tree.map(lambda a, i=i: a[i], (values, after, gradient))
        assert_close(found[:2], (own, new))
        assert_close(found[2], slope, 1e-3)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """Bit for bit, as if it had not stopped."""
    transform, optimizer = soft(temperature=optax.linear_schedule(2.0, 0.1, 6)), optax.sgd(0.05)
    step = jax.jit(step_of(transform, optimizer))
    carry = begin(transform, optimizer)
    for _ in range(3):
        carry, _ = step(carry)
    params, state, moments = carry
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, {"params": params, "state": transform.init(start())})
        found = checkpointer.restore(tmp_path / "step", like)
    by_orbax = found["params"], found["state"], moments
    px.save(tmp_path / "step.safetensors", {"params": params, "state": state})
    found = px.load(tmp_path / "step.safetensors")
    by_file = found["params"], px.DkmState(**found["state"]), moments
    assert_equal(by_orbax, carry)
    assert_equal(by_file, carry)
    for _ in range(3):
        carry, value = step(carry)
        by_orbax, one = step(by_orbax)
        by_file, other = step(by_file)
        assert float(value) == float(one) == float(other)
    assert_equal(by_orbax, carry)
    assert_equal(by_file, carry)
    assert_equal(transform.finalize(*by_file[:2]), transform.finalize(*carry[:2]))


DEVICES = """
import jax, jax.numpy as jnp, numpy as np, palettax as px
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("x",))
on = lambda *axes: NamedSharding(mesh, P(*axes))
random = np.random.default_rng(0)
inputs, targets = (random.standard_normal((16, n)).astype(np.float32) for n in (8, 10))
params = {"w": random.standard_normal((8, 10)).astype(np.float32), "bias": np.zeros(10, np.float32)}
transform = px.dkm(2, weight_threshold=10)

@jax.jit
def step(params, state, x, y):
    def loss(params):
        values, new = transform.update(params, state)
        return ((x @ values["w"] + values["bias"] - y) ** 2).mean(), new
    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda w, g: w - 0.05 * g, params, gradient), state, value

def run(params, x, y):
    state = transform.init(params)
    for _ in range(3):
        params, state, value = step(params, state, x, y)
    return params, state, value

alone = run(jax.tree.map(jnp.asarray, params), inputs, targets)
batch = jax.device_put((inputs, targets), on("x"))
replicated = run(jax.device_put(params, on()), *batch)
sharded = run({"w": jax.device_put(params["w"], on("x")), "bias": params["bias"]}, inputs, targets)
for found in (replicated, sharded):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
assert len(sharded[0]["w"].sharding.device_set) == 4
expected = transform.finalize(*alone[:2])["w"].depalettize()
for found in (replicated, sharded):
    small = transform.finalize(*found[:2])["w"].validate()
    np.testing.assert_allclose(small.depalettize(), expected, rtol=1e-4, atol=1e-5)
    assert small.indices.sharding.device_set == found[0]["w"].sharding.device_set
print("done", len(jax.devices()))
"""


def test_on_several_devices_it_is_the_same():
    """Examples spread over devices and weights on all of them, or weights spread over devices."""
    code = "import jax; jax.config.update('jax_num_cpu_devices', 4)\n" + DEVICES
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "done 4", run.stderr
