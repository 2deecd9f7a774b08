"""The first import of `palettax.torch`: without torch, it says which extra to install."""

from __future__ import annotations

from palettax._extras import require

require("torch", "torch")
