"""Small models."""

from __future__ import annotations

import torch


class Mnist(torch.nn.Module):
    """Convolutions and dense layers; `x.size(0)` is what NumPy 2.4 breaks under trace."""

    example = torch.zeros(1, 1, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.conv2 = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.dense1 = torch.nn.Linear(8 * 4 * 4, 16)
        self.dense2 = torch.nn.Linear(16, 12)

    def forward(self, x):
        x = self.bn1(torch.nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2, 2))
        x = torch.relu(self.conv2(x))
        return self.dense2(torch.relu(self.dense1(x.view(x.size(0), -1))))


class Mixed(torch.nn.Module):
    """One of each other kind of weight, and a tied pair."""

    example = torch.zeros(1, 6, dtype=torch.int32)

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 12)
        self.layers = torch.nn.Sequential(torch.nn.Conv1d(12, 8, 3, padding=1), torch.nn.ConvTranspose1d(8, 12, 2))
        self.matrix = torch.nn.Parameter(torch.randn(12, 12))
        self.output = torch.nn.Linear(12, 20, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.layers(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return self.output(x @ self.matrix)


class Deconvolution(torch.nn.Module):
    """A transposed convolution in two dimensions."""

    example = torch.zeros(1, 4, 5, 5)

    def __init__(self):
        super().__init__()
        self.up = torch.nn.ConvTranspose2d(4, 6, 2, stride=2)

    def forward(self, x):
        return self.up(x)
