"""The rounding of a module's output to 8 bits: observed in training, fixed afterwards, kept by Core ML's converter."""

from __future__ import annotations

from typing import Any

import torch
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.ao.quantization.fx import _decomposed as _decomposed  # registers the ops that torch.export keeps

_ATTRIBUTE = "activation_quantizer"
_RANGES = {torch.qint8: (-128, 127, torch.int8), torch.quint8: (0, 255, torch.uint8)}


def quantize_output(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Train a module with its output rounded to 8 bits, in a range that follows the smallest and the largest values.

    Args:
        module: changed in place; its output, or the first of a tuple, is a float tensor. A second call changes nothing.
        dtype: torch.qint8 or torch.quint8.
    """
    if not hasattr(module, _ATTRIBUTE):
        module.add_module(_ATTRIBUTE, _Observed(dtype).train(module.training))
        module.register_forward_hook(_round_output)


def fix_output_ranges(model: torch.nn.Module) -> None:
    """Replace what observes by the range that it has seen; ops that coremltools converts from iOS17 on.

    Args:
        model: changed in place. A module that saw no output in training is no longer rounded.
    """
    for module in list(model.modules()):
        observed = getattr(module, _ATTRIBUTE, None)
        if isinstance(observed, _Observed):
            setattr(module, _ATTRIBUTE, observed.fixed() if observed.has_range else torch.nn.Identity())


def rounds_output(module: torch.nn.Module) -> bool:
    """Whether a module has an output that is rounded to 8 bits."""
    return isinstance(getattr(module, _ATTRIBUTE, None), _Observed | _Fixed)


class _Observed(torch.nn.Module):
    """Rounds to 8 bits, straight-through, in the moving range of its inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        low, high, _ = _RANGES[dtype]
        self.dtype = dtype
        self.fake = FakeQuantize(
            observer=MovingAverageMinMaxObserver,
            quant_min=low,
            quant_max=high,
            dtype=dtype,
            qscheme=torch.per_tensor_affine,
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.fake.enable_observer()
        elif self.has_range:
            self.fake.disable_observer()
        else:
            return values
        return self.fake(values.float()).to(values.dtype)

    @property
    def has_range(self) -> bool:
        """Whether a batch has been seen."""
        return bool(torch.isfinite(self.fake.activation_post_process.min_val).all())

    def fixed(self) -> _Fixed:
        """The same rounding, in the range of now."""
        scale, zero_point = self.fake.calculate_qparams()
        return _Fixed(float(scale), int(zero_point), self.dtype)


class _Fixed(torch.nn.Module):
    """Rounds to 8 bits in a fixed range."""

    def __init__(self, scale: float, zero_point: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.zero_point, self.dtype = scale, zero_point, dtype

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        # The converter of exported programs knows one pair of ops, that of traced ones another.
        wide, (low, high, levels_dtype) = values.float(), _RANGES[self.dtype]
        if torch.compiler.is_exporting():
            how = self.scale, self.zero_point, low, high, levels_dtype
            levels = torch.ops.quantized_decomposed.quantize_per_tensor(wide, *how)
            rounded = torch.ops.quantized_decomposed.dequantize_per_tensor(levels, *how)
        elif torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            rounded = torch.quantize_per_tensor(wide, self.scale, self.zero_point, self.dtype).dequantize()
        else:
            rounded = torch.fake_quantize_per_tensor_affine(wide, self.scale, self.zero_point, low, high)
        return rounded.to(values.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}, zero_point={self.zero_point}, dtype={self.dtype}"


def _round_output(module: Any, args: Any, output: Any) -> Any:
    """The hook of a module whose output is rounded: of attention and recurrent layers, their first output."""
    if isinstance(output, tuple):
        return (_round_output(module, args, output[0]), *output[1:])
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        raise ValueError(
            f"{type(module).__name__} gave a {type(output).__name__}; quantize_activations needs a module whose output "
            "is one float tensor"
        )
    return getattr(module, _ATTRIBUTE)(output)
