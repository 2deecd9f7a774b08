"""Tensors to arrays and back, the narrow float types included."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

from palettax._typing import Array

# NumPy has no type of its own for these: their bits cross as integers.
_AS_BITS = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def to_numpy(name: str, tensor: Any) -> np.ndarray:
    """View a tensor as a NumPy array; only a tensor on another device is copied.

    Args:
        name: the leaf, for messages.
        tensor: a dense tensor of any shape and dtype.

    Returns:
        The array, of the same shape and dtype, sharing memory with a tensor on the CPU.

    Raises:
        ValueError: it is not a dense tensor.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{name}: found {type(tensor).__name__}, not a dense tensor; convert it or leave it out")
    tensor = tensor.detach().cpu()
    if tensor.dtype in _AS_BITS:
        bits, dtype = _AS_BITS[tensor.dtype]
        return tensor.view(bits).numpy().view(dtype)
    return tensor.resolve_conj().resolve_neg().numpy()


def to_tensor(name: str, array: Any) -> torch.Tensor:
    """Copy an array, of NumPy or JAX, into a tensor on the CPU.

    Args:
        name: the leaf, for messages.
        array: any shape; a dtype that torch has.

    Returns:
        A tensor of the same shape and dtype that shares no memory with the array.

    Raises:
        ValueError: torch has no such dtype.
    """
    copy = np.array(array.detach().cpu() if isinstance(array, torch.Tensor) else array, order="C")
    for dtype, (bits, narrow) in _AS_BITS.items():
        if copy.dtype == narrow:
            return torch.from_numpy(copy.view(np.int16 if bits == torch.int16 else np.uint8)).view(dtype)
    try:
        return torch.from_numpy(copy)
    except TypeError as error:
        raise ValueError(f"{name}: torch has no dtype {copy.dtype}; cast the leaf first") from error


def checksum(tensor: torch.Tensor) -> int:
    """A number that changes when the values of a tensor do, but for one time in billions.

    Args:
        tensor: dense, on any device; it stays there.
    """
    tensor = tensor.detach().contiguous().reshape(-1)
    if tensor.device.type == "cpu":
        return zlib.crc32(tensor.view(torch.uint8).numpy().data)
    return bit_sum(tensor)


def bit_sum(tensor: torch.Tensor) -> int:
    """A checksum by sums of integers, which every device has, in slices that take little memory.

    Args:
        tensor: dense, of any shape.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = torch.zeros((), dtype=torch.int64, device=real.device)
    for part in real.reshape(-1).contiguous().view(widths[real.element_size()]).split(2**22):
        bits = part.to(torch.int64)
        places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        # Mixed: bits themselves would add up to the same when as many signs turn one way as the other.
        total = 31 * total + (((bits ^ (bits >> 15)) * 0x2C1B3C6D ^ bits) * places).sum()
    return int(total)


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The NumPy dtype of a torch dtype.

    Args:
        dtype: any torch dtype that NumPy or ml_dtypes has.

    Returns:
        The dtype.

    Example:
        >>> numpy_dtype(torch.bfloat16).name
        'bfloat16'
    """
    return to_numpy("", torch.empty((), dtype=dtype)).dtype


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A tensor as a JAX array, sharing memory where both are on one device.

    Args:
        tensor: dense, on any device.

    Returns:
        The array, on the tensor's device if JAX has it, else on JAX's own.

    Example:
        >>> to_jax(torch.arange(3.0)).tolist()
        [0.0, 1.0, 2.0]
    """
    on_both = tensor.device.type == "cpu" or (tensor.device.type == "cuda" and jax.default_backend() == "gpu")
    tensor = tensor.detach().contiguous()
    return jax.dlpack.from_dlpack(tensor if on_both else tensor.cpu())


def to_torch(array: Array, device: torch.device) -> torch.Tensor:
    """A JAX array as a tensor, sharing memory where both are on one device.

    Args:
        array: of JAX, a finished or a running computation.
        device: where the tensor is to be.

    Returns:
        The tensor. Writing into it in place writes into the array.

    Example:
        >>> to_torch(jax.numpy.arange(3.0), torch.device("cpu")).tolist()
        [0.0, 1.0, 2.0]
    """
    return torch.from_dlpack(jax.block_until_ready(array)).to(device)
