"""Bit packing in Core ML's order: row-major, least significant bit first, across byte boundaries."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8


def packed_size(size: int, nbits: int) -> int:
    """The bytes that `size` indices of `nbits` bits take: ⌈size·nbits/8⌉."""
    return -(-size * nbits // 8)


def pack(indices: UInt8[np.ndarray, ...], nbits: int) -> UInt8[np.ndarray, " bytes"]:
    """Write indices as a stream of `nbits` bits each.

    Element i fills bits [i·nbits, (i+1)·nbits) of the little-endian bit stream.

    Args:
        indices: any shape, uint8, every entry below 2^nbits; read in row-major order.
        nbits: bits per index, 1 to 8.

    Returns:
        The stream, ⌈size·nbits/8⌉ bytes; unused high bits of the last byte are zero.

    Raises:
        ValueError: an index needs more than `nbits` bits.

    Example:
        >>> import numpy as np
        >>> from palettax.leaf import pack
        >>> pack(np.array([0, 1, 2, 3, 4, 5, 6, 7], np.uint8), 3).tolist()
        [136, 198, 250]
    """
    flat = indices.reshape(-1)
    if flat.size and int(flat.max()) >> nbits:
        raise ValueError(f"index {int(flat.max())} does not fit in nbits={nbits}; use more bits")
    bits = (flat[:, None] >> np.arange(nbits, dtype=np.uint8)) & np.uint8(1)
    return np.packbits(bits, bitorder="little")


def unpack(packed: UInt8[np.ndarray, " bytes"], nbits: int, shape: tuple[int, ...]) -> UInt8[np.ndarray, ...]:
    """Read what `pack` wrote: `unpack(pack(x, b), b, x.shape) == x`.

    Args:
        packed: a stream of at least ⌈size·nbits/8⌉ bytes.
        nbits: bits per index, 1 to 8.
        shape: the shape of the indices.

    Returns:
        The indices, uint8, of that shape.

    Raises:
        ValueError: the stream is too short for the shape.

    Example:
        >>> import numpy as np
        >>> from palettax.leaf import unpack
        >>> unpack(np.array([136, 198, 250], np.uint8), 3, (2, 4)).tolist()
        [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    size = int(np.prod(shape))
    if packed.size < packed_size(size, nbits):
        raise ValueError(
            f"{packed.size} bytes hold fewer than the {size} indices of {nbits} bits that shape {shape} needs"
        )
    bits = np.unpackbits(packed, count=size * nbits, bitorder="little").reshape(size, nbits)
    weights = np.left_shift(np.uint8(1), np.arange(nbits, dtype=np.uint8))
    return (bits @ weights).astype(np.uint8).reshape(shape)
