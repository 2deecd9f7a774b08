"""Every op that `run` evaluates, over its parameters, beside torch, NumPy or what coremltools infers for constants."""

import re
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coreml_programs import convert, normal, outputs
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch.nn import functional as F

from palettax.coreml.mil import OPS

DTYPES = {"f": types.fp32, "i": types.int32, "b": types.bool}


def evaluated(build, *inputs, target="iOS17"):
    """What `run` gives for a program of one op."""
    specs = [mb.TensorSpec(shape=x.shape, dtype=DTYPES[x.dtype.kind]) for x in inputs]
    by_count = [lambda a: build(a), lambda a, b: build(a, b), lambda a, b, c: build(a, b, c)]
    program = mb.program(input_specs=specs, opset_version=ct.target[target])(by_count[len(inputs) - 1])
    mlmodel = convert(program, target, half=False, pass_pipeline=ct.PassPipeline.EMPTY)
    return outputs(mlmodel, inputs)


def close(found, wanted, tolerance=1e-5):
    wanted = wanted if isinstance(wanted, list | tuple) else [wanted]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        other = other.detach().numpy() if isinstance(other, torch.Tensor) else np.asarray(other)
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def positive(*shape):
    return np.abs(normal(*shape)) + 0.1


def fraction(*shape):
    return np.tanh(normal(*shape)) * 0.9


X, P = normal(2, 3, 4), positive(2, 3, 4)

