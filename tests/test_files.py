"""What is written appears whole, and what a killed process left behind goes away."""

import os

import pytest

from palettax._files import folder_beside, replacing


def test_what_is_abandoned_goes_and_what_is_in_use_stays(tmp_path):
    target = tmp_path / "odd[name].bin"
    with replacing(target) as first:
        first.write_bytes(b"first")
        abandoned = first.parent.with_name(first.parent.name + "0")
        abandoned.mkdir()
        (abandoned / "part").write_bytes(b"half")
        other = tmp_path / ".other.bin.writing-0"
        other.mkdir()
        with replacing(target) as second:
            assert not abandoned.exists()
            assert first.exists()
            assert other.exists()
            second.write_bytes(b"second")
        assert target.read_bytes() == b"second"
    assert target.read_bytes() == b"first"
    assert sorted(os.listdir(tmp_path)) == [other.name, target.name]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("palettax._files.fcntl", None)
    target = tmp_path / "w.bin"
    with folder_beside(target) as first, folder_beside(target) as second:
        assert first.exists()
        assert second.exists()
    assert not os.listdir(tmp_path)


def test_an_error_leaves_nothing(tmp_path):
    target = tmp_path / "w.bin"

    def fails():
        with replacing(target) as fresh:
            fresh.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not os.listdir(tmp_path)
