"""Three networks as torch modules: ResNet-50 with random weights, EfficientNet-lite0 and MiniLM-L6 with their own.

The names of parameters are those of torchvision's ResNet-50 and of the stored weights. `lite0.py` and `minilm.py` fetch
the weights. Run as a script, it says how many there are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import minilm as jax_minilm
import numpy as np
import torch
from lite0 import load as lite0
from minilm import EPSILON, HEADS, LAYERS
from torch import nn

STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))  # blocks, channels, stride
WIDTH, WIDE, WORDS, POSITIONS, TYPES = 384, 1536, 30522, 512, 2


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut, a fourth where the shapes differ; the stride is in the 3×3 one."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * channels
        self.conv1, self.bn1 = nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if inputs != outputs or stride > 1:
            self.downsample.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Narrow, convolve, widen, and add."""
        hidden = self.bn1(self.conv1(x)).relu()
        hidden = self.bn2(self.conv2(hidden)).relu()
        return (self.bn3(self.conv3(hidden)) + self.downsample(x)).relu()


class ResNet50(nn.Module):
    """ResNet-50: 25.6 million weights, 1,000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for stage, (count, channels, stride) in enumerate(STAGES, start=1):
            blocks = nn.Sequential()
            for i in range(count):
                blocks.append(Bottleneck(inputs, channels, 1 if i else stride))
                inputs = 4 * channels
            self.add_module(f"layer{stage}", blocks)
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, 1000) of images (n, 3, 224, 224)."""
        hidden = self.bn1(self.conv1(images)).relu()
        hidden = nn.functional.max_pool2d(hidden, 3, 2, padding=1)
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.fc(hidden.mean(dim=(2, 3)))


def added(inputs: int) -> nn.ModuleDict:
    """A dense layer whose result is added to what the sublayer was given, and the norm of the sum."""
    return nn.ModuleDict({"dense": nn.Linear(inputs, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, EPSILON)})


class EncoderLayer(nn.Module):
    """Attention and two dense layers, each normalized with what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        own = nn.ModuleDict({part: nn.Linear(WIDTH, WIDTH) for part in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": own, "output": added(WIDTH)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDE)})
        self.output = added(WIDE)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens (n, length, 384) after those of their sentence."""
        parts = (part(hidden).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.attention["self"].values())
        gathered = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None])
        hidden = self.joined(self.attention["output"], hidden, gathered.transpose(1, 2).flatten(2))
        wide = nn.functional.gelu(self.intermediate["dense"](hidden))
        return self.joined(self.output, hidden, wide)

    @staticmethod
    def joined(layer: nn.ModuleDict, hidden: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """The end of a sublayer."""
        return layer["LayerNorm"](hidden + layer["dense"](inner))


class MiniLM(nn.Module):
    """MiniLM-L6 without its pooler: 22.6 million weights."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"word": WORDS, "position": POSITIONS, "token_type": TYPES}
        self.embeddings = nn.ModuleDict({f"{part}_embeddings": nn.Embedding(n, WIDTH) for part, n in sizes.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(WIDTH, EPSILON)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([EncoderLayer() for _ in range(LAYERS)])})

    def forward(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, 384) of length one, of ids (n, length) and a mask that is 1 at tokens and 0 elsewhere."""
        hidden = self.embeddings["word_embeddings"](token_ids)
        hidden = hidden + self.embeddings["position_embeddings"].weight[: token_ids.shape[1]]
        hidden = self.embeddings["LayerNorm"](hidden + self.embeddings["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, mask != 0)
        weight = mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(dim=1) / weight.sum(dim=1))


def resnet50(seed: int = 0) -> nn.Module:
    """The network in eval mode, with the weights that torch draws."""
    torch.manual_seed(seed)
    return ResNet50().eval()


def minilm(folder: Path | None = None) -> nn.Module:
    """The network in eval mode; the folder is as in `minilm.load`."""
    params, _ = jax_minilm.load(folder)
    model = MiniLM()
    model.load_state_dict({name: torch.from_numpy(np.array(leaf)) for name, leaf in params.items()})
    return model.eval()


NETWORKS = {"ResNet-50": resnet50, "EfficientNet-lite0": lite0, "MiniLM-L6": minilm}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, make in NETWORKS.items():
        parameters = list(make().parameters())
        print(f"{name:18} {sum(p.numel() for p in parameters):10,} weights in {len(parameters)} parameters")


if __name__ == "__main__":
    main()
