"""palettax: neural-network weights as small lookup tables, `w ≈ lut[indices]`.

`palettize(params, transform)` is the front door for trees of JAX and NumPy arrays; `palettax.torch` has the palettizers
of torch models, and `palettax.coreml` reads, writes and checks Core ML models.
"""

from importlib import import_module as _import_module
from typing import Any as _Any

from palettax.activations import fake_quantize_activations as fake_quantize_activations
from palettax.checkpoint import load as load
from palettax.checkpoint import save as save
from palettax.clustering import Implicit as Implicit
from palettax.clustering import LutFit as LutFit
from palettax.clustering import OneStep as OneStep
from palettax.clustering import SoftFit as SoftFit
from palettax.clustering import Unrolled as Unrolled
from palettax.clustering import assign as assign
from palettax.clustering import certify as certify
from palettax.clustering import kmeans_curve as kmeans_curve
from palettax.clustering import kmeans_lut as kmeans_lut
from palettax.clustering import lookup as lookup
from palettax.clustering import soft_kmeans_lut as soft_kmeans_lut
from palettax.clustering import uniform_lut as uniform_lut
from palettax.clustering import unique_lut as unique_lut
from palettax.leaf import Granularity as Granularity
from palettax.leaf import PalettizedArray as PalettizedArray
from palettax.leaf import depalettize as depalettize
from palettax.palettize import palettize as palettize
from palettax.report import LeafReport as LeafReport
from palettax.report import Report as Report
from palettax.report import report as report
from palettax.sensitivity import fisher_diagonal as fisher_diagonal
from palettax.sensitivity import second_moment as second_moment
from palettax.transforms import DkmState as DkmState
from palettax.transforms import PaletteTransformation as PaletteTransformation
from palettax.transforms import by_path as by_path
from palettax.transforms import chain as chain
from palettax.transforms import custom as custom
from palettax.transforms import dkm as dkm
from palettax.transforms import identity as identity
from palettax.transforms import keep_zeros as keep_zeros
from palettax.transforms import kmeans as kmeans
from palettax.transforms import masked as masked
from palettax.transforms import partition as partition
from palettax.transforms import quantize_lut as quantize_lut
from palettax.transforms import straight_through as straight_through
from palettax.transforms import uniform as uniform
from palettax.transforms import unique as unique
from palettax.transforms import with_channel_scale as with_channel_scale

__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    """The heavy parts, which `import palettax` leaves out, at first use."""
    if name in ("coreml", "plot", "torch"):
        return _import_module(f"palettax.{name}")
    raise AttributeError(f"module 'palettax' has no attribute {name!r}")
