"""Run a NumPy function from inside a compiled JAX computation.

On the CPU this is an XLA custom call whose handler hands the function views of XLA's own buffers. `jax.pure_callback`
would first copy the arguments with JAX itself, on the thread pool that the callback is blocking: with as many callbacks
in flight as there are cores, none of them ever returns.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palettax._typing import Array, is_traced

HostFunction = Callable[..., None]
"""A module-level NumPy function `(*inputs, *outputs)` that fills its outputs; leading axes are batch axes."""


def host_call(function: HostFunction, results: Sequence[jax.ShapeDtypeStruct], *args: Array) -> list[Any]:
    """Call a NumPy function on concrete arrays, or stage the call into the computation being traced.

    Args:
        function: called as `function(*args, *outputs)`.
        results: shape and dtype of each output, without its batch axes.
        args: inputs of one core axis, the last; the axes before it are batch axes and equal for all of them.

    Returns:
        The outputs, batch axes first: NumPy arrays when every input was concrete, tracers otherwise. They are constants
        to differentiation.
    """
    if not any(is_traced(a) for a in args):
        return _call(function, results, *args)
    args = tuple(jax.lax.stop_gradient(a if a.dtype in _READABLE else a.astype(jnp.float32)) for a in args)
    batched = [jax.ShapeDtypeStruct(args[0].shape[:-1] + r.shape, r.dtype) for r in results]
    custom_call = jax.ffi.ffi_call(_register(function), batched, vmap_method="broadcast_all")
    # Buffers on an accelerator are out of a CPU handler's reach; there the copy is made on threads of its own.
    fallback = partial(jax.pure_callback, partial(_call, function, results), batched, vmap_method="broadcast_all")
    return jax.lax.platform_dependent(*args, cpu=custom_call, default=fallback)


def in_threads(function: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    """What a function that holds no GIL makes of every task, on all cores."""
    threads = min(len(tasks), os.cpu_count() or 1)
    if threads == 1:
        return list(map(function, tasks))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, tasks))


def _call(function: HostFunction, results: Sequence[jax.ShapeDtypeStruct], *args: Array) -> list[np.ndarray]:
    inputs = [np.asarray(a) for a in args]
    outputs = [np.empty(inputs[0].shape[:-1] + r.shape, r.dtype) for r in results]
    function(*inputs, *outputs)
    return outputs


# XLA's C interface for custom calls (xla/ffi/api/c_api.h), which promises binary compatibility within version 0.
_API_VERSION = (0, 1)
_METADATA_EXTENSION = 1
_INTERNAL_ERROR = 13
_DTYPES = {1: np.bool_, 4: np.int32, 6: np.uint8, 10: np.float16, 11: np.float32, 12: np.float64, 16: jnp.bfloat16}
_READABLE = frozenset(map(np.dtype, _DTYPES.values()))


def _struct(**fields: Any) -> type[ctypes.Structure]:
    header = [("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]
    return type("Struct", (ctypes.Structure,), {"_fields_": [*header, *fields.items()]})


_Pointers = ctypes.POINTER(ctypes.c_void_p)
_Buffer = _struct(dtype=ctypes.c_int, data=ctypes.c_void_p, rank=ctypes.c_int64, dims=ctypes.POINTER(ctypes.c_int64))
_Buffers = _struct(size=ctypes.c_int64, types=ctypes.c_void_p, items=ctypes.POINTER(ctypes.POINTER(_Buffer)))
_Frame = _struct(api=_Pointers, context=ctypes.c_void_p, stage=ctypes.c_int, args=_Buffers, rets=_Buffers)
_Version = _struct(major=ctypes.c_int, minor=ctypes.c_int)
_Error = _struct(message=ctypes.c_char_p, code=ctypes.c_int)


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", _Version)]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    ]


# XLA_FFI_Api in words: size, extension, a version of three words, internal_api, then the function pointers.
_ERROR_CREATE_WORD = 6
_HANDLERS: list[Any] = []  # keeps the handlers alive: XLA holds bare pointers to them


_REGISTERING = threading.Lock()


def _register(function: HostFunction) -> str:
    """Register the handler of a function with XLA, once, and return its target name."""
    with _REGISTERING:  # a cache alone lets two threads in at the first call
        return _registered(function)


@cache
def _registered(function: HostFunction) -> str:

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))
    def handler(frame: Any) -> int | None:
        frame = frame.contents
        if frame.extension:
            extension = ctypes.cast(frame.extension, ctypes.POINTER(_Extension)).contents
            if extension.type == _METADATA_EXTENSION:
                extension.metadata.contents.version.major, extension.metadata.contents.version.minor = _API_VERSION
                return None
        try:
            function(*_views(frame.args), *_views(frame.rets))
        except BaseException as error:  # an exception cannot cross into XLA; it becomes a JAX runtime error
            return _error(frame.api, f"{type(error).__name__}: {error}")
        return None

    name = f"{function.__module__}.{function.__qualname__}"
    _HANDLERS.append(handler)
    jax.ffi.register_ffi_target(
        name, jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p).value), platform="cpu", api_version=1
    )
    return name


def _views(buffers: Any) -> list[np.ndarray]:
    return [_view(buffers.items[i].contents) for i in range(buffers.size)]


def _view(buffer: Any) -> np.ndarray:
    shape = tuple(buffer.dims[: buffer.rank])
    dtype = np.dtype(_DTYPES[buffer.dtype])
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * size).from_address(buffer.data)
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)


def _error(api: Any, message: str) -> int:
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Error))(api[_ERROR_CREATE_WORD])
    return create(_Error(ctypes.sizeof(_Error), None, message.encode(), _INTERNAL_ERROR))
