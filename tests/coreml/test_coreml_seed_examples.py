"""The code of coremltools' documentation for Core ML models, with its import line changed, and in its own library."""

import coremltools as ct
import numpy as np
import pytest
from coreml_programs import convert, normal, peer
from coremltools.converters.mil import Builder as mb

from palettax.coreml import get_weights_metadata, read_palettes, save_package

LIBRARIES = {
    "palettax": "import palettax as cto\nimport palettax.coreml",
    "coremltools": "import coremltools.optimize as cto",
}

FOUR_BITS = """
model = ct.models.MLModel("my_model.mlpackage")
config = cto.coreml.OptimizationConfig(
    global_config=cto.coreml.OpPalettizerConfig(mode="kmeans", nbits=4))
compressed_model = cto.coreml.palettize_weights(model, config)
"""

OVER_512 = """
mlmodel = ct.models.MLModel("my_model.mlpackage")
op_config = cto.coreml.OpPalettizerConfig(nbits=6, weight_threshold=512)
config = cto.coreml.OptimizationConfig(global_config=op_config)
compressed_model = cto.coreml.palettize_weights(mlmodel, config)
"""

BY_TYPE_AND_NAME = """
mlmodel = ct.models.MLModel("my_model.mlpackage")
global_config = cto.coreml.OpPalettizerConfig(nbits=6)
linear_config = cto.coreml.OpPalettizerConfig(nbits=8)
config = cto.coreml.OptimizationConfig(
    global_config=global_config,
    op_type_configs={"linear": linear_config},
    op_name_configs={"conv1": None, "conv3": None},
)
compressed_model = cto.coreml.palettize_weights(mlmodel, config)
"""

LARGEST = """
def lut_function(weight):
    weight = weight.flatten()
    nbits = 4
    unique_elements = np.unique(weight)
    k = (1 << nbits) - 1
    top_k = np.partition(weight, -k)[-k:]
    lut = [0.0] + top_k.tolist()
    mapping = {v: idx for idx, v in enumerate(lut)}
    indices = [mapping[v] if v in mapping else 0 for v in weight]
    return lut, indices

model = ct.models.MLModel("my_model.mlpackage")
config = cto.coreml.OptimizationConfig(
    global_config=cto.coreml.OpPalettizerConfig(mode="custom", lut_function=lut_function))
compressed_model = cto.coreml.palettize_weights(model, config)
"""

EXAMPLES = {
    "4 bits": (FOUR_BITS, {"conv2": 4, "conv3": 4, "fc": 4}),
    "over 512": (OVER_512, {"conv1": 6, "conv2": 6, "conv3": 6, "fc": 6}),
    "by type and name": (BY_TYPE_AND_NAME, {"conv2": 6, "fc": 8}),
    "custom": (LARGEST, {"conv2": 4, "conv3": 4, "fc": 4}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 8, 8, 8))], opset_version=ct.target.iOS16)
    def program(x):
        x = mb.relu(x=mb.conv(x=x, weight=np.abs(normal(16, 8, 3, 3)), pad_type="same", name="conv1"))
        x = mb.relu(x=mb.conv(x=x, weight=np.abs(normal(24, 16, 3, 3)), pad_type="same", name="conv2"))
        x = mb.conv(x=x, weight=np.abs(normal(16, 24, 3, 3)), pad_type="same", name="conv3")
        return mb.linear(x=mb.reduce_mean(x=x, axes=[2, 3]), weight=np.abs(normal(256, 16)), name="fc")

    folder = tmp_path_factory.mktemp("models")
    mlmodel = convert(program, "iOS16", half=False)
    save_package(mlmodel, folder / "my_model.mlpackage")
    return folder


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_runs(example, library, folder, monkeypatch):
    monkeypatch.chdir(folder)
    code, wanted = EXAMPLES[example]
    names = {"ct": ct, "np": np}
    peer(lambda text: exec(text, names), f"{LIBRARIES[library]}\n{code}")
    small, dense = names["compressed_model"], ct.models.MLModel("my_model.mlpackage", skip_model_load=True)
    nbits = {name.split("_")[0]: leaf.nbits for name, leaf in read_palettes(small).items()}
    assert nbits == wanted
    for weight, was in zip(
        get_weights_metadata(small, 600).values(), get_weights_metadata(dense, 600).values(), strict=True
    ):
        reader = was.child_ops[0].name.split("_")[0]
        if reader not in wanted:
            np.testing.assert_array_equal(weight.val, was.val)
        elif example == "custom":
            kept = was.val >= np.partition(was.val.ravel(), -15)[-15]
            np.testing.assert_array_equal(weight.val, np.where(kept, was.val, 0))
        else:
            assert len(np.unique(weight.val)) == 2 ** wanted[reader]
