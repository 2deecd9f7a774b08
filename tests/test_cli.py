"""The command line: what it writes is what the library gives, and what it says is so."""

import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import palettax as px
from palettax import coreml
from palettax._commands import app
from palettax._commands.files import named_leaves
from palettax._commands.interruption import interruptible
from palettax.coreml import (
    OpPalettizerConfig,
    OptimizationConfig,
    compress_weights,
    from_torch,
    read_palettes,
    save_package,
)
from palettax.leaf import is_palettized
from palettax.torch import to_params

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning")


def run(*arguments, code=0):
    """What a command says on stdout, or, where it fails, on stderr."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    return result.stderr if code == 2 else result.stdout


def parts(tree):
    """The bits of every part of every leaf, and what is static about it."""
    found = {}
    for name, leaf in named_leaves(tree).items():
        inner, static = jax.tree.flatten(leaf)
        found[name] = str(static), [(str(part.dtype), part.shape, np.asarray(part).tobytes()) for part in inner]
    return found


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(96, 32, generator=generator).bfloat16(),
        "layers.0.weight": torch.randn(64, 48, generator=generator),
        "layers.0.bias": torch.randn(64, generator=generator),
        "layers.1.weight": torch.randn(50, 64, generator=generator).half(),
        "ids": torch.arange(3000),
        "causal": torch.full((60, 60), -torch.inf),
    }


@pytest.fixture
def file(tensors, tmp_path):
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture(scope="module")
def tree():
    key = jax.random.key(0)
    dense = {"kernel": jax.random.normal(key, (64, 96)), "bias": jnp.zeros(96)}
    return {"params": {"dense": dense, "layers": [jax.random.normal(key, (64, 64)), None]}, "step": np.int64(3)}


PALETTES = {
    "--nbits 3": px.kmeans(3),
    "": px.kmeans(4),
    "--mode uniform --nbits 6 --group-size 16": px.uniform(6, granularity=px.Granularity(16, None)),
    "--group-size 24 --channel-axis 1": px.kmeans(4, granularity=px.Granularity(24, 1)),
    "--channel-scale --nbits 2": px.with_channel_scale(px.kmeans(2)),
    "--vector-size 2 --nbits 1 --weight-threshold 3100": px.kmeans(
        1, granularity=px.Granularity(None, None, 2), key=jax.random.key(0)
    ),
    "--mode unique": px.unique(),
}


@pytest.mark.parametrize("options", PALETTES)
def test_a_small_file_holds_what_palettize_gives(file, tensors, tmp_path, options):
    run("compress", file, tmp_path / "small.safetensors", *options.split())
    given = to_params(tensors)
    weights = {name: leaf for name, leaf in given.items() if name not in ("ids", "causal")}
    if "24" in options:  # of which only 48 is a multiple
        weights = {"layers.0.weight": weights["layers.0.weight"]}
    if "3100" in options:
        weights = {name: leaf for name, leaf in weights.items() if leaf.size > 3100}
    expected = given | px.palettize(weights, PALETTES[options])
    assert parts(px.load(tmp_path / "small.safetensors")) == parts(expected)
    count = sum(map(is_palettized, expected.values())) or "NOTHING"  # `unique` finds nothing to do
    verdict = run("verify", tmp_path / "small.safetensors", file)
    assert re.search(rf"{count} palettized, \d+ others identical: all is in order", verdict)


def test_a_checkpoint_of_torch(tensors, tmp_path):
    tied = tensors | {"head.weight": tensors["embed.weight"]}
    torch.save({"state_dict": tied, "epoch": 3}, tmp_path / "model.pt")
    told = json.loads(run("compress", tmp_path / "model.pt", tmp_path / "small.pth", "--json"))
    assert "epoch" in told["remarks"][0]
    run("compress", tmp_path / "model.pt", tmp_path / "small.safetensors")
    state = torch.load(tmp_path / "small.pth", weights_only=True)
    assert "layers.0._COREML_/weight/lut" in state
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert parts(to_params(state)) == parts(px.load(tmp_path / "small.safetensors"))
    for small in ("small.pth", "small.safetensors"):
        run("verify", tmp_path / small, tmp_path / "model.pt")
    state["layers.0.weight"][3, 5] += 1  # on no table any more
    torch.save(state, tmp_path / "small.pth")
    assert "layers.0.weight: 1 of 3072" in run("verify", tmp_path / "small.pth", tmp_path / "model.pt", code=1)


def test_nested_trees_from_save_and_from_orbax(tree, tmp_path):
    import orbax.checkpoint as ocp

    px.save(tmp_path / "tree.safetensors", tree)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    run("compress", tmp_path / "tree.safetensors", tmp_path / "one.safetensors", "--group-size", 16)
    run("compress", tmp_path / "run" / "7" / "default", tmp_path / "other.safetensors", "--group-size", 16)
    grouped = px.kmeans(4, granularity=px.Granularity(16, channel_axis=None))
    expected = parts(px.palettize(tree, grouped))
    assert parts(px.load(tmp_path / "one.safetensors")) == expected
    assert parts(px.load(tmp_path / "other.safetensors")) == expected
    run("verify", tmp_path / "one.safetensors", tmp_path / "run" / "7" / "default")
    refused = run("compress", tmp_path / "run", tmp_path / "third.safetensors", code=2)
    assert os.path.join("run", "7", "default") in refused


def test_a_scale_along_an_axis_that_some_leaves_have(tmp_path):
    random = np.random.default_rng(0)
    px.save(
        tmp_path / "w.safetensors", {"conv": random.normal(size=(16, 16, 3, 3)), "dense": random.normal(size=(64, 64))}
    )
    told = run(
        "compress", tmp_path / "w.safetensors", tmp_path / "s.safetensors", "--channel-scale", "--channel-axis", 2
    )
    assert "channel_axis=2 is not an axis of shape (64, 64)" in " ".join(told.split())
    assert is_palettized(px.load(tmp_path / "s.safetensors")["conv"])


def test_what_stays_dense_says_why(file, tensors, tmp_path):
    told = json.loads(run("compress", file, tmp_path / "small.safetensors", "--group-size", 30, "--json"))
    rows = {row["name"]: row for row in told["weights"]}
    assert rows.keys() == tensors.keys()
    assert rows["ids"]["skipped"] == "int64 is not floating"
    assert rows["causal"]["skipped"] == "3600 NaN or infinite values"
    assert rows["layers.0.bias"]["skipped"] == "≤ weight_threshold=2048"
    assert rows["layers.0.weight"]["skipped"].startswith("group_size=30 does not divide")
    assert told["nbytes_before"] == sum(tensor.nbytes for tensor in tensors.values())
    assert told["file_bytes"] == (tmp_path / "small.safetensors").stat().st_size


CONFIG = """
global: {nbits: 2}
by_path:
  embed: {nbits: 3, group_size: 16}
  layers.1: null
