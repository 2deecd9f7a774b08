"""Core ML in and out: convert with our own tables and indices, read them back, compare them bit for bit."""

from importlib.util import find_spec

from palettax.coreml import _backend as _backend
from palettax.coreml.audit import Audit as Audit
from palettax.coreml.audit import LeafAudit as LeafAudit
from palettax.coreml.audit import audit as audit
from palettax.coreml.config import OpPalettizerConfig as OpPalettizerConfig
from palettax.coreml.config import OptimizationConfig as OptimizationConfig
from palettax.coreml.decompress import decompress_weights as decompress_weights
from palettax.coreml.evaluate import as_function as as_function
from palettax.coreml.evaluate import run as run
from palettax.coreml.from_jax import from_jax as from_jax
from palettax.coreml.metadata import get_weights_metadata as get_weights_metadata
from palettax.coreml.package import package_bytes as package_bytes
from palettax.coreml.package import save_package as save_package
from palettax.coreml.palettize_weights import Compressed as Compressed
from palettax.coreml.palettize_weights import compress_weights as compress_weights
from palettax.coreml.palettize_weights import palettize_weights as palettize_weights
from palettax.coreml.read import read_palettes as read_palettes

if find_spec("torch") is not None:
    from palettax.coreml.from_torch import from_torch as from_torch
else:
    from palettax.coreml._backend import from_torch as from_torch
