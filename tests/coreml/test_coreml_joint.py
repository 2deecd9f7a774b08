"""What coremltools made, palettized further; what palettax made, compressed further there; and all of it back."""

from __future__ import annotations

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
from coreml_programs import model, normal, outputs, peer, peer_config, same_program, squared_errors

import palettax as px
import palettax.torch
from palettax.coreml import (
    OptimizationConfig,
    audit,
    compress_weights,
    decompress_weights,
    get_weights_metadata,
    palettize_weights,
    read_palettes,
)
from palettax.coreml.package import operations
from palettax.coreml.scoped import quiet
from palettax.leaf import same_bits

TWO_BITS = OptimizationConfig({"nbits": 2, "weight_threshold": 100})


def pruned(mlmodel):
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=100)
    return peer(cto.prune_weights, mlmodel, cto.OptimizationConfig(config))


def quantized(mlmodel, joint=False, **keys):
    config = cto.OptimizationConfig(cto.OpLinearQuantizerConfig(weight_threshold=1, **keys))
    return peer(cto.linear_quantize_weights, mlmodel, config, joint_compression=joint)


def kinds(mlmodel):
    return [op.op_type for _, op in operations(mlmodel) if op.op_type.startswith("constexpr_")]


MADE = {
    "dense": lambda: model(half=False),
    "iOS17": lambda: model("iOS17"),
    "pruned": lambda: pruned(model()),
    "pruned iOS17": lambda: pruned(model("iOS17")),
    "quantized": lambda: quantized(model()),
    "quantized iOS17": lambda: quantized(model("iOS17")),
    "offsets": lambda: quantized(model(half=False), mode="linear", dtype="uint8"),
    "int4 blocks": lambda: quantized(model(), dtype="int4", granularity="per_block", block_size=4),
    "palettized": lambda: peer(cto.palettize_weights, model(), peer_config(nbits=3, weight_threshold=100)),
    "grouped": lambda: peer(
        cto.palettize_weights,
        model(),
        peer_config(nbits=4, weight_threshold=100, granularity="per_grouped_channel", group_size=4),
    ),
    "vectors": lambda: peer(cto.palettize_weights, model(), peer_config(nbits=3, weight_threshold=100, cluster_dim=2)),
    "palettized iOS17": lambda: peer(cto.palettize_weights, model("iOS17"), peer_config(nbits=4, weight_threshold=100)),
    "pruned, palettized": lambda: peer(
        cto.palettize_weights, MADE["pruned"](), peer_config(nbits=4, weight_threshold=100), joint_compression=True
    ),
    "palettized, quantized": lambda: quantized(MADE["grouped"](), joint=True, granularity="per_tensor"),
    "pruned, quantized": lambda: quantized(MADE["pruned"](), joint=True),
    "pruned, offsets": lambda: quantized(MADE["pruned"](), joint=True, mode="linear", dtype="uint8"),
    "ours, quantized": lambda: quantized(palettize_weights(model(), TWO_BITS), joint=True, granularity="per_tensor"),
    "ours, iOS26": lambda: palettize_weights(
        model("iOS26"), OptimizationConfig({"nbits": 3, "weight_threshold": 100, "enable_per_channel_scale": True})
    ),
}


@pytest.mark.parametrize("kind", MADE)
def test_decompressed_as_coremltools_does(kind):
    """The same constants, and no trace of what they were made from."""
    mlmodel = MADE[kind]()
    ours, theirs = decompress_weights(mlmodel), peer(cto.decompress_weights, mlmodel)
    assert kinds(ours) == []
    found, expected = (get_weights_metadata(dense, 100) for dense in (ours, theirs))
    assert [weight.val.shape for weight in found.values()] == [weight.val.shape for weight in expected.values()]
    for name, one, other in zip(found, found.values(), expected.values(), strict=True):
        assert same_bits(one.val, other.val), name
    inputs = [normal(*feature.type.multiArrayType.shape) for feature in mlmodel.get_spec().description.input]
    for one, other in zip(outputs(mlmodel, inputs), outputs(ours, inputs), strict=True):
        np.testing.assert_array_equal(one, other)
    # Without decompressing them, their values are known too.
    at_once = get_weights_metadata(mlmodel, 100)
    assert all(same_bits(a.val, b.val) for a, b in zip(at_once.values(), found.values(), strict=True))


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind not in ("dense", "iOS17")])
def test_what_is_compressed_stays_as_it_is_unless_asked(kind):
    mlmodel = MADE[kind]()
    small, report = compress_weights(mlmodel, TWO_BITS)
    compressed = [leaf for leaf in report.values() if leaf.nbits is None and leaf.nbytes < leaf.nbytes_before]
    assert compressed
    assert all("compressed already" in leaf.skipped for leaf in compressed)
    assert len(kinds(small)) == len(kinds(mlmodel)) + sum(leaf.nbits is not None for leaf in report.values())
    # Where none of the weights was dense, nothing at all has changed.
    if all(leaf.nbits is None for leaf in report.values()):
        assert same_program(small, mlmodel)