"""


def test_a_configuration(file, tensors, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    run("compress", file, tmp_path / "small.safetensors", "--config", tmp_path / "config.yaml")
    rules = [("embed", px.kmeans(3, granularity=px.Granularity(16, None))), ("layers.1", None), ("0", px.kmeans(2))]
    weights = {name: leaf for name, leaf in to_params(tensors).items() if name not in ("ids", "causal")}
    small = px.load(tmp_path / "small.safetensors")
    assert parts({name: small[name] for name in weights}) == parts(px.palettize(weights, px.by_path(rules)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("global: {nbit: 4}", "global: nbit: .* did you mean 'nbits'?"),
        ("globl: {nbits: 4}", "globl: .* did you mean 'global'?"),
        ("by_path: {embed: {nbits: 5}}", r"by_path\['embed'\]: nbits=5; use 1, 2, 3, 4, 6 or 8"),
        ("by_path: {head: {nbits: 4}}", "regex 'head' matches no leaf"),
        ("by_path: {'(': null}", "no regular expression"),
        ("global: {nbits: [", "no YAML"),
    ],
)
def test_a_configuration_that_is_wrong(file, tmp_path, config, said):
    (tmp_path / "config.yaml").write_text(config)
    refused = run("compress", file, tmp_path / "small.safetensors", "--config", tmp_path / "config.yaml", code=2)
    assert re.search(said, refused)
    assert not (tmp_path / "small.safetensors").exists()


def test_the_file_itself_is_replaced_when_forced(file, tmp_path):
    before = file.read_bytes()
    assert "--force" in run("compress", file, file, code=2)
    assert file.read_bytes() == before
    run("compress", file, tmp_path / "small.safetensors")
    run("compress", file, file, "--force")
    assert parts(px.load(file)) == parts(px.load(tmp_path / "small.safetensors"))
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "small.safetensors"]


def test_what_differs_is_named(file, tmp_path):
    small = tmp_path / "small.safetensors"
    run("compress", file, small)
    leaves = px.load(small)
    indices = leaves["layers.0.weight"].indices
    indices[3, 5] = 15 - indices[3, 5]
    leaves["layers.0.bias"][2] += 1
    leaves["embed.weight"].lut[..., 0, :] = np.nan
    leaves["layers.1.weight"].lut[..., [0, 1], :] = leaves["layers.1.weight"].lut[..., [1, 0], :]
    leaves["more"] = leaves.pop("ids")
    px.save(small, leaves)
    told = json.loads(run("verify", small, file, "--json", code=1))
    assert not told["ok"]
    assert told["identical"] == 1
    problems = {problem["name"]: problem["problem"] for problem in told["problems"]}
    assert problems.keys() == {"ids", "more", "layers.0.weight", "layers.0.bias", "embed.weight", "layers.1.weight"}
    assert problems["layers.0.weight"] == "1 of 3072 indices are not those of the nearest entry"
    assert problems["ids"] == "is missing"
    assert "finite" in problems["embed.weight"]
    assert "nearest" in problems["layers.1.weight"]


def test_inspect(file, tensors, tmp_path):
    small = tmp_path / "small.safetensors"
    run("compress", file, small, "--group-size", 16)
    told = json.loads(run("inspect", small, "--reference", file, "--json"))
    rows = {row["name"]: row for row in told["weights"]}
    dense, leaves = to_params(tensors), px.load(small)
    for name, leaf in leaves.items():
        row = rows[name]
        assert row["nbytes"] == leaf.nbytes
        assert row["shape"] == list(leaf.shape)
        assert row["dtype"] == str(leaf.dtype)
        if is_palettized(leaf):
            assert row["form"] == f"4 bits, {np.prod(leaf.groups)} luts"
            assert row["sqnr"] == pytest.approx(px.report(dense, leaves)[name].sqnr)
        if row["histogram"] is not None:
            assert sum(row["histogram"]["counts"]) == np.isfinite(dense[name].astype(np.float64)).sum()
    assert rows["causal"]["histogram"] is None
    table = run("inspect", small)
    assert max(map(len, table.splitlines())) <= 80
    assert re.search("[▁▂▃▄▅▆▇█]{10}", table)


@pytest.fixture(scope="module")
def model():
    """Weights of four ops, in float16."""
    from palettax.coreml.scoped import quiet  # before coremltools, whose import it silences

    return _model(quiet, np.arange(64.0))


def _model(quiet, bias):
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    random = np.random.default_rng(0)
    shapes = {"conv": (64, 8, 3, 3), "mul": (64, 64), "right": (64, 48)}
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 8, 3, 3))], opset_version=ct.target.iOS18)
    def program(x):
        x = mb.conv(x=x, weight=weights["conv"], bias=bias.astype(np.float32), name="conv")
        x = mb.linear(x=mb.reshape(x=x, shape=(1, 64)), weight=weights["mul"], name="mul")
        return mb.matmul(x=mb.relu(x=x), y=weights["right"], name="right")

    with quiet():
        return ct.convert(program, skip_model_load=True, minimum_deployment_target=ct.target.iOS18)


@pytest.mark.parametrize("options", ["--nbits 4", "--nbits 2 --group-size 16", "--channel-scale", "--mode uniform"])
def test_a_package(model, tmp_path, options):
    save_package(model, tmp_path / "m.mlpackage")
    told = json.loads(run("compress", tmp_path / "m.mlpackage", tmp_path / "s.mlpackage", "--json", *options.split()))
    small = read_palettes(tmp_path / "s.mlpackage")
    rows = {row["name"]: row for row in told["weights"]}
    assert [row["nbits"] for row in rows.values() if row["nbits"]] == [leaf.nbits for leaf in small.values()]
    assert len(small) == 3
    if options == "--nbits 4":
        given = {row["name"]: row for row in json.loads(run("inspect", tmp_path / "m.mlpackage", "--json"))["weights"]}
        assert given.keys() > small.keys()
        assert rows.keys() == {f"{name}_to_fp16" for name in given}
    verdict = json.loads(run("verify", tmp_path / "s.mlpackage", tmp_path / "m.mlpackage", "--json"))
    assert verdict["ok"]
    assert {row["name"]: row["form"].split(",")[0] for row in verdict["palettized"]} == {
        name: f"{leaf.nbits} bits" for name, leaf in small.items()
    }
    for row, reported in zip(verdict["palettized"], filter(lambda row: row["nbits"], rows.values()), strict=True):
        assert row["sqnr"] == pytest.approx(reported["sqnr"])


def test_what_is_pruned_is_palettized_jointly(model, file, tmp_path):
    import coremltools.optimize.coreml as theirs

    from tests.coreml.coreml_programs import peer

    config = theirs.OptimizationConfig(theirs.OpMagnitudePrunerConfig(target_sparsity=0.6))
    pruned, small = tmp_path / "p.mlpackage", tmp_path / "s.mlpackage"
    save_package(peer(theirs.prune_weights, model, config), pruned)
    assert "Nothing was palettized" in json.loads(run("compress", pruned, small, "--json"))["remarks"][-1]
    run("compress", pruned, small, "--joint-compression", "--nbits", 2, "--force")
    assert {leaf.nbits for leaf in read_palettes(small).values()} == {2}
    assert "--joint-compression is for packages" in run(
        "compress", *[file] * 2, "--force", "--joint-compression", code=2
    )


def test_an_axis_of_no_groups_is_refused(model, file, tmp_path):
    save_package(model, tmp_path / "m.mlpackage")
    for source, out in ((tmp_path / "m.mlpackage", "s.mlpackage"), (file, "s.safetensors")):
        assert "give --group-size too" in run("compress", source, tmp_path / out, "--channel-axis", 1, code=2)
        run("compress", source, tmp_path / out, "--channel-axis", 1, "--group-size", 4)


def test_outputs_of_packages_are_compared(model, tmp_path):
    packages, inputs = (tmp_path / "s.mlpackage", tmp_path / "m.mlpackage"), tmp_path / "x.npz"
    save_package(model, packages[1])
    run("compress", packages[1], packages[0], "--nbits", "4", "--json")
    x = np.random.default_rng(1).normal(size=(1, 8, 3, 3)).astype(np.float32)
    np.savez(inputs, x=x)
    (found, expected) = (coreml.run(package, {"x": x})["right"].astype(np.float64) for package in packages)
    told = json.loads(run("verify", *packages, "--inputs", inputs, "--json"))
    (row,) = told["outputs"]
    assert (row["name"], row["sound"]) == ("right", True)
    assert row["error"] == pytest.approx(abs(found - expected).max() / np.ptp(expected))
    assert row["sqnr"] == pytest.approx(10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()))
    assert "right" in run("verify", *packages, "--inputs", inputs, "--tolerance", 1.01 * row["error"])
    assert "right: this output differs" in run(
        "verify", *packages, "--inputs", inputs, "--tolerance", 0.99 * row["error"], code=1
    )
    same = json.loads(run("verify", packages[1], packages[1], "--inputs", inputs, "--tolerance", 0, "--json"))
    assert same["outputs"] == [{"name": "right", "sqnr": None, "error": 0.0, "sound": True}]


def test_outputs_alone_are_compared_of_two_conversions(tmp_path):
    params = {"w": np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)}
    small = px.palettize(params, px.kmeans(nbits=3), weight_threshold=0)
    x, inputs = np.ones((2, 8), np.float32), tmp_path / "x.npz"
    coreml.from_jax(lambda p, x: x @ p["w"], x, small).save(tmp_path / "s.mlpackage")
    coreml.from_jax(lambda p, x: 1.0 * (x @ p["w"]) + 0.5 - 0.5, x, params).save(tmp_path / "m.mlpackage")
    np.savez(inputs, x=x)
    packages = tmp_path / "s.mlpackage", tmp_path / "m.mlpackage"
    assert "NOT in order" in run("verify", *packages, "--inputs", inputs, code=1)
    printed = run("verify", *packages, "--inputs", inputs, "--outputs-only", "--tolerance", 1)
    assert "1 outputs compared: all is in order" in printed
    assert "output: this output differs" in run(
        "verify", *packages, "--inputs", inputs, "--outputs-only", "--tolerance", 0, code=1
    )
    assert "give --inputs" in run("verify", *packages, "--outputs-only", "--tolerance", 1, code=2)
    assert "the --tolerance" in run("verify", *packages, "--outputs-only", "--inputs", inputs, code=2)
    coreml.from_jax(lambda p, x: {"y": x @ p["w"]}, x, small).save(tmp_path / "y.mlpackage")
    others = run(
        "verify", packages[0], tmp_path / "y.mlpackage", "--inputs", inputs, "--outputs-only", "--tolerance", 1, code=2
    )
    assert "use the same names" in others


def test_what_is_nan_is_not_in_order(model, tmp_path):
    packages, inputs = (tmp_path / "s.mlpackage", tmp_path / "m.mlpackage"), tmp_path / "x.npz"
    save_package(model, packages[1])
    run("compress", packages[1], packages[0])
    np.savez(inputs, x=np.full((1, 8, 3, 3), np.nan, np.float32))
    for pair in (packages, [packages[1]] * 2):
        assert "right: this output has another shape, or NaN" in run("verify", *pair, "--inputs", inputs, code=1)
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    px.save(tmp_path / "clean.safetensors", {"w": weights})
    run("compress", tmp_path / "clean.safetensors", tmp_path / "small.safetensors")
    weights[3, 4] = np.nan
    px.save(tmp_path / "nan.safetensors", {"w": weights})
    printed = run("verify", tmp_path / "small.safetensors", tmp_path / "nan.safetensors", code=1)
    assert "w: 1 of its weights are NaN or infinite in the reference" in printed


def test_inputs_that_cannot_be_run_are_said(model, tmp_path):
    package = tmp_path / "m.mlpackage"
    save_package(model, package)
    np.savez(tmp_path / "other.npz", y=np.ones(3))
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "x.npz", x=np.ones((1, 8, 2, 3)))
    for inputs, message in (
        ("other.npz", "the program takes ['x']"),
        ("one.npy", "np.savez"),
        ("x.npz", "(1, 8, 3, 3)"),
    ):
        assert message in run("verify", package, package, "--inputs", tmp_path / inputs, code=2)
    assert "--inputs too" in run("verify", package, package, "--tolerance", 1, code=2)
    px.save(tmp_path / "w.safetensors", {"w": np.ones(3, np.float32)})
    for content in (b"", b"PK cut short", b"text"):
        (tmp_path / "cut.npz").write_bytes(content)
        assert "cut.npz is no .npz file" in run("verify", package, package, "--inputs", tmp_path / "cut.npz", code=2)
    files = [tmp_path / "w.safetensors"] * 2
    assert "can be run" in run("verify", *files, "--inputs", tmp_path / "x.npz", code=2)


def test_what_differs_in_a_package_is_named(model, tmp_path):
    from palettax.coreml.scoped import quiet

    def flipped(weights):
        lut, indices = px.kmeans_lut(weights.reshape(-1), 4)[:2]
        return lut, np.where(np.arange(weights.size) == 7, 15 - np.asarray(indices), indices)

    save_package(model, tmp_path / "m.mlpackage")
    config = OptimizationConfig(
        op_name_configs={"mul_weight_0_to_fp16": OpPalettizerConfig(mode="custom", lut_function=flipped)}
    )
    save_package(compress_weights(model, config).mlmodel, tmp_path / "s.mlpackage")
    told = run("verify", tmp_path / "s.mlpackage", tmp_path / "m.mlpackage", code=1)
    assert "1 of 4096 indices are not those of the nearest entry" in told
    save_package(_model(quiet, np.arange(64.0) + (np.arange(64) == 5)), tmp_path / "other.mlpackage")
    told = json.loads(run("verify", tmp_path / "other.mlpackage", tmp_path / "m.mlpackage", "--json", code=1))
    (problem,) = told["problems"]
    assert "bias" in problem["name"]
    assert problem["problem"] == "1 of its 64 values differ from the reference's"


def test_what_a_package_says_of_itself_is_compared(model, tmp_path):
    save_package(model, tmp_path / "m.mlpackage")
    small = compress_weights(model, OptimizationConfig(OpPalettizerConfig(nbits=4))).mlmodel
    small.author = "another"
    save_package(small, tmp_path / "s.mlpackage")
    told = run("verify", tmp_path / "s.mlpackage", tmp_path / "m.mlpackage", code=1)
    assert "package: its description has another metadata" in told


class Counting(torch.nn.Module):
    """A layer that adds up what it is given."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)
        self.register_buffer("total", torch.zeros(1, 64, dtype=torch.float16))

    def forward(self, x):
        self.total.mul_(0.5)
        self.total.add_(self.linear(x).half())
        return self.total * 2


