"""The tables that drive the tests: a new algorithm or an awkward input is a new row."""

import jax
import jax.numpy as jnp
import numpy as np

import palettax as px

DTYPES = {"float16": np.float16, "bfloat16": jnp.bfloat16, "float32": np.float32, "float64": np.float64}

MIXES = {"float32": (np.float32,) * 3, "others": (np.float16, jnp.bfloat16, np.float64)}
"""What the leaves of a tree are of."""

ROWS = px.Granularity(group_size=4, channel_axis=0)
COLUMNS = px.Granularity(group_size=5, channel_axis=-1)

BLOCKS = px.Granularity(group_size=(4, 5), channel_axis=(0, -1))
CHOSEN = px.Granularity(group_size=4, channel_axis=None)
PAIRS = px.Granularity(vector_size=2, vector_axis=0)
PAIRS_OF_ROWS = px.Granularity(vector_size=2, vector_axis=0, group_size=4)
KEY = jax.random.key(0)


def every_third(tree):
    """Of every three elements, two."""
    return jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape) % 3 > 0, tree)


HARD = {
    "kmeans": px.kmeans(3),
    "kmeans 1 bit": px.kmeans(1),
    "kmeans rows": px.kmeans(2, granularity=ROWS),
    "kmeans columns": px.kmeans(2, granularity=COLUMNS),
    "lloyd": px.kmeans(3, method="lloyd"),
    "lloyd rows": px.kmeans(2, method="lloyd", granularity=ROWS),
    "uniform": px.uniform(4),
    "uniform columns": px.uniform(4, granularity=COLUMNS),
    "unique": px.unique(),
    "unique 8 bit": px.unique(8),
    "custom": px.custom(lambda w: (jnp.array([-1.0, 0.0, 1.0]), (jnp.sign(w) + 1).astype(jnp.uint8))),
    "identity": px.identity(),
    "chain": px.chain(px.kmeans(4), px.uniform(2)),
    "masked": px.masked(px.kmeans(2), {"a": True, "b": [False, True]}),
    "kmeans blocks": px.kmeans(1, granularity=BLOCKS),
    "kmeans chosen axis": px.kmeans(2, granularity=CHOSEN),
    "vectors": px.kmeans(3, granularity=PAIRS, key=KEY),
    "vectors rows": px.kmeans(2, granularity=PAIRS_OF_ROWS, key=KEY),
    "channel scale": px.with_channel_scale(px.kmeans(2)),
    "channel scale columns": px.with_channel_scale(px.kmeans(2, granularity=COLUMNS), channel_axis=-1, max_steps=2),
    "channel scale vectors": px.with_channel_scale(px.kmeans(2, granularity=PAIRS, key=KEY), max_steps=2),
    "int8 lut": px.quantize_lut(px.kmeans(3), "int8"),
    "uint8 lut rows": px.quantize_lut(px.kmeans(2, granularity=ROWS), "uint8"),
    "float8 lut": px.quantize_lut(px.kmeans(3), jnp.float8_e4m3fn),
    "int8 lut channel scale": px.quantize_lut(px.with_channel_scale(px.kmeans(2), max_steps=2), "int8"),
    "int8 lut vectors": px.quantize_lut(px.kmeans(3, granularity=PAIRS_OF_ROWS, key=KEY), "int8"),
    "elements": px.masked(px.kmeans(2), every_third),
    "zeros": px.keep_zeros(px.kmeans(2)),
    "sparse": px.keep_zeros(px.kmeans(2), sparse=True),
    "by_path": px.by_path([("^a$", px.kmeans(2)), ("b/0", None), ("b", px.uniform(1))]),
    "straight through": px.straight_through(2, weight_threshold=0),
    "straight through rows": px.straight_through(2, weight_threshold=0, granularity=ROWS),
    "straight through int8 lut": px.straight_through(2, weight_threshold=0, lut_dtype="int8"),
    "straight through vectors": px.straight_through(2, weight_threshold=0, granularity=PAIRS, key=KEY),
}

NEEDS_VALUES = {"unique"}
"""Rows that choose a storage by the values: eager only."""

INEXACT = {"custom", "int8 lut", "int8 lut vectors", "uint8 lut rows", "float8 lut", "int8 lut channel scale",
           "straight through int8 lut"}  # fmt: skip
"""Rows that may move weights of two values; those of -1 and 1 they keep."""

ROUNDED = {name for name in HARD if "straight through" in name}
"""Rows that follow the weights: their entries are means of cells, taken in floats, that come out next to the value that
a cell is full of. What others keep bit for bit they keep to a rounding."""

RESCALED = {name for name in HARD if "channel scale" in name or name == "int8 lut vectors"}
"""Rows that search for scales step by step: from their own result they may find a better one."""

ORDERED = {name for name in HARD if "vectors" in name or name == "elements"}
"""Rows that treat weights by their place: which of them are neighbours, or left out."""


ABOUT_ZERO = {n for n in HARD if n in ("custom", "zeros", "sparse", "elements") or "lut" in n or "scale" in n}
"""Rows to which zero is a value like no other, so that shifted weights are other weights."""


def data(kind: str, n: int, seed: int = 0) -> np.ndarray:
    """float64 samples of the kinds that clustering finds easy, hard or degenerate."""
    rng = np.random.default_rng(seed)
    return {
        "normal": lambda: rng.standard_normal(n),
        "heavy": lambda: rng.standard_cauchy(n),
        "bimodal": lambda: np.where(rng.random(n) < 0.5, -1.0, 1.0) + rng.normal(0, 0.02, n),
        "grid": lambda: rng.integers(-20, 20, n).astype(float),
        "constant": lambda: np.full(n, 0.1),
        "two values": lambda: np.where(rng.random(n) < 0.5, 0.1, -0.3),
        "tiny": lambda: rng.standard_normal(n) * 1e-6,
        "offset": lambda: rng.standard_normal(n) + 100,
    }[kind]()


KINDS = ["normal", "heavy", "bimodal", "grid", "constant", "two values", "tiny", "offset"]


def sensitivities(n: int, seed: int = 1) -> np.ndarray:
    """Weights of squared errors over many orders of magnitude, a third of them zero."""
    rng = np.random.default_rng(seed)
    return rng.random(n) ** 6 * (rng.random(n) > 0.33)


def params(dtypes=(np.float32,) * 3, seed: int = 0):
    """A small tree of 80 weights a leaf: compiled computations on its groups are shared between the leaves."""
    rng, shapes = np.random.default_rng(seed), ((8, 10), (4, 2, 10), (4, 2, 2, 5))
    a, b, c = (rng.standard_normal(shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return {"a": a, "b": [b, c]}
