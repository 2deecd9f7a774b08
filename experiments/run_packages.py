"""Core ML packages evaluated off a Mac by `palettax.coreml.as_function`, beside the torch modules they were made of.

Eight networks are converted in float32 and in float16, as they are, and palettized to 4 bits; EfficientNet-lite0 and
MiniLM-L6 have their own weights, the others random ones. Of each the largest difference from torch is printed, over the
range of torch's output: of the float32 package, of the float16 package computed in float32, and of it with the result
of every op rounded to float16. The 4-bit package is run beside itself decompressed. Then times: the first call, which
compiles, and the median of later ones, torch and the compiled program in turns.

Writes the table, with the machine's description, to `run_packages.md` beside this script. `--network` takes one network
only and writes nothing. About four minutes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_networks import inputs_of
from measuring import machine, timed
from rich.progress import track
from torch import nn
from torch_networks import NETWORKS

import palettax.coreml as pc
from palettax.demo.networks import torch_twin

# After palettax.coreml, which keeps its import quiet.
import coremltools as ct  # isort: skip

HERE = Path(__file__)
ROUNDS = 9
HEAD = (
    "| network | float32 package, difference / range | float16 package | every op rounded | 4 bits beside decompressed "
    "| first call, s | later calls, ms | torch, ms | ratio |"
)


class Basic(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.short.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve twice, and add."""
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.short(x)).relu()


class Inverted(nn.Module):
    """Widen, convolve each channel by itself, narrow; with a shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All layers, and the input."""
        return self.layers(x) + x if self.adds else self.layers(x)


def resnet18() -> nn.Module:
    """11.7 million weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Basic(inputs, outputs, stride), Basic(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobilenet_v2() -> nn.Module:
    """3.5 million weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    inputs = 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, count, stride in stages:
        for number in range(count):
            layers.append(Inverted(inputs, outputs, stride if number == 0 else 1, expansion))
            inputs = outputs
    layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1280, 1000))


class VisionTransformer(nn.Module):
    """Patches of 16×16 pixels, four layers of width 192."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 196, width))
        layer = nn.TransformerEncoderLayer(width, 3, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.ModuleList([nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)])
        self.head = nn.Linear(width, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.layers[0](self.embed(images).flatten(2).transpose(1, 2) + self.positions).mean(dim=1))


class Recurrent(nn.Module):
    """An LSTM both ways over 32 words, and a dense layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(1000, 64), nn.LSTM(64, 128, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, 20)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.lstm(self.embed(words))[0][:, -1])


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "MNIST": torch_twin,
    "ResNet-18": resnet18,
    "ResNet-50": NETWORKS["ResNet-50"],
    "MobileNetV2": mobilenet_v2,
    "EfficientNet-lite0": NETWORKS["EfficientNet-lite0"],
    "MiniLM-L6": NETWORKS["MiniLM-L6"],
    "vision transformer": VisionTransformer,
    "LSTM": Recurrent,
}


def example(name: str) -> tuple[torch.Tensor, ...]:
    """What the network takes."""
    generator = torch.Generator().manual_seed(0)
    if name == "MNIST":
        return (torch.randn(1, 1, 28, 28, generator=generator),)
    if name == "LSTM":
        return (torch.randint(1000, (1, 32), generator=generator, dtype=torch.int32),)
    return inputs_of(name)


def row(name: str) -> str:
    """Convert, run, compare."""
    torch.manual_seed(0)
    model, inputs = MAKERS[name]().eval(), example(name)
    with torch.inference_mode():
        expected = model(*inputs).numpy()

    def package(precision: Any) -> Any:
        return pc.from_torch(model, inputs, {}, minimum_deployment_target="iOS18", compute_precision=precision)

    wide, half = package(ct.precision.FLOAT32), package(ct.precision.FLOAT16)
    names = [feature.name for feature in wide.get_spec().description.input]
    given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}

    def difference(mlmodel: Any, arithmetic: Any = "float32") -> float:
        (found,) = pc.run(mlmodel, given, arithmetic=arithmetic).values()
        return float(abs(found.astype(np.float64) - expected).max() / np.ptp(expected))

    errors = difference(wide), difference(half), difference(half, "declared")
    small = pc.palettize_weights(half, pc.OptimizationConfig(pc.OpPalettizerConfig(nbits=4)))
    ((one,), (other,)) = (pc.run(mlmodel, given).values() for mlmodel in (small, pc.decompress_weights(small)))
    same = "identical" if (one == other).all() else f"{abs(one - other).max():.1e}"

    evaluate = pc.as_function(wide)
    first = timed(lambda: evaluate(given))

    def in_torch() -> object:
        with torch.inference_mode():
            return model(*inputs)

    pairs = [(timed(lambda: evaluate(given)), timed(in_torch)) for _ in range(ROUNDS)]
    ours, theirs = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    cells = (*(f"{error:.1e}" for error in errors), same, f"{first:.1f}", f"{ours:.1f}", f"{theirs:.1f}")
    return f"| {name} | {' | '.join(cells)} | {statistics.median(a / b for a, b in pairs):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=MAKERS, help="this one only; write nothing")
    chosen = parser.parse_args().network
    lines = [HEAD, "|---" * 9 + "|"]
    for name in track([chosen] if chosen else [*MAKERS], description="networks"):
        lines.append(row(name))
        print(lines[-1], flush=True)
    foot = (
        "One image, or one or two texts, at a time. Ratio: the median of palettax's time over torch's, in turns, "
        f"{ROUNDS} calls. {machine('jax', 'torch', 'coremltools', 'numpy')}"
    )
    text = "\n".join([*lines, "", foot]) + "\n"
    print("\n" + text)
    if not chosen:
        HERE.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