class Keeping(Counting):
    """Nobody reads what it keeps."""

    def forward(self, x):
        self.total.add_(x.half())
        return self.linear(x)


def kept(ct):
    return {"states": [ct.StateType(ct.TensorType(shape=(1, 64)), "total")]}


KINDS = {
    "any batch": lambda ct: (torch.nn.Linear(64, 64), ct.RangeDim(1, 9), {}),
    "classes": lambda ct: (torch.nn.Linear(64, 64), 1, {"classifier_config": ct.ClassifierConfig([*range(64)])}),
    "state": lambda ct: (Counting(), 1, kept(ct)),
    "state that nobody reads": lambda ct: (Keeping(), 1, kept(ct)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_packages_of_every_kind_keep_what_is_not_palettized(kind, tmp_path):
    from palettax.coreml.scoped import quiet

    with quiet():
        import coremltools as ct

        net, batch, options = KINDS[kind](ct)
        inputs = [ct.TensorType("x", (batch, 64))]
        traced = torch.jit.trace(net.eval(), torch.ones(1, 64), check_trace=False)
        options = {"minimum_deployment_target": ct.target.iOS18, "skip_model_load": True, **options}
        save_package(ct.convert(traced, inputs=inputs, **options), tmp_path / "m.mlpackage")
    for out in "s.mlpackage", "again.mlpackage":
        run("compress", tmp_path / "m.mlpackage", tmp_path / out)
        told = json.loads(run("verify", tmp_path / out, tmp_path / "m.mlpackage", "--json"))
        assert len(told["palettized"]) == 1
    one, other = (
        ct.models.MLModel(str(tmp_path / out), skip_model_load=True).get_spec()
        for out in ("s.mlpackage", "again.mlpackage")
    )
    assert one == other


def test_a_package_beside_the_state_dict_that_it_came_from(tmp_path):
    layer = torch.nn.Linear(64, 64)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    small = px.palettize(to_params(layer.state_dict()), px.quantize_lut(px.kmeans(4), "int8"))
    package = from_torch(layer, torch.ones(1, 64), small, minimum_deployment_target="iOS18")
    save_package(package, tmp_path / "layer.mlpackage")
    told = run("inspect", tmp_path / "layer.mlpackage", "--reference", tmp_path / "layer.pt", "--json")
    rows = {row["name"]: row for row in json.loads(told)["weights"]}
    assert rows["weight"]["form"] == "4 bits, 1 lut, int8"
    assert rows["weight"]["sqnr"] == pytest.approx(
        px.report(to_params(layer.state_dict()), small)["weight"].sqnr, abs=0.1
    )
    run("verify", tmp_path / "layer.mlpackage", tmp_path / "layer.pt", code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("compress nowhere.pt out.pt", "there is no such file"),
        ("compress text.txt out.pt", "'.txt' is no kind of weights"),
        ("compress model.safetensors out.pt", "is written to .safetensors"),
        ("compress model.safetensors folder/out.safetensors", "there is no such folder"),
        ("compress model.safetensors out.safetensors --nbits 5", "nbits"),
        ("compress model.safetensors out.safetensors --nbits 0", "nbits=0"),
        ("compress model.safetensors out.safetensors --nbits 5 --weight-threshold 9999999", "nbits"),
        ("demo --out text.txt", "text.txt"),
        ("compress model.safetensors out.safetensors --nbits 4 --config c.yaml", "leave out --nbits"),
        ("compress model.safetensors out.safetensors --config c.yaml", "c.yaml"),
        ("inspect short.safetensors", "truncated or no safetensors"),
        ("inspect module.pt", "nothing is unpickled"),
        ("inspect list.pt", "holds a list, not a dict of tensors"),
        ("inspect broken.mlpackage", "is no Core ML package"),
        ("inspect empty", "no orbax checkpoint"),
        ("verify broken.mlpackage model.safetensors", "of one kind"),
    ],
)
def test_errors_take_one_line(file, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mlpackage").mkdir()
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-10])
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    torch.save([torch.ones(2)], "list.pt")
    told = run(*arguments.split(), code=2)
    assert told.count("\n") == 1
    assert said in told
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("command", ["compress", "inspect", "verify", "demo"])
def test_help_has_two_examples_and_fits_80_columns(command):
    told = run(command, "--help")
    assert max(map(len, told.splitlines())) <= 80
    assert len(re.findall(rf"^ palettax {command}", told, re.MULTILINE)) == 2


