"""`save` and `load`: bits, structure, and files that are whole or refused."""

import dataclasses
import json
import os
import stat
import struct
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import palettax as px
from palettax.leaf import is_palettized, pack
from tests.leaves import LEVELS, assert_same, forms, random_leaf, with_mask

DTYPES = [
    np.float16, jnp.bfloat16, np.float32, np.float64, jnp.float8_e4m3fn, jnp.float8_e5m2, np.int8, np.int16, np.int32,
    np.int64, np.uint8, np.uint16, np.uint32, np.uint64, bool,
]  # fmt: skip


def dense(dtype, shape, seed):
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return (
        bits.view(dtype).reshape(shape) if dtype.kind != "b" else (bits > 127).reshape(shape)
    )  # NaNs of all kinds too


seeds = st.integers(0, 2**32 - 1)
# Arrays are made from these recipes in the test: drawing inside a strategy would share its random numbers.
dense_recipes = st.tuples(
    st.just(dense), st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3).map(tuple), seeds
)
palettized_recipes = forms().map(lambda form: (lambda: random_leaf(**form),))
names = st.text("ab/. #é", max_size=3)
recipes = st.recursive(
    st.none() | dense_recipes | palettized_recipes,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(lambda items: ("tuple", *items)),
        st.dictionaries(names, inner, max_size=3),
        st.dictionaries(st.integers(-5, 5), inner, max_size=3),
    ),
    max_leaves=6,
)


def grow(recipe):
    if isinstance(recipe, tuple):
        if recipe and recipe[0] == "tuple":
            return tuple(grow(r) for r in recipe[1:])
        return recipe[0](*recipe[1:])
    if isinstance(recipe, list):
        return [grow(r) for r in recipe]
    return {k: grow(r) for k, r in recipe.items()} if isinstance(recipe, dict) else recipe


