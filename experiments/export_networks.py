"""ResNet-50, EfficientNet-lite0 and MiniLM-L6: palettized in torch, converted to Core ML, and audited from the disk.

Every network is palettized in five ways by `PostTrainingPalettizer`, converted by `from_torch` with the tables that it
carries, saved, opened by its path, and compared bit for bit. ResNet-50 has random weights, the others their own (see
`torch_networks.py`). Prints a line for each and writes them, with what stayed dense and why, and the machine's
description, to `export_networks.md` beside this script. Ends with status 1 if a table or an index differs. `--network`
takes one network only and writes nothing. About ten minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import minilm
import numpy as np
import torch
from measuring import machine
from torch_networks import NETWORKS

from palettax.coreml import audit, from_torch, package_bytes, read_palettes, save_package
from palettax.torch import PostTrainingPalettizer, PostTrainingPalettizerConfig

HERE = Path(__file__)
TOLERANCE = 1e-4  # of MiniLM in torch and in JAX
SENTENCES = ("A cat sleeps on the sofa.", "Interest rates rose again this quarter.")
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits, a table a tensor": ("iOS16", {"n_bits": 4}),
    "4 bits, a table for 8 outputs": (
        "iOS18",
        {"n_bits": 4, "granularity": "per_grouped_channel", "group_size": 8},
    ),
    "3 bits, a scale for each output": ("iOS26", {"n_bits": 3, "enable_per_channel_scale": True}),
    "4 bits for 2 weights": ("iOS18", {"n_bits": 4, "cluster_dim": 2}),
    "6 bits, a table of int8": ("iOS18", {"n_bits": 6, "lut_dtype": "int8"}),
}
HEAD = (
    "| network | setting | target | parameters palettized | identical | dense constants | of all weights palettized, % "
    "| bits a weight | package, MiB | dense package, MiB | times smaller | palettize, s | convert, s |"
)


class Network(NamedTuple):
    """A module and what it takes."""

    name: str
    model: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]


class Result(NamedTuple):
    """A package beside what was to be in it."""

    network: str
    setting: str
    line: str
    identical: bool
    dense: str  # what stayed dense and why


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    """Pixels, or the tokens of a few sentences and their mask."""
    if name != "MiniLM-L6":
        return (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
    _, tokenizer = minilm.load()
    ids, mask = tokenizer(SENTENCES)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int32))


def difference(network: Network) -> float:
    """The largest between MiniLM in torch and in JAX, in a coordinate of unit vectors."""
    ids, mask = (x.numpy() for x in network.inputs)
    params, _ = minilm.load()
    with torch.inference_mode():
        ours = network.model(*network.inputs).numpy()
    return float(abs(ours - np.asarray(jax.jit(minilm.encode)(params, ids, mask != 0))).max())


def mebibytes(path: Path) -> float:
    return package_bytes(path) / 2**20


def dense_package(network: Network, target: str) -> float:
    """MiB of the network as it is, in float16."""
    with tempfile.TemporaryDirectory() as folder:
        mlmodel = from_torch(network.model, network.inputs, {}, minimum_deployment_target=target)
        return mebibytes(save_package(mlmodel, Path(folder) / "dense.mlpackage"))


def result(network: Network, setting: str, dense: float) -> Result:
    """Palettize, convert, save, open, and compare."""
    target, options = SETTINGS[setting]
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PostTrainingPalettizerConfig.from_dict({"global_config": options})
        small = PostTrainingPalettizer(network.model, config).compress()
    palettized = time.perf_counter()
    mlmodel = from_torch(small, network.inputs, minimum_deployment_target=target)
    converted = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = save_package(mlmodel, Path(folder) / "small.mlpackage")
        found, size, leaves = audit(path, small), mebibytes(path), read_palettes(path).values()
    weights = sum(math.prod(leaf.shape) for leaf in leaves)
    cells = (
        *(network.name, setting, target, len(found.leaves), sum(leaf.identical for leaf in found.leaves.values())),
        *(len(found.dense), f"{100 * weights / sum(p.numel() for p in network.model.parameters()):.1f}"),
        f"{8 * sum(leaf.nbytes for leaf in leaves) / weights:.2f}",
        *(f"{size:.2f}", f"{dense:.2f}", f"{dense / size:.2f}"),
        *(f"{palettized - start:.1f}", f"{converted - palettized:.1f}"),
    )
    if not found.identical:
        print(found, file=sys.stderr)
    reasons = dict.fromkeys(str(warning.message) for warning in caught)
    vectors = [dense.shape for dense in found.dense.values() if max(dense.shape) == math.prod(dense.shape)]
    others = [
        f"{name} {dense.shape}" for name, dense in found.dense.items() if max(dense.shape) < math.prod(dense.shape)
    ]
    of_vectors = f"{len(vectors)} vectors (biases, norms) of {sum(map(math.prod, vectors)):,} values"
    notes = "; ".join([of_vectors, *others, *reasons])
    return Result(network.name, setting, f"| {' | '.join(map(str, cells))} |", found.identical, notes)


def results(names: list[str], foot: list[str]) -> Iterator[Result]:
    """All settings of some networks; adds to the foot of the table what was found of a network itself."""
    for name in names:
        network = Network(name, NETWORKS[name](), inputs_of(name))
        if name == "MiniLM-L6":
            largest = difference(network)
            assert largest <= TOLERANCE, f"MiniLM in torch and in JAX differ by {largest}"
            foot.append(f"MiniLM in torch and in JAX differ by {largest:.1e} at most, in unit vectors.")
        dense = {target: dense_package(network, target) for target in {target for target, _ in SETTINGS.values()}}
        for setting, (target, _) in SETTINGS.items():
            yield result(network, setting, dense[target])


def dense_lines(found: list[Result]) -> list[str]:
    """What stayed dense and why, settings with the same answer together."""
    settings: dict[tuple[str, str], list[str]] = {}
    for one in found:
        settings.setdefault((one.network, one.dense), []).append(one.setting)
    return [f"- {network}, with {' / '.join(own)}: {dense}." for (network, dense), own in settings.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, help="this one only; write nothing")
    chosen = parser.parse_args().network
    foot: list[str] = []
    found: list[Result] = []
    print(HEAD)
    for one in results([chosen] if chosen else [*NETWORKS], foot):
        found.append(one)
        print(one.line, flush=True)
    foot += [
        "Packages in float16, by torch.export; bits a weight are those of palettized parameters as the package has "
        "them. Dense constants are those of 10 elements or more. Seconds include what JAX compiles.",
        machine("jax", "torch", "coremltools", "numpy"),
    ]
    lines = [HEAD, "|---" * 13 + "|", *(one.line for one in found)]
    text = "\n".join([*lines, "", "What stayed dense:", "", *dense_lines(found), "", " ".join(foot)]) + "\n"
    print("\n" + text)
    if not chosen:
        HERE.with_suffix(".md").write_text(text)
    if not all(one.identical for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