COMMAND = [sys.executable, "-c", "from palettax.cli import main; main()"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file and a package."""
    folder, random = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    px.save(folder / "m.safetensors", {"w": random.normal(size=(64, 64)).astype(np.float32)})
    save_package(
        from_torch(torch.nn.Linear(64, 64), torch.ones(1, 64), {}, minimum_deployment_target="iOS18"),
        folder / "m.mlpackage",
    )
    return folder


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def copied_to(folder, files, kind):
    file = folder / f"m.{kind}"
    (shutil.copytree if kind == "mlpackage" else shutil.copy)(files / file.name, file)
    return file


INTERRUPTED = """
import os, signal
import palettax.transforms.hard as hard
fit = hard.kmeans_groups
def fit_interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return fit(*args, **options)
hard.kmeans_groups = fit_interrupted
"""
KILLED = """
import os, signal, sys
def hook(event, args):
    if event == "os.rename" and any(sys.argv[2] in str(path) for path in args):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def in_place(file, before):
    """What a command says that puts a small file in the place of another, and its exit code."""
    script = f"{before}\nfrom palettax.cli import main\nmain()"
    command = [sys.executable, "-c", script, "compress", file, file, "--nbits", "1", "--force"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return done.stderr, done.returncode


@pytest.mark.parametrize("kind", ["safetensors", "mlpackage"])
def test_an_interrupted_run_leaves_the_old_file_whole(files, tmp_path, kind):
    file = copied_to(tmp_path, files, kind)
    before = contents(tmp_path)
    assert in_place(file, INTERRUPTED) == ("Interrupted; nothing was written\n", 130)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("kind", ["safetensors", "mlpackage"])
def test_killed_before_the_new_file_is_in_its_place(files, tmp_path, kind):
    file = copied_to(tmp_path, files, kind)
    before = contents(tmp_path)
    assert in_place(file, KILLED) == ("", -signal.SIGKILL)
    left = [name for name in os.listdir(tmp_path) if name != file.name]
    assert len(left) == 1
    assert left[0].startswith(f".{file.name}.writing-")
    assert {name: content for name, content in contents(tmp_path).items() if not name.startswith(left[0])} == before
    run("compress", file, file, "--nbits", 1, "--force")
    assert os.listdir(tmp_path) == [file.name]
    assert contents(tmp_path) != before


def test_what_is_half_imported_is_imported_before_it_stops(tmp_path, monkeypatch):
    """C++ that imports Python, as torch has, aborts the process of an exception."""
    (tmp_path / "large_extension.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhole = True")
    monkeypatch.syspath_prepend(tmp_path)

    def work():
        importlib.import_module("large_extension")
        threading.Event().wait(60)

    start = time.monotonic()
    with interruptible(), pytest.raises(KeyboardInterrupt):
        work()
    assert sys.modules.pop("large_extension").whole
    assert time.monotonic() < start + 60


def test_on_a_terminal_there_is_a_bar(file, model, tmp_path):
    """With how many weights are done, and the time that is left."""
    save_package(model, tmp_path / "m.mlpackage")
    for source, count in ((file, "6/6 leaves"), (tmp_path / "m.mlpackage", "3/3 weights")):
        seen, terminal = os.openpty()
        command = [*COMMAND, "compress", source, tmp_path / f"small{source.suffix}"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal, env=environment) as running:
            os.close(terminal)
            drawn = b"".join(iter(functools.partial(read, seen), b""))
        os.close(seen)
        assert running.returncode == 0
        plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", drawn).decode()
        assert re.search(rf"palettizing .*{count} +0:00:00", plain), plain


def read(terminal):
    """What has been written to a terminal since; nothing once nobody has it open, which Linux calls an error."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


def test_the_version():
    assert run("--version").strip() == px.__version__


def test_json_is_all_there_is_on_stdout(file, tmp_path):
    command = [*COMMAND, "compress", file, tmp_path / "small.safetensors", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["out"] == str(tmp_path / "small.safetensors")
    assert done.stderr == ""


def test_what_a_mask_leaves_out_is_compared_too(tmp_path):
    weights = {"w": np.where(np.arange(4096).reshape(64, 64) % 3, np.random.default_rng(0).normal(size=(64, 64)), 0)}
    px.save(tmp_path / "pruned.safetensors", {"w": weights["w"].astype(np.float32)})
    px.save(tmp_path / "dense.safetensors", {"w": np.where(weights["w"], weights["w"], 0.5).astype(np.float32)})
    small = px.palettize(weights | {"w": weights["w"].astype(np.float32)}, px.keep_zeros(px.kmeans(4), sparse=True))
    px.save(tmp_path / "small.safetensors", small)
    run("verify", tmp_path / "small.safetensors", tmp_path / "pruned.safetensors")
    told = run("verify", tmp_path / "small.safetensors", tmp_path / "dense.safetensors", code=1)
    assert "1366 of its weights that have no entry" in told


def test_a_fault_that_nobody_foresaw_is_no_difference(file, monkeypatch):
    monkeypatch.setattr("palettax._commands.verify.named_leaves", lambda tree: {}[1])
    assert "Error: 1" in run("verify", file, file, code=2)


def test_a_table_in_any_order_is_in_order(model, tmp_path):
    """Core ML asks for no order, and coremltools keeps none."""

    def descending(weights):
        lut, indices = px.kmeans_lut(weights.reshape(-1), 4)[:2]
        return lut[::-1], 15 - np.asarray(indices)

    save_package(model, tmp_path / "m.mlpackage")
    config = OptimizationConfig(OpPalettizerConfig(mode="custom", lut_function=descending))
    save_package(compress_weights(model, config).mlmodel, tmp_path / "s.mlpackage")
    run("verify", tmp_path / "s.mlpackage", tmp_path / "m.mlpackage")