def same(a, b):
    """The same containers, static fields, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def leaf_paths(tree):
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_palettized)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def leaf():
    return random_leaf((6, 12), 3, groups=(3, 2), vector=(1, 2), scale=(6, 1))


@given(recipe=recipes)
def test_round_trip(tmp_path_factory, recipe):
    tree = grow(recipe)
    path = tmp_path_factory.mktemp("round") / "tree.safetensors"
    if len(set(leaf_paths(tree))) < len(leaf_paths(tree)):
        with pytest.raises(ValueError, match="two leaves have the path"):
            px.save(path, tree)
        return
    px.save(path, tree)
    same(px.load(path), tree)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_no_axes_and_many(tmp_path, dtype):
    tree = [dense(dtype, shape, 0) for shape in ((), (1,), (0,), (3, 0), (2, 3, 4))]
    px.save(tmp_path / "x", tree)
    same(px.load(tmp_path / "x"), tree)


def test_scalars_jax_arrays_and_views(tmp_path):
    wide = np.arange(24.0).reshape(4, 6)
    tree = {"float": 0.1, "int": 3, "bool": True, "jax": jnp.arange(3.0), "view": wide[::2, 1:].T}
    px.save(tmp_path / "x", tree)
    back = px.load(str(tmp_path / "x"))
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(back))
    assert list(back) == list(tree)
    for name, value in tree.items():
        np.testing.assert_array_equal(back[name], value)


def test_values_in_the_byte_order_of_another_machine(tmp_path):
    values = np.array([1.0, -2.5], ">f4")
    px.save(tmp_path / "x", {"w": values})
    np.testing.assert_array_equal(px.load(tmp_path / "x")["w"], values)


class Pair(typing.NamedTuple):
    w: typing.Any
    b: typing.Any


def test_other_containers_become_dicts_of_their_paths(tmp_path):
    px.save(tmp_path / "x", [Pair(leaf(), np.ones(3))])
    same(px.load(tmp_path / "x"), [{"w": leaf(), "b": np.ones(3)}])


def test_the_file_holds_packed_indices_and_little_else(tmp_path):
    path = tmp_path / "x.safetensors"
    weights = {
        "w": np.random.default_rng(0).standard_normal((100, 100)).astype(np.float16),
        "b": np.ones(9, np.float32),
    }
    small = px.palettize(weights, px.kmeans(3))
    px.save(path, small)
    size = path.stat().st_size
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert size == 8 + header + px.report(weights, small).nbytes
    assert header < 1000
    with safetensors.safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"w#lut", "w#indices", "b"}
        np.testing.assert_array_equal(file.get_tensor("w#indices"), pack(np.asarray(small["w"].indices), 3))
        np.testing.assert_array_equal(file.get_tensor("w#lut"), small["w"].lut)
        np.testing.assert_array_equal(file.get_tensor("b"), weights["b"])
        assert file.metadata()["format"] == "palettax-1"


@pytest.mark.parametrize("lut_dtype", [None, *LEVELS])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_only_what_the_mask_leaves_is_stored(tmp_path, share, kept, lut_dtype):
    small = random_leaf((100, 101), 3, groups=(5, 1), scale=(10, 1), dtype=np.float16, lut_dtype=lut_dtype)
    small = with_mask(small, kept=kept, share=share)
    px.save(tmp_path / "x", {"w": small})
    assert_same(px.load(tmp_path / "x")["w"], small)
    with safetensors.safe_open(tmp_path / "x", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(tensor.nbytes for tensor in tensors.values()) == small.nbytes
    np.testing.assert_array_equal(tensors["w#indices"], pack(small.indices[small.mask], 3))
    np.testing.assert_array_equal(tensors["w#mask"], np.packbits(small.mask, bitorder="little"))


def test_indices_outside_the_mask_that_would_be_lost_are_refused(tmp_path):
    small = with_mask(random_leaf((8, 8)), kept=False)
    lost = dataclasses.replace(small, indices=np.where(small.mask, small.indices, np.uint8(1)))
    with pytest.raises(ValueError, match="leaf 'w': an index outside the mask is not 0"):
        px.save(tmp_path / "x", {"w": lost})


def test_a_leaf_without_the_newer_parts_is_written_as_it_always_was(tmp_path):
    small = leaf()
    px.save(tmp_path / "new", {"w": small})
    with safetensors.safe_open(tmp_path / "new", framework="numpy") as file:
        (header,) = json.loads(file.metadata()["leaves"])
    # safetensors writes the memory of an array, whatever its order.
    tensors = {"w#lut": np.ascontiguousarray(small.lut), "w#indices": pack(small.indices, 3), "w#scale": small.scale}
    old = {
        "nbits": 3, "shape": [6, 6], "vector_axis": 1, "dtype": "float32",
        "tensors": {name.removeprefix("w#"): name for name in tensors},
    }  # fmt: skip
    assert header == old
    structure = json.dumps({"dict": [["w", {"leaf": 0}]]})
    metadata = {"format": "palettax-1", "structure": structure, "leaves": json.dumps([old])}
    safetensors.numpy.save_file(tensors, tmp_path / "old", metadata=metadata)
    assert_same(px.load(tmp_path / "old")["w"], small)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    px.save(path, {"w": leaf(), "b": np.arange(30.0)})
    return path


@pytest.mark.parametrize("part", [0, 1, 7, 8, 9, 60, 0.3, 0.5, 0.9, -1])
def test_a_truncated_file(saved, part):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(part * len(whole)) if isinstance(part, float) else part])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        px.load(saved)


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 1000, b"\xff" * 1000, b"{}", b"PK\x03\x04" + bytes(99)])
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.bin"):
        px.load(tmp_path / "model.bin")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_someone_else(tmp_path, metadata):
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors.* its format is .*, not 'palettax-1'"):
        px.load(tmp_path / "model.safetensors")


GOOD_LEAF = {"nbits": 3, "shape": [6, 6], "vector_axis": 1, "dtype": "float32"}


@pytest.mark.parametrize(
    "changes",
    [
        {"structure": None},
        {"leaves": None},
        {"structure": "{"},
        {"structure": "[]"},
        {"structure": "{}"},
        {"structure": "3"},
        {"structure": json.dumps({"leaf": "v"})},
        {"structure": json.dumps({"dict": [["w"]]})},
        {"structure": json.dumps({"list": 3})},
        {"leaves": "[]"},
        {"leaves": json.dumps({"w": GOOD_LEAF | {"dtype": "float31"}, "b": {"dtype": "float64"}})},
        {"leaves": json.dumps({"w": GOOD_LEAF | {"dtype": "float64"}, "b": {"dtype": "float64"}})},
        {"leaves": json.dumps({"w": GOOD_LEAF | {"nbits": 5}, "b": {"dtype": "float64"}})},
        {"leaves": json.dumps({"w": GOOD_LEAF | {"nbits": "3"}, "b": {"dtype": "float64"}})},
        {"leaves": json.dumps({"w": GOOD_LEAF | {"shape": [60, 60]}, "b": {"dtype": "float64"}})},
        {"leaves": json.dumps({"w": GOOD_LEAF | {"shape": [5, 6]}, "b": {"dtype": "float64"}})},
        {"leaves": json.dumps({"w": GOOD_LEAF | {"vector_axis": None}, "b": {"dtype": "float64"}})},
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_header_that_makes_no_sense(saved, changes):
    with safetensors.safe_open(saved, framework="numpy") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {k: v for k, v in (header | changes).items() if v is not None}
    safetensors.numpy.save_file(tensors, saved, metadata=header)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        px.load(saved)


def test_a_tensor_that_is_missing(saved):
    with safetensors.safe_open(saved, framework="numpy") as file:
        header, tensors = file.metadata(), {"b": file.get_tensor("b")}
    safetensors.numpy.save_file(tensors, saved, metadata=header)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        px.load(saved)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.safetensors"):
        px.load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError, match=r"read_palettes the tables of an \.mlpackage"):
        px.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        px.save(tmp_path / "nowhere" / "tree.safetensors", {})


class Unwilling:
    shape, dtype = (3,), np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("the device went away")


@pytest.mark.parametrize(
    ("late", "error"),
    [
        (Unwilling(), RuntimeError),
        (np.array(["text"]), ValueError),
        ("text", ValueError),
        (object(), ValueError),
        (np.array([1, 2], [("a", "i4"), ("b", "f4")])[0], ValueError),
    ],
    ids=["raises", "strings", "string", "object", "record"],
)
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(saved, late, error):
    before = saved.read_bytes()
    with pytest.raises(error):
        px.save(saved, {"a": np.ones(1000), "z": late})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_first_save_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="leaf 'z' is of object, which is no array of numbers; leave it out"):
        px.save(tmp_path / "x", {"a": np.ones(3), "z": object()})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        px.save(tmp_path / "nowhere" / "x", {"a": np.ones(3)})


@pytest.mark.parametrize("key", [1.5, None, True, ("a", "b"), b"a"])
def test_keys_that_json_has_not(tmp_path, key):
    with pytest.raises(ValueError, match="dict keys under 'enc' are not all strings or integers; rename them"):
        px.save(tmp_path / "x", {"enc": {key: np.ones(3)}})
    assert os.listdir(tmp_path) == []


def test_two_leaves_of_one_path_are_kept_apart(tmp_path):
    tree = {"a": {"b": np.zeros(3)}, "a/b": np.ones(3), "__metadata__": np.ones(2)}
    px.save(tmp_path / "x", tree)
    same(px.load(tmp_path / "x"), tree)


@pytest.mark.parametrize("part", ["lut", "indices", "scale"])
def test_a_leaf_named_as_a_part_of_another_is_kept_apart(tmp_path, part):
    tree = {"w": leaf(), f"w#{part}": np.ones(3, np.float32)}
    px.save(tmp_path / "x", tree)
    same(px.load(tmp_path / "x"), tree)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    px.save(tmp_path / "x", {"a": np.ones(3)})
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_flax_state_comes_back_as_its_pure_dict(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(64, 64, rngs=nnx.Rngs(0))])

    state = nnx.state(Net(), nnx.Param)
    small = px.palettize(state, px.kmeans(2))
    px.save(tmp_path / "x", small)
    same(px.load(tmp_path / "x"), nnx.to_pure_dict(small))
    nnx.replace_by_pure_dict(state, px.depalettize(px.load(tmp_path / "x")))
    np.testing.assert_array_equal(state["layers"][0]["kernel"][...], px.depalettize(small)["layers"][0]["kernel"][...])


def test_a_random_key_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"leaf 'key' is a .*; leave it out"):
        px.save(tmp_path / "x", {"key": jax.random.key(0)})
