"""The main job in small: an untrained network, two palettes, the whole way; and the command line around it."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from palettax.demo.data import Digits, load_digits, read_idx
from palettax.demo.networks import DigitNet, torch_twin
from palettax.demo.run import recipes, run_recipes, write_results


@pytest.fixture(scope="module")
def digits():
    random = np.random.default_rng(0)
    images = random.standard_normal((64, 28, 28, 1)).astype(np.float32)
    labels = random.integers(0, 10, 64).astype(np.int32)
    return Digits(images, labels, images, labels)


def test_what_is_written_is_what_was_computed(digits, tmp_path):
    model = DigitNet(nnx.Rngs(0))
    chosen = {name: recipes()[name] for name in ("8bit", "4bit-grouped", "4bit-by-torch")}
    rows = list(run_recipes(model, digits, tmp_path, chosen))
    assert [row.name for row in rows] == ["float16", *chosen]
    assert [row.identical for row in rows] == [None, True, True, True]
    # 8 bits a weight and little else is half of 16, and 4 a quarter.
    assert rows[1].ratio == pytest.approx(1 / 2, abs=0.01)
    assert rows[2].ratio == pytest.approx(1 / 4, abs=0.01)
    write_results(rows, model, tmp_path)
    assert [row["name"] for row in json.loads((tmp_path / "table.json").read_text())] == ["float16", *chosen]
    assert (tmp_path / "table.md").read_text().count("| yes |") == 3
    for figure in ("histograms.png", "accuracy.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_the_twin_has_the_names_of_the_network():
    params = nnx.to_pure_dict(nnx.state(DigitNet(nnx.Rngs(0)), nnx.Param))
    assert set(params) == {name for name, layer in torch_twin().named_children() if list(layer.parameters())}


def test_the_digits_are_split_without_overlap():
    digits = load_digits(None, seed=0)
    assert digits.train_images.shape == (4000, 28, 28, 1)
    assert digits.test_images.shape == (1000, 28, 28, 1)
    assert set(np.unique(digits.test_labels)) == set(range(10))
    assert not np.array_equal(load_digits(None, seed=1).test_labels, digits.test_labels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
    content = bytes([0, 0, 8, 3]) + np.array(pixels.shape, ">i4").tobytes() + pixels.tobytes()
    (tmp_path / f"images{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    np.testing.assert_array_equal(read_idx(tmp_path, "images"), pixels)
    (tmp_path / f"images{suffix}").write_bytes(gzip.compress(content[:-1]) if suffix else content[:-1])
    with pytest.raises(ValueError, match="is not a whole IDX file"):
        read_idx(tmp_path, "images")


def palettax(*arguments):
    command = [sys.executable, "-W", "error", "-c", "from palettax.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help():
    shown = palettax("--help")
    assert shown.returncode == 0
    assert "lut[indices]" in shown.stdout
    assert "demo" in shown.stdout


def test_a_folder_that_is_not_there(tmp_path):
    refused = palettax("demo", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("Error: no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in")
    assert not (tmp_path / "out").exists()