def test_pruned_then_palettized():
    """Zeros stay zeros and cost no entry: the others have the table to themselves."""
    before = MADE["pruned"]()
    ours = palettize_weights(before, TWO_BITS, joint_compression=True)
    theirs = peer(cto.palettize_weights, before, peer_config(nbits=2, weight_threshold=100), joint_compression=True)
    assert kinds(ours) == kinds(theirs)
    assert (squared_errors(ours, before) <= squared_errors(theirs, before) * (1 + 1e-3)).all()
    values, tables = get_weights_metadata(before, 100).values(), read_palettes(ours).values()
    for weight, leaf in zip(values, tables, strict=True):
        assert ((weight.val == 0) == (leaf.depalettize() == 0)).all()
        if leaf.mask is not None:
            assert not (leaf.lut == 0).any()


QUANTIZED = ["quantized", "offsets", "int4 blocks", "pruned, quantized", "pruned, offsets"]


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZED if kind != "int4 blocks"])
def test_the_numbers_of_a_byte_fit_into_a_table_of_a_byte(kind):
    before = MADE[kind]()
    small = palettize_weights(before, OptimizationConfig({"nbits": 8, "weight_threshold": 100}), True)
    for one, other in zip(*(get_weights_metadata(m, 100).values() for m in (small, before)), strict=True):
        np.testing.assert_array_equal(one.val, other.val)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_then_palettized(kind):
    """The scales stay: the table is of what they multiply, weighted by their squares."""
    before = MADE[kind]()
    ours, report = compress_weights(before, OptimizationConfig({"nbits": 3, "weight_threshold": 100}), True)
    assert {leaf.nbits for leaf in report.values() if len(leaf.shape) > 1} == {3}
    # Of the one coremltools makes tables that no target holds; the other it leaves as it is.
    if kind in ("quantized", "offsets"):
        theirs = peer(cto.palettize_weights, before, peer_config(nbits=3, weight_threshold=100), joint_compression=True)
        assert (squared_errors(ours, before) <= squared_errors(theirs, before) * (1 + 1e-3)).all()


def test_a_table_is_palettized_no_further():
    mlmodel = MADE["palettized"]()
    with pytest.warns(UserWarning, match="by constexpr_lut_to_dense; decompress_weights gives it back"):
        small = palettize_weights(mlmodel, TWO_BITS, joint_compression=True)
    assert same_program(small, mlmodel)


@pytest.mark.parametrize("kind", ["palettized", "grouped", "pruned, palettized", "palettized, quantized"])
def test_palettized_again_at_the_same_width_it_loses_nothing(kind):
    """Each value of a table of 2^n entries is one of 2^n values."""
    dense = decompress_weights(MADE[kind]())
    small = palettize_weights(dense, OptimizationConfig({"nbits": 8, "weight_threshold": 100}))
    assert squared_errors(small, dense).max() == 0


@pytest.mark.parametrize(("kind", "why"), [("pruned", "would share an index"), ("offsets", "an offset for each")])
def test_vectors_of_numbers_that_differ_in_kind_are_refused(kind, why):
    mlmodel = MADE[kind]()
    with pytest.warns(UserWarning, match=why):
        small = palettize_weights(
            mlmodel, OptimizationConfig({"nbits": 2, "cluster_dim": 2, "weight_threshold": 100}), joint_compression=True
        )
    assert kinds(small) == kinds(mlmodel)


def test_a_plain_conversion_stores_tied_weights_once():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(40, 16), "head": torch.nn.Linear(16, 40, bias=False)})
    model["head"].weight = model["embed"].weight

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, tokens):
            return self.parts["head"](self.parts["embed"](tokens))

    small, tokens = px.torch.PostTrainingPalettizer(Tied()).compress().eval(), torch.zeros(1, 3, dtype=torch.int32)
    with quiet(), px.torch.fast_conversion():
        program = torch.export.export(small, (tokens,)).run_decompositions({})
        plain = ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)
    found = audit(plain, small)
    assert found.identical
    assert set(found.leaves) == {"parts.embed.weight", "parts.head.weight"}


def test_a_plain_conversion_of_a_traced_model_whose_names_begin_with_digits():
    palettizer = px.torch.PostTrainingPalettizer(torch.nn.Sequential(torch.nn.Linear(16, 12)))
    small, x = palettizer.compress().eval(), torch.ones(1, 16)
    with quiet():
        inputs, target = [ct.TensorType(shape=x.shape)], ct.target.iOS18
        plain = ct.convert(
            torch.jit.trace(small, x), inputs=inputs, minimum_deployment_target=target, skip_model_load=True
        )
    assert audit(plain, small).identical
