"""Core ML in and out: convert with our own tables and indices, read them back, compare them bit for bit."""

from palettax.coreml import _backend as _backend
from palettax.coreml.audit import Audit as Audit
from palettax.coreml.audit import LeafAudit as LeafAudit
from palettax.coreml.audit import audit as audit
from palettax.coreml.from_torch import from_torch as from_torch
from palettax.coreml.package import package_bytes as package_bytes
from palettax.coreml.package import save_package as save_package
from palettax.coreml.read import read_palettes as read_palettes
