"""Layers that go along a sequence: the time first, then the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from palettax.coreml.mil.linear import linear
from palettax.coreml.mil.values import Array, Function

_ACTIVATIONS = {
    "hard_sigmoid": lambda x: jnp.clip(0.2 * x + 0.5, 0, 1),
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "scaled_tanh": lambda x: 1.7159 * jnp.tanh(2 / 3 * x),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def lstm(
    x: Array,
    initial_h: Array,
    initial_c: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Any = None,
    peephole: Any = None,
    weight_ih_back: Any = None,
    weight_hh_back: Any = None,
    bias_back: Any = None,
    peephole_back: Any = None,
    direction: str = "forward",
    output_sequence: Any = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Any = None,
) -> tuple[Array, Array, Array]:
    """Long short-term memory (Hochreiter and Schmidhuber, 1997); gates in the order input, forget, output, cell."""
    gate, cell, out = (_ACTIVATIONS[name] for name in (recurrent_activation, cell_activation, activation))

    def run(state: Any, weight_ih: Array, weight_hh: Array, bias: Any, peephole: Any, backwards: bool) -> Any:
        p_i, p_f, p_o = (0, 0, 0) if peephole is None else jnp.split(peephole, 3)

        def step(state: Any, of_input: Array) -> Any:
            h, c = state
            i, f, o, z = jnp.split(of_input + h @ weight_hh.T, 4, axis=-1)
            z = z if clip is None else jnp.clip(z, -clip, clip)
            c_next = gate(f + p_f * c) * c + gate(i + p_i * c) * cell(z)
            h = gate(o + p_o * c_next) * out(c_next)
            return (h, c_next), h

        return jax.lax.scan(step, state, linear(x, weight_ih, bias), reverse=backwards)

    forward = (weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        (h, c), sequence = run((initial_h, initial_c), *forward, direction == "reverse")
        return (sequence if output_sequence else h[None]), h, c
    (h, h_back), (c, c_back) = jnp.split(initial_h, 2, axis=-1), jnp.split(initial_c, 2, axis=-1)
    (h, c), sequence = run((h, c), *forward, False)
    (h_back, c_back), back = run((h_back, c_back), weight_ih_back, weight_hh_back, bias_back, peephole_back, True)
    h, c, sequence = (jnp.concatenate(pair, axis=-1) for pair in ((h, h_back), (c, c_back), (sequence, back)))
    return (sequence if output_sequence else h[None]), h, c


def gru(
    x: Array,
    initial_h: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Any = None,
    direction: str = "forward",
    output_sequence: Any = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
) -> tuple[Array, Array]:
    """Gated recurrent unit (Cho et al., 2014); gates in the order reset, output, update."""
    gate, out = _ACTIVATIONS[recurrent_activation], _ACTIVATIONS[activation]

    def step(h: Array, of_input: Array) -> Any:
        (r, o, z), (h_r, h_o, h_z) = jnp.split(of_input, 3, axis=-1), jnp.split(h @ weight_hh.T, 3, axis=-1)
        r, z = gate(r + h_r), gate(z + h_z)
        h = (1 - z) * out(o + r * h_o) + z * h
        return h, h

    return _along(step, initial_h, linear(x, weight_ih, bias), direction, output_sequence)


def rnn(
    x: Array,
    initial_h: Array,
    weight_ih: Array,
    weight_hh: Array,
    bias: Any = None,
    direction: str = "forward",
    output_sequence: Any = False,
    activation: str = "tanh",
) -> tuple[Array, Array]:
    """A plain layer: h = activation(W x + V h + b)."""

    def step(h: Array, of_input: Array) -> Any:
        h = _ACTIVATIONS[activation](of_input + h @ weight_hh.T)
        return h, h

    return _along(step, initial_h, linear(x, weight_ih, bias), direction, output_sequence)


def _along(step: Function, state: Array, inputs: Array, direction: str, output_sequence: Any) -> tuple[Array, Array]:
    h, sequence = jax.lax.scan(step, state, inputs, reverse=direction == "reverse")
    return (sequence if output_sequence else h[None]), h


OPS: dict[str, Function] = {"gru": gru, "lstm": lstm, "rnn": rnn}
