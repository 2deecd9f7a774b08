"""A package is written whole or not at all, whatever goes wrong, and what was there before stays."""

import os
import subprocess
import sys

import coremltools as ct
import pytest
from coreml_programs import asked, model

from palettax.coreml import decompress_weights, palettize_weights, read_palettes, save_package

_IN_ANOTHER_PROCESS = """
import os, resource, signal, sys
import palettax.coreml
import coremltools as ct
mlmodel = ct.models.MLModel(sys.argv[1], skip_model_load=True)
if sys.argv[3] == "killed":
    write = mlmodel.save
    def save(path):
        write(path)
        os.kill(os.getpid(), signal.SIGKILL)
    mlmodel.save = save
else:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
palettax.coreml.save_package(mlmodel, sys.argv[2])
"""


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("how", ["killed", "disk full"])
def test_an_older_package_outlives_a_failed_save(how, tmp_path):
    other = save_package(model(), tmp_path / "other.mlpackage")
    target = save_package(palettize_weights(model(), asked(nbits=2)), tmp_path / "small.mlpackage")
    before = content(target)
    script = [sys.executable, "-c", _IN_ANOTHER_PROCESS, str(other), str(target), how]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert content(target) == before
    if how == "disk full":
        assert f"{target} could not be written" in result.stderr
        assert sorted(os.listdir(tmp_path)) == ["other.mlpackage", "small.mlpackage"]
    save_package(ct.models.MLModel(str(other), skip_model_load=True), target)
    assert content(target).keys() == content(other).keys()
    assert sorted(os.listdir(tmp_path)) == ["other.mlpackage", "small.mlpackage"]


def test_what_a_killed_swap_left_behind_is_put_back(tmp_path):
    target = save_package(model(), tmp_path / "small.mlpackage")
    before = content(target)
    target.rename(tmp_path / ".small.mlpackage.old")
    broken = ct.models.MLModel(str(tmp_path / ".small.mlpackage.old"), skip_model_load=True)
    broken.save = lambda path: (_ for _ in ()).throw(RuntimeError("no space"))
    with pytest.raises(OSError, match=r"small\.mlpackage could not be written: no space"):
        save_package(broken, target)
    assert content(target) == before
    assert os.listdir(tmp_path) == ["small.mlpackage"]


def test_between_the_two_steps_of_a_swap_the_older_package_is_found(tmp_path):
    target = save_package(palettize_weights(model(), asked(nbits=2)), tmp_path / "small.mlpackage")
    before = read_palettes(target)
    target.rename(tmp_path / ".small.mlpackage.old")
    assert read_palettes(target).keys() == before.keys()


def test_what_a_link_points_to_is_replaced(tmp_path):
    target = save_package(model(), tmp_path / "m.mlpackage")
    (tmp_path / "link.mlpackage").symlink_to(target)
    save_package(palettize_weights(model(), asked(nbits=2)), tmp_path / "link.mlpackage")
    assert (tmp_path / "link.mlpackage").is_symlink()
    assert read_palettes(target)
    assert sorted(os.listdir(tmp_path)) == ["link.mlpackage", "m.mlpackage"]


def test_a_file_is_no_package_to_replace(tmp_path):
    (tmp_path / "m.mlpackage").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file and no package"):
        save_package(model(), tmp_path / "m.mlpackage")
    assert (tmp_path / "m.mlpackage").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_to_be_written_to(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"nothing can be written there: .*m\.mlpackage"):
        save_package(model(), tmp_path / "mine" / "m.mlpackage")


def test_a_package_is_as_readable_as_any_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    target = save_package(model(), tmp_path / "m.mlpackage")
    assert target.stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_the_name_is_checked_before_the_work(tmp_path):
    with pytest.raises(ValueError, match=r"m\.MLPACKAGE: a package's name ends in \.mlpackage"):
        save_package(model(), tmp_path / "m.MLPACKAGE")
    assert not os.listdir(tmp_path)


DAMAGED = ["weight.bin", "model.mlmodel", "Manifest.json"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "missing"])
def test_damage_is_a_clear_error(damage, name, tmp_path):
    target = save_package(model(), tmp_path / "m.mlpackage")
    (part,) = target.rglob(name)
    whole = part.read_bytes()
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes({"cut": whole[:100], "empty": b"", "other": b"\xff\x07" * len(whole)}[damage])
    with pytest.raises(ValueError, match=r"cannot be read .*damaged|no Core ML package"):
        palettize_weights(target, asked(nbits=4))


def test_there_is_no_such_package(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.mlpackage: there is no such package"):
        palettize_weights(tmp_path / "none.mlpackage", asked(nbits=4))


def test_decompressing_raises_no_target():
    old = model("iOS15", half=False)
    assert decompress_weights(old).get_spec().specificationVersion == old.get_spec().specificationVersion
    assert palettize_weights(old, asked(nbits=4)).get_spec().specificationVersion == ct.target.iOS16.value
