"""Images made larger or smaller."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from palettax.coreml.mil.values import Array, Function, static


def _grid(size: int, wanted: int, sampling_mode: str) -> np.ndarray:
    """Where on an axis of so many pixels the wanted ones lie."""
    steps = np.arange(wanted, dtype=np.float64)
    if sampling_mode == "ALIGN_CORNERS" and wanted == 1:
        return np.full(1, (size - 1) / 2)
    if sampling_mode.endswith("ALIGN_CORNERS") and sampling_mode != "UNALIGN_CORNERS":
        return steps * (size - 1) / max(wanted - 1, 1)
    if sampling_mode == "OFFSET_CORNERS":
        spacing = max(1, size - 1) / wanted
        return np.clip((steps + 0.5) * spacing, 0, size - 1)
    offset = 0.5 if sampling_mode == "UNALIGN_CORNERS" else 0.0
    return np.clip((steps + offset) * size / wanted - offset, 0, size - 1)


def _linear(x: Array, axis: int, places: np.ndarray) -> Array:
    low = np.floor(places).astype(np.int32)
    high = np.minimum(low + 1, np.shape(x)[axis] - 1)
    share = (places - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(np.ndim(x))])
    return jnp.take(x, low, axis=axis) * (1 - share) + jnp.take(x, high, axis=axis) * share


def resize(
    x: Array, shape: Array, resized_dims: Any, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Array:
    """The last axes to other sizes, where 0 leaves an axis as it is."""
    count = static(resized_dims)
    for axis, wanted in zip(range(np.ndim(x) - count, np.ndim(x)), static(shape)[-count:], strict=True):
        size = np.shape(x)[axis]
        places = _grid(size, wanted or size, sampling_mode)
        if interpolation_mode == "LINEAR":
            x = _linear(x, axis, places)
        else:
            # Without aligned corners the pixel that a place lies in, else the nearest one.
            rounded = np.floor(places + (0.0 if sampling_mode == "DEFAULT" else 0.5))
            x = jnp.take(x, rounded.astype(np.int32), axis=axis)
    return x


def resize_bilinear(
    x: Array, target_size_height: Any = 1, target_size_width: Any = 1, sampling_mode: str = "DEFAULT"
) -> Array:
    """Rows and columns to so many, by linear interpolation."""
    return resize(x, (target_size_height, target_size_width), 2, "LINEAR", sampling_mode)


def resize_nearest_neighbor(x: Array, target_size_height: Any, target_size_width: Any) -> Array:
    """Rows and columns to so many, each a copy."""
    return resize(x, (target_size_height, target_size_width), 2, "NEAREST_NEIGHBOR")


def upsample_bilinear(
    x: Array,
    scale_factor_height: Any = 1,
    scale_factor_width: Any = 1,
    align_corners: Any = True,
    half_pixel_centers: Any = None,
) -> Array:
    """Rows and columns so many times, by linear interpolation."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    return resize_bilinear(x, height, width, mode)


def upsample_nearest_neighbor(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    """Rows and columns so many times, each a copy."""
    return resize_nearest_neighbor(x, *_scaled(x, scale_factor_height, scale_factor_width))


def _scaled(x: Array, *factors: Any) -> tuple[int, ...]:
    return tuple(math.floor(static(f) * size) for f, size in zip(factors, np.shape(x)[-2:], strict=True))


def resample(
    x: Array,
    coordinates: Array,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Any,
    coordinates_mode: str,
    align_corners: Any,
) -> Array:
    """Each image at places of its own, given as column and row."""
    sizes = np.asarray(np.shape(x)[-2:], np.float32)
    places = jnp.asarray(coordinates).astype(jnp.float32)[..., ::-1]
    if coordinates_mode != "unnormalized":
        places = (places + 1) / 2 if coordinates_mode == "normalized_minus_one_to_one" else places
        places = places * (sizes - 1) if align_corners else places * sizes - 0.5
    mirrored = "mirror" if align_corners else "reflect"
    modes = {"constant": "constant", "border": "nearest", "reflection": mirrored, "symmetric": "reflect"}

    def of_image(image: Array, places: Array) -> Array:
        return map_coordinates(
            image,
            list(jnp.moveaxis(places, -1, 0)),
            order=sampling_mode == "bilinear",
            mode=modes[padding_mode],
            cval=static(padding_value),
        )

    of_channels = jax.vmap(of_image, in_axes=(0, None))
    return jax.vmap(of_channels)(jnp.asarray(x), places)


OPS: dict[str, Function] = {
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