ALONE = """
abs atan ceil cos cosh erf exp exp2 floor relu relu6 round sign sin sinh square tan tanh sigmoid softplus softsign
identity
"""
OVER_AXES = """
reduce_l1_norm reduce_l2_norm reduce_log_sum_exp reduce_max reduce_mean reduce_min reduce_prod reduce_sum
reduce_sum_square
"""
INFERRED = {
    **{name: (X, {}) for name in ALONE.split()},
    **{name: (X, {"axes": [0, 2], "keep_dims": "m" in name}) for name in OVER_AXES.split()},
    **{name: (fraction(2, 3, 4), {}) for name in ("acos", "asin", "atanh")},
    **{name: (P, {}) for name in ("sqrt", "log", "rsqrt", "inverse", "reduce_log_sum")},
    "clip": (X, {"alpha": -0.5, "beta": 0.25}),
    "threshold": (X, {"alpha": 0.25}),
    "clamped_relu": (X, {"alpha": 0.5, "beta": 0.75}),
    "elu": (X, {"alpha": 0.7}),
    "leaky_relu": (X, {"alpha": 0.1}),
    "linear_activation": (X, {"alpha": 2.0, "beta": -0.5}),
    "prelu": (normal(2, 3, 4, 5), {"alpha": np.array([0.1, 0.2, 0.3], np.float32)}),
    "scaled_tanh": (X, {"alpha": 2.0, "beta": 0.5}),
    "sigmoid_hard": (X, {"alpha": 0.3, "beta": 0.4}),
    "softplus_parametric": (X, {"alpha": positive(3), "beta": positive(3)}),
    "thresholded_relu": (X, {"alpha": 0.5}),
    "softmax": (X, {"axis": 1}),
    "band_part": (X, {"lower": 1, "upper": 0}),
    "flatten2d": (X, {"axis": 2}),
    "tile": (X, {"reps": [1, 2, 3]}),
    "expand_dims": (X, {"axes": [0, -1]}),
    "squeeze": (normal(1, 3, 1, 2), {"axes": [0, 2]}),
    "reshape": (X, {"shape": [0, -1, 2]}),
    "reverse": (X, {"axes": [0, 2]}),
    "transpose": (X, {"perm": [2, 0, 1]}),
    "slice_by_size": (X, {"begin": [0, 1, 2], "size": [2, 2, -1]}),
    "layer_norm": (X, {"axes": [1, 2], "gamma": positive(3, 4), "beta": normal(3, 4), "epsilon": 1e-3}),
    "l2_norm": (normal(2, 3, 4, 5), {"epsilon": 1e-3}),
    "split": (X, {"split_sizes": [1, 2], "axis": 1}),
    "reduce_argmin": (X, {"axis": 1, "keep_dims": True}),
    "reduce_argmax": (X, {"axis": -1}),
    "argsort": (X, {"axis": 1, "ascending": True}),
    "gather_along_axis": (X, {"indices": np.array([[[0, 2, 1, 0]]] * 2, np.int32), "axis": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", INFERRED)
def test_what_coremltools_infers_for_constants(name):
    x, options = INFERRED[name]
    inferred = []

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=ct.target.iOS17)
    def of_constants(unused):
        found = getattr(mb, name)(x=mb.const(val=x), **options)
        inferred.extend(var.val for var in (found if isinstance(found, list | tuple) else [found]))
        return mb.identity(x=unused)

    found = evaluated(lambda given: getattr(mb, name)(x=given, **options), x)
    assert all(value is not None for value in inferred)
    close(found, inferred)


BINARY = "add sub mul real_div maximum minimum pow floor_div mod greater greater_equal less less_equal equal not_equal"


@pytest.mark.parametrize("name", [*BINARY.split(), "logical_and", "logical_or", "logical_xor"])
@pytest.mark.parametrize("kind", ["float", "int"])
def test_two_factors(name, kind):
    if "logical" in name:
        x, y = normal(2, 3) > 0, normal(2, 3, seed=1) > 0
    elif kind == "float":
        x, y = positive(2, 3), normal(1, 3, seed=1)
    else:
        x, y = np.array([[7, -7, 5]], np.int32), np.array([[2], [3]], np.int32)
    numpy = {
        "sub": "subtract",
        "mul": "multiply",
        "real_div": "true_divide",
        "floor_div": "floor_divide",
        "pow": "power",
    }
    wanted = getattr(np, numpy.get(name, name))(x, y)
    wanted = wanted.astype(np.int32) if kind == "int" and wanted.dtype == np.float64 else wanted

    def build(a, b):
        found = getattr(mb, name)(x=a, y=b)
        return mb.cast(x=found, dtype="int32") if found.dtype == types.bool else found

    if "logical" in name:
        found = evaluated(
            lambda a, b: build(mb.cast(x=a, dtype="bool"), mb.cast(x=b, dtype="bool")),
            x.astype(np.int32),
            y.astype(np.int32),
        )
    else:
        found = evaluated(build, x, y)
    close(found, wanted.astype(np.int32) if wanted.dtype == bool else wanted)


@pytest.mark.parametrize("mode", ["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"])
def test_gelu(mode):
    x = torch.from_numpy(X)
    wanted = {"EXACT": F.gelu(x), "TANH_APPROXIMATION": F.gelu(x, approximate="tanh")}
    close(evaluated(lambda a: mb.gelu(x=a, mode=mode), X), wanted.get(mode, x * torch.sigmoid(1.702 * x)))


def test_silu_and_select_and_cast():
    close(evaluated(lambda a: mb.silu(x=a), X), F.silu(torch.from_numpy(X)))
    close(evaluated(lambda a: mb.select(cond=mb.greater(x=a, y=0.0), a=a, b=mb.mul(x=a, y=-1.0)), X), np.abs(X))
    close(evaluated(lambda a: mb.cast(x=a, dtype="int32"), 3 * X), (3 * X).astype(np.int32))
    close(
        evaluated(lambda a: mb.cast(x=mb.logical_not(x=mb.cast(x=a, dtype="bool")), dtype="int32"), np.int32([0, 2])),
        np.array([1, 0]),
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", ["valid", "same", "same_lower", "custom"])
def test_conv(rank, groups, how):
    x, weight = normal(2, 4, *(9,) * rank), normal(6, 4 // groups, *(4, 3, 2)[:rank])
    strides, dilations, pad = [2, 1, 2][:rank], [1, 2, 1][:rank], [1, 2, 0, 1, 2, 0][: 2 * rank]
    spatial = np.array(weight.shape[2:])
    extent = np.array(dilations) * (spatial - 1) + 1
    total = np.maximum((-(-9 // np.array(strides)) - 1) * strides + extent - 9, 0)
    half = {"same": total // 2, "same_lower": total - total // 2}.get(how, 0 * total)
    pairs = (
        np.reshape(pad, (-1, 2)) if how == "custom" else np.stack([half, (total if "same" in how else half) - half], 1)
    )
    padded = F.pad(torch.from_numpy(x), pairs[::-1].ravel().tolist())
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    bias = normal(6)
    wanted = convolve(padded, torch.from_numpy(weight), torch.from_numpy(bias), strides, 0, dilations, groups)
    options = {"pad": pad} if how == "custom" else {}
    given = {"weight": weight, "bias": bias, "strides": strides, "dilations": dilations, "groups": groups, **options}
    close(evaluated(lambda a: mb.conv(x=a, pad_type=how, **given), x), wanted, 1e-4)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", ["valid", "same", "custom", "shape"])
def test_conv_transpose(rank, groups, how):
    x, weight, bias = normal(2, 4, *(5,) * rank), normal(4, 6 // groups, *(4, 3)[:rank]), normal(6)
    strides, dilations, pad = [2, 3][:rank], [1, 2][:rank], [1, 2, 0, 1][: 2 * rank]
    convolve = (F.conv_transpose1d, F.conv_transpose2d)[rank - 1]
    whole = convolve(torch.from_numpy(x), torch.from_numpy(weight), None, strides, 0, 0, groups, dilations).numpy()
    sizes = np.array(whole.shape[2:])
    low = np.zeros(rank, int)
    if how in ("custom", "shape"):
        low, high = np.reshape(pad, (-1, 2)).T
        sizes = sizes - low - high
    elif how == "same":
        sizes = 5 * np.array(strides)
        low = np.maximum(np.array(whole.shape[2:]) - sizes, 0) // 2
    wanted = whole[(..., *(slice(a, a + n) for a, n in zip(low, sizes, strict=True)))]
    options = {"pad": pad} if how in ("custom", "shape") else {}
    if how == "shape":
        options["output_shape"] = [2, 6, *sizes.tolist()]
    given = {"weight": weight, "bias": bias, "strides": strides, "dilations": dilations, "groups": groups, **options}
    kind = "custom" if how == "shape" else how
    found = evaluated(lambda a: mb.conv_transpose(x=a, pad_type=kind, **given), x)
    close(found, wanted + bias.reshape(-1, *(1,) * rank), 1e-4)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("length", [7, 8])
def test_pools(ceil, pad, length):
    x = normal(2, 3, length, 10)
    options = {"kernel_sizes": [3, 2], "strides": [2, 3], "pad_type": "custom", "pad": [pad] * 4, "ceil_mode": ceil}
    given = torch.from_numpy(x), (3, 2), (2, 3), (pad, pad)
    close(evaluated(lambda a: mb.max_pool(x=a, **options), x), F.max_pool2d(*given, 1, ceil))
    for exclude in (False, True):
        found = evaluated(lambda a, e=exclude: mb.avg_pool(x=a, exclude_padding_from_average=e, **options), x)
        close(found, F.avg_pool2d(*given, ceil, not exclude))
    if not pad and not ceil:
        found = evaluated(lambda a: mb.l2_pool(x=a, **options), x)
        close(found, F.lp_pool2d(torch.from_numpy(x), 2, (3, 2), (2, 3)))


def test_normalizations():
    x, c = normal(2, 3, 5, 6), [positive(3), normal(3), normal(3), positive(3)]
    gamma, beta, mean, variance = map(torch.from_numpy, c)
    given = {"gamma": c[0], "beta": c[1], "epsilon": 1e-3}
    t = torch.from_numpy(x)
    found = evaluated(lambda a: mb.batch_norm(x=a, mean=c[2], variance=c[3], **given), x)
    close(found, F.batch_norm(t, mean, variance, gamma, beta, eps=1e-3))
    close(evaluated(lambda a: mb.batch_norm(x=a, mean=c[2], variance=c[3]), x), F.batch_norm(t, mean, variance))
    close(evaluated(lambda a: mb.instance_norm(x=a, **given), x), F.instance_norm(t, None, None, gamma, beta, eps=1e-3))
    for size in (2, 3):
        found = evaluated(lambda a, n=size: mb.local_response_norm(x=a, size=n, alpha=0.2, beta=0.7, k=1.5), x)
        close(found, F.local_response_norm(t, size, 0.2, 0.7, 1.5))


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_matmul(transposed):
    x, y = normal(2, 1, 3, 4), normal(5, 4, 6)
    x, y = (v.swapaxes(-1, -2).copy() if t else v for v, t in zip((x, y), transposed, strict=True))
    found = evaluated(lambda a, b: mb.matmul(x=a, y=b, transpose_x=transposed[0], transpose_y=transposed[1]), x, y)
    close(found, normal(2, 1, 3, 4) @ normal(5, 4, 6))


def test_linear_and_einsum():
    x, weight, bias = normal(2, 5, 4), normal(3, 4), normal(3)
    close(evaluated(lambda a: mb.linear(x=a, weight=weight, bias=bias), x), x @ weight.T + bias)
    x, y = normal(2, 3, 4, 5), normal(2, 5, 4, 6)
    found = evaluated(lambda a, b: mb.einsum(values=(a, b), equation="abcd,adce->abce"), x, y)
    close(found, np.einsum("abcd,adce->abce", x, y))


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention(mask):
    q, k, v = normal(1, 2, 4, 8), normal(1, 2, 6, 8, seed=1), normal(1, 2, 6, 8, seed=2)
    of = {"bool": np.tril(np.ones((4, 6), bool), 1), "float": normal(4, 6), None: None}[mask]
    options = {} if of is None else {"attn_mask": of}
    build = lambda a, b, c: mb.scaled_dot_product_attention(query=a, key=b, value=c, **options)  # noqa: E731
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*tensors, None if of is None else torch.from_numpy(of))
    close(evaluated(build, q, k, v, target="iOS18"), wanted)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("sequence", [True, False])
def test_lstm(direction, sequence):
    torch.manual_seed(0)
    both = direction == "bidirectional"
    layer = torch.nn.LSTM(3, 4, bidirectional=both)
    x, h, c = normal(5, 2, 3), normal(1 + both, 2, 4, seed=1), normal(1 + both, 2, 4, seed=2)
    t = torch.from_numpy(x).flip(0) if direction == "reverse" else torch.from_numpy(x)
    out, (h_n, c_n) = layer(t, (torch.from_numpy(h), torch.from_numpy(c)))
    out = out.flip(0) if direction == "reverse" else out
    flat = lambda s: np.concatenate(list(s), axis=-1)  # noqa: E731
    gates = lambda w: np.concatenate([np.split(w.detach().numpy(), 4)[i] for i in (0, 1, 3, 2)])  # noqa: E731
    given = {}
    for back in ("", "_reverse")[: 1 + both]:
        suffix = "_back" if back else ""
        own = {name: getattr(layer, f"{name}_l0{back}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        given |= {f"weight_{way}{suffix}": gates(own[f"weight_{way}"]) for way in ("ih", "hh")}
        given[f"bias{suffix}"] = gates(own["bias_ih"] + own["bias_hh"])

    def build(a):
        return mb.lstm(
            x=a, initial_h=flat(h), initial_c=flat(c), direction=direction, output_sequence=sequence, **given
        )

    h_n, c_n = flat(h_n.detach().numpy()), flat(c_n.detach().numpy())
    close(evaluated(build, x), [out if sequence else h_n[None], h_n, c_n])


def test_gru_and_rnn():
    x, h = normal(5, 2, 3), normal(2, 4, seed=1)
    w, v, b = normal(12, 3), normal(12, 4, seed=2), normal(12, seed=3)
    sigmoid = lambda t: 1 / (1 + np.exp(-t))  # noqa: E731
    state = h
    for step in x:
        (r, o, z), (h_r, h_o, h_z) = np.split(step @ w.T + b, 3, axis=-1), np.split(state @ v.T, 3, axis=-1)
        r, z = sigmoid(r + h_r), sigmoid(z + h_z)
        state = (1 - z) * np.tanh(o + r * h_o) + z * state
    found = evaluated(lambda a: mb.gru(x=a, initial_h=h, weight_ih=w, weight_hh=v, bias=b), x)
    close(found, [state[None], state])
    layer = torch.nn.RNN(3, 4)
    weights = [
        p.detach().numpy() for p in (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0 + layer.bias_hh_l0)
    ]
    given = dict(zip(("weight_ih", "weight_hh", "bias"), weights, strict=True))
    out, last = layer(torch.from_numpy(x), torch.from_numpy(h[None]))
    close(evaluated(lambda a: mb.rnn(x=a, initial_h=h, output_sequence=True, **given), x), [out, last[0]])


def test_places():
    x = normal(3, 4, 5)
    index = np.array([[2, 0], [-1, 1]], np.int32)
    for axis in (0, 1, -1):
        close(evaluated(lambda a, b, i=axis: mb.gather(x=a, indices=b, axis=i), x, index), np.take(x, index, axis))
    found = evaluated(
        lambda a, b: mb.gather(x=a, indices=b, axis=2, batch_dims=1), x, np.array([[0, 4], [1, 1], [3, 2]], np.int32)
    )
    close(found, np.stack([x[i][:, [[0, 4], [1, 1], [3, 2]][i]] for i in range(3)]))
    nd = np.array([[2, 1], [0, 3]], np.int32)
    close(evaluated(lambda a, b: mb.gather_nd(x=a, indices=b), x, nd), x[nd[:, 0], nd[:, 1]])
    corners = {"begin": [0, -1, 1], "end": [0, 0, 5], "stride": [1, 1, 2], "squeeze_mask": [False, True, False]}
    masks = {"begin_mask": [True, False, False], "end_mask": [True, False, False]}
    close(evaluated(lambda a: mb.slice_by_index(x=a, **corners, **masks), x), x[:, -1, 1:5:2])
    found = evaluated(
        lambda a, b: mb.slice_update(x=a, update=b, begin=[0, 1, 1], end=[3, 3, 3]), x, normal(3, 2, 2), target="iOS18"
    )
    wanted = x.copy()
    wanted[:, 1:3, 1:3] = normal(3, 2, 2)
    close(found, wanted)


@pytest.mark.parametrize("mode", ["update", "add", "sub", "mul", "div", "max", "min"])
def test_scatters(mode):
    put = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
        "max": np.maximum,
        "min": np.minimum,
    }
    ufunc = put.get(mode, lambda old, new: new)
    x, index = normal(4, 5), np.array([3, 0], np.int32)
    for axis in (0, 1):
        update = normal(*((2, 5) if axis == 0 else (4, 2)), seed=1)
        wanted, place = x.copy(), (slice(None),) * axis + (index,)
        wanted[place] = ufunc(wanted[place], update)
        close(
            evaluated(lambda a, b, i=axis: mb.scatter(data=a, indices=index, updates=b, axis=i, mode=mode), x, update),
            wanted,
        )
    along, update = np.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, 1]], np.int32), normal(2, 5, seed=2)
    wanted = x.copy()
    for i, j in np.ndindex(2, 5):
        wanted[along[i, j], j] = ufunc(wanted[along[i, j], j], update[i, j])
    close(
        evaluated(lambda a, b: mb.scatter_along_axis(data=a, indices=along, updates=b, axis=0, mode=mode), x, update),
        wanted,
    )
    nd, update = np.array([[1, 2], [3, 4]], np.int32), normal(2, seed=3)
    wanted = x.copy()
    wanted[nd[:, 0], nd[:, 1]] = ufunc(wanted[nd[:, 0], nd[:, 1]], update)
    close(evaluated(lambda a, b: mb.scatter_nd(data=a, indices=nd, updates=b, mode=mode), x, update), wanted)


def test_sorted_and_summed():
    x = normal(3, 7)
    for largest in (True, False):
        wanted = torch.topk(torch.from_numpy(x), 3, 1, largest)
        close(evaluated(lambda a, up=not largest: mb.topk(x=a, k=3, axis=1, ascending=up), x), list(wanted))
    for exclusive in (False, True):
        for reverse in (False, True):
            t = x[:, ::-1] if reverse else x
            sums = np.cumsum(t, 1) - (t if exclusive else 0)
            found = evaluated(lambda a, e=exclusive, r=reverse: mb.cumsum(x=a, axis=1, exclusive=e, reverse=r), x)
            close(found, sums[:, ::-1] if reverse else sums)


def test_put_together_and_made():
    x, y = normal(2, 3), normal(2, 3, seed=1)
    close(evaluated(lambda a, b: mb.concat(values=(a, b), axis=-1), x, y), np.concatenate([x, y], -1))
    close(
        evaluated(lambda a, b: mb.concat(values=(a, b), axis=1, interleave=True), x, y),
        np.stack([x, y], 2).reshape(2, 6),
    )
    close(evaluated(lambda a, b: mb.stack(values=(a, b), axis=1), x, y), np.stack([x, y], 1))
    close(evaluated(lambda a: mb.split(x=a, num_splits=3, axis=1), x), list(np.split(x, 3, 1)))
    close(evaluated(lambda a: mb.add(x=a, y=mb.fill(shape=[2, 3], value=2.0)), x), x + 2)
    close(evaluated(lambda a: mb.add(x=a, y=mb.fill_like(ref_tensor=a, value=2.0)), x), x + 2)
    close(evaluated(lambda a: mb.mul(x=a, y=mb.range_1d(start=0.0, end=3.0, step=1.0)), x), x * np.arange(3))
    index = np.array([2, 0], np.int32)
    for axis in (0, -1):
        found = evaluated(
            lambda a, i=axis: mb.one_hot(indices=a, one_hot_vector_size=3, axis=i, on_value=2, off_value=1), index
        )
        close(found, np.moveaxis(np.eye(3, dtype=int)[index] + 1, -1, axis))
    for mode, own in (("constant", "constant"), ("reflect", "reflect"), ("replicate", "edge")):
        options = {"constant_val": 1.5} if mode == "constant" else {}
        numpy = {"constant_values": 1.5} if mode == "constant" else {}
        found = evaluated(lambda a, m=mode, o=options: mb.pad(x=a, pad=[1, 0, 2, 1], mode=m, **o), normal(1, 1, 4, 5))
        close(found, np.pad(normal(1, 1, 4, 5), [(0, 0), (0, 0), (1, 0), (2, 1)], mode=own, **numpy))


def test_blocks():
    x = normal(2, 8, 4, 6)
    t = torch.from_numpy(x)
    close(evaluated(lambda a: mb.pixel_shuffle(x=a, upscale_factor=2), x), F.pixel_shuffle(t, 2))
    close(evaluated(lambda a: mb.pixel_unshuffle(x=a, downscale_factor=np.uint32(2)), x), F.pixel_unshuffle(t, 2))
    deep = evaluated(lambda a: mb.space_to_depth(x=a, block_size=2), x)
    close(deep, np.concatenate([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=1))
    close(evaluated(lambda a: mb.depth_to_space(x=a, block_size=2), deep[0]), x)
    options = {"block_shape": [2, 3], "paddings": [[1, 1], [0, 0]]}
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (0, 0)])
    batches = evaluated(lambda a: mb.space_to_batch(x=a, **options), x)
    close(batches, np.concatenate([padded[:, :, i::2, j::3] for i in range(2) for j in range(3)], axis=0))
    close(evaluated(lambda a: mb.batch_to_space(x=a, block_shape=[2, 3], crops=[[1, 1], [0, 0]]), batches[0]), x)
    found = evaluated(lambda a: mb.sliding_windows(x=a, axis=2, size=3, stride=1), x)
    close(found, np.moveaxis(np.lib.stride_tricks.sliding_window_view(x, 3, axis=2), -1, 3))
    close(evaluated(lambda a: mb.crop(x=a, crop_height=[1, 0], crop_width=[0, 2]), x), x[:, :, 1:, :4])
    close(evaluated(lambda a: mb.reshape_like(
        x=a, ref_tensors=(a, a), begins=(0, 1), ends=(1, 0), end_masks=(False, True)), x), x)  # fmt: skip
    y = normal(2, 4, 3)
    wanted = y.copy()
    wanted[0, :2], wanted[1, :4] = y[0, :2][::-1], y[1, :4][::-1]
    found = evaluated(lambda a: mb.reverse_sequence(x=a, lengths=np.int32([2, 4]), seq_axis=1, batch_axis=0), y)
    close(found, wanted)


@pytest.mark.parametrize("size", [(8, 10), (5, 3), (4, 5), (1, 1)])
def test_resized(size):
    x = normal(1, 2, 4, 5)
    t = torch.from_numpy(x)
    given = {"target_size_height": size[0], "target_size_width": size[1]}
    for mode, align in (("STRICT_ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)):
        found = evaluated(lambda a, m=mode: mb.resize_bilinear(x=a, sampling_mode=m, **given), x)
        close(found, F.interpolate(t, size, mode="bilinear", align_corners=align))
    close(evaluated(lambda a: mb.resize_nearest_neighbor(x=a, **given), x), F.interpolate(t, size))
    found = evaluated(lambda a: mb.resize(
        x=a, shape=list(size), resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR",
        sampling_mode="UNALIGN_CORNERS"), x)  # fmt: skip
    close(found, F.interpolate(t, size, mode="nearest-exact"))


@pytest.mark.parametrize(
    ("mode", "xs", "wanted"),
    [  # the points that coremltools' documentation gives for two pixels
        ("DEFAULT", 5, [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", 5, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("UNALIGN_CORNERS", 6, [0, 0, 1 / 3, 2 / 3, 1, 1]),
        ("ALIGN_CORNERS", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("ALIGN_CORNERS", 1, [0.5]),
    ],
)
def test_sampling_modes(mode, xs, wanted):
    x = np.array([0, 1], np.float32).reshape(1, 1, 1, 2)
    options = {"target_size_height": 1, "target_size_width": xs, "sampling_mode": mode}
    close([evaluated(lambda a: mb.resize_bilinear(x=a, **options), x)[0][0, 0, 0]], [wanted])


def test_upsampled():
    x = normal(1, 2, 4, 5)
    t = torch.from_numpy(x)
    for align in (True, False):
        found = evaluated(
            lambda a, c=align: mb.upsample_bilinear(x=a, scale_factor_height=2, scale_factor_width=3, align_corners=c),
            x,
        )
        close(found, F.interpolate(t, (8, 15), mode="bilinear", align_corners=align))
    found = evaluated(lambda a: mb.upsample_nearest_neighbor(x=a, scale_factor_height=2, scale_factor_width=3), x)
    close(found, F.interpolate(t, (8, 15)))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("padding", ["constant", "border", "reflection"])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
def test_resample(align, padding, sampling):
    x, grid = normal(2, 3, 4, 5), 1.3 * fraction(2, 6, 7, 2).astype(np.float32)
    torch_padding = {"constant": "zeros"}.get(padding, padding)
    wanted = F.grid_sample(torch.from_numpy(x), torch.from_numpy(grid), sampling, torch_padding, align)
    options = {"padding_value": 0.0, "coordinates_mode": "normalized_minus_one_to_one", "align_corners": align}
    found = evaluated(
        lambda a, b: mb.resample(x=a, coordinates=b, sampling_mode=sampling, padding_mode=padding, **options), x, grid
    )
    close(found, wanted, 1e-4)


@pytest.mark.parametrize("axis", [None, 1])
def test_quantized(axis):
    x = normal(2, 3, 4)
    scale, zero = (np.float32(0.05), np.int8(3)) if axis is None else (positive(3) / 9, np.int8([1, 0, -2]))
    options = {} if axis is None else {"axis": axis}
    column = (lambda v: v) if axis is None else (lambda v: v.reshape(3, 1))
    q = np.clip(np.round(x / column(scale)) + column(zero).astype(np.float32), -128, 127)

    def build(a):
        levels = mb.quantize(input=a, scale=scale, zero_point=zero, output_dtype="int8", **options)
        return mb.dequantize(input=levels, scale=scale, zero_point=zero, **options)

    close(evaluated(build, x), (q - column(zero)) * column(scale))


def test_every_op_is_here():
    """A new op needs a line in this file."""
    words = set(re.findall(r"\w+", Path(__file__).read_text()))
    assert not OPS.keys() - words
