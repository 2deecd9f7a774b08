"""The mean of something over a stream of batches, which can be interrupted and taken up again."""

from __future__ import annotations

import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from operator import add, itemgetter, length_hint
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float

from palettax._files import replacing
from palettax._paths import leaf_names
from palettax._progress import progress_bar
from palettax._typing import Array, Tree


class Step(NamedTuple):
    """What became of a batch.

    Attributes:
        mean: over all examples so far, those of the batch included; arrays of JAX or torch.
        losses: of its examples.
        sound: whether what is averaged is finite for each of them.
        finite: whether their sum is.
    """

    mean: list[Any]
    losses: Float[np.ndarray, " n"]
    sound: Bool[np.ndarray, " n"]
    finite: bool


class Stream(NamedTuple):
    """How to go through batches.

    Attributes:
        num_samples: examples at most; None for all.
        checkpoint: the file that keeps the mean so far; None for none.
        save_every: seconds between two times that it is written.
        progress: whether a bar is shown.
    """

    num_samples: int | None = None
    checkpoint: str | os.PathLike[str] | None = None
    save_every: float = 60.0
    progress: bool = True

    def mean(
        self,
        step: Callable[[list[Any], Tree, int], Step],
        start: list[Any],
        batches: Iterable[Tree],
        of: int,
        *,
        to_host: Callable[[Any], np.ndarray] = np.asarray,
        onto: Callable[[Any, np.ndarray], Any] = add,
    ) -> list[Any]:
        """Take all steps.

        Args:
            step: of the mean so far, a batch, and how many examples the mean is over.
            start: zeros.
            batches: pytrees of arrays whose first axis is examples; mappings that JAX does not know come as dicts.
            of: a number that is another for other weights. A checkpoint of those is refused, as is one that another
                example began.
            to_host: an array of the mean, for NumPy.
            onto: a zero of the start, with that array in its place and on its device.

        Raises:
            ValueError: no examples, a batch that is none, a loss that is not finite, a checkpoint that does not fit.
        """
        if isinstance(batches, Mapping) or hasattr(batches, "shape") or _is_one(batches):
            raise ValueError(f"batches are one {type(batches).__name__}; give an iterable of them, such as [batch]")
        check_count("num_samples", self.num_samples)
        self._check_place()
        length, stream = length_hint(batches), map(_in_dicts, batches)
        first_one = list(islice(stream, 1))
        if not first_one:
            raise ValueError("batches hold no examples; a generator gives its batches only once: make a new one")
        of = zlib.crc32(repr(_first_example(first_one[0])).encode(), of)
        mean, count = self._resumed(start, of, onto)
        saved, last, total = count, time.monotonic(), self.num_samples
        try:
            with progress_bar("sensitivities", "examples", shown=self.progress) as advance:
                for number, first, batch in self._rows(chain(first_one, stream), count):
                    size = _size(batch, number)
                    if total is None and length:
                        total = (first + size) * length
                    new = step(mean, batch, count)
                    _check(new, number, first)
                    mean, count = new.mean, count + size
                    advance(count, total)
                    if time.monotonic() - last >= self.save_every:
                        self._save(mean, count, of, to_host)
                        saved, last = count, time.monotonic()
                advance(count, count)
        except BaseException:
            if count > saved:
                self._save(mean, count, of, to_host)
            raise
        if count > saved:
            try:
                self._save(mean, count, of, to_host)
            except OSError as error:  # what was asked for is there
                warnings.warn(f"the checkpoint {self.checkpoint} could not be written: {error}", stacklevel=3)
        return mean

    def _rows(self, batches: Iterable[Tree], counted: int) -> Iterator[tuple[int, int, Tree]]:
        """The number of every batch, the first row of it that is not counted yet, and from there on what is wanted."""
        seen = 0
        for number, batch in enumerate(batches):
            size = _size(batch, number)
            first = max(counted - seen, 0)
            stop = size if self.num_samples is None else min(size, self.num_samples - seen)
            if first < stop:
                rows = slice(first, stop)
                yield number, first, batch if stop - first == size else jax.tree.map(itemgetter(rows), batch)
            seen += size
            if self.num_samples is not None and seen >= self.num_samples:
                seen = self.num_samples
                break
        if self.num_samples is not None and self.num_samples < counted:
            raise ValueError(
                f"the checkpoint counts {counted} examples already, and num_samples={self.num_samples}; give another "
                "checkpoint"
            )
        if seen < counted:
            raise ValueError(
                f"the checkpoint counts {counted} examples, but these are only {seen}; give the same ones again, from "
                "the first one on (a generator gives its batches only once), or delete it to start anew"
            )

    def _check_place(self) -> None:
        """Refuse, before the work, a checkpoint that cannot be written."""
        place = Path(self.checkpoint or ".")
        if self.checkpoint is not None and place.is_dir():
            raise ValueError(f"the checkpoint '{place}' is a folder; name a file")
        if not place.parent.is_dir():
            raise FileNotFoundError(f"no folder for the checkpoint '{place}'; make it first")

    def _save(self, mean: list[Any], count: int, of: int, to_host: Callable[[Any], np.ndarray]) -> None:
        if self.checkpoint is None:
            return
        # safetensors takes the memory as it lies, whatever its strides are.
        tensors = {str(i): np.asarray(to_host(array), order="C") for i, array in enumerate(mean)}
        with replacing(self.checkpoint) as fresh:
            safetensors.numpy.save_file(tensors, fresh, metadata={"count": str(count), "of": str(of)})

    def _resumed(self, start: list[Any], of: int, onto: Callable[[Any, np.ndarray], Any]) -> tuple[list[Any], int]:
        """The mean in the checkpoint and its count; the start where there is no checkpoint."""
        if self.checkpoint is None:
            return start, 0
        name = os.fspath(self.checkpoint)
        if not Path(name).exists():
            return start, 0
        try:
            with safetensors.safe_open(name, framework="numpy") as file:
                header = file.metadata() or {}
                if header.get("of", str(of)) != str(of):
                    raise ValueError(
                        f"{name!r} was begun with other weights, examples or another key; delete it to start anew "
                        "(examples that are shuffled anew each time cannot be gone on with)"
                    )
                arrays = [file.get_tensor(str(i)) for i in range(len(start))]
                count = int(header["count"])
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(
                f"{name!r} is no checkpoint of sensitivities ({error}); delete it to start anew"
            ) from error
        # Added to zeros, it lies on devices as they do.
        return list(map(onto, start, arrays)), count


def mean_with(mean: Sequence[Any], total: Sequence[Any], count: Any, more: Any) -> list[Any]:
    """The mean over `count` examples, and the sum of `more` others, as the mean over all of them."""
    return [m + (t - more * m) / (count + more) for m, t in zip(mean, total, strict=True)]


def fingerprint(arrays: Sequence[Array], *more: str) -> int:
    """A number that is another for other arrays or words."""
    number = zlib.crc32(repr((more, [(array.shape, str(array.dtype)) for array in arrays])).encode())
    for array in arrays:
        number = zlib.crc32(np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).data, number)
    return number


def check_count(name: str, value: Any) -> None:
    """Refuse what is neither a positive integer nor None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
        raise ValueError(f"{name}={value!r}; it must be a positive integer, or None")


def _in_dicts(batch: Tree) -> Tree:
    """The batch with dicts for the mappings whose leaves JAX does not see, such as those of tokenizers."""

    def seen(leaf: Any) -> Any:
        return {key: _in_dicts(value) for key, value in leaf.items()} if isinstance(leaf, Mapping) else leaf

    return jax.tree.map(seen, batch)


def _size(batch: Tree, number: int) -> int:
    """How many examples a batch has."""
    paths, _ = jax.tree_util.tree_flatten_with_path(batch)
    names = leaf_names([path for path, _ in paths])
    found = {
        name or "it": leaf.shape[0] if getattr(leaf, "shape", ()) else f"a {type(leaf).__name__}"
        for name, (_, leaf) in zip(names, paths, strict=True)
    }
    lengths = set(found.values())
    if len(lengths) != 1 or not all(isinstance(length, int) and length > 0 for length in lengths):
        raise ValueError(
            f"batch {number} has examples: {found or 'none'}; each of its leaves must be an array whose first axis is "
            "examples, as many in all of them"
        )
    return int(lengths.pop())


def _is_one(batches: Any) -> bool:
    """Whether they are the arrays of a single batch, such as inputs and labels: as many of each, not of one kind."""
    if not isinstance(batches, tuple | list) or len(batches) < 2 or not all(getattr(b, "ndim", 0) for b in batches):
        return False
    kinds = {(b.ndim, tuple(b.shape[1:]), str(b.dtype)) for b in batches}
    if isinstance(batches, list):  # of batches that may differ in the lengths of what they hold, as sentences do
        kinds = {(n, shape[n > 2 or "int" in dtype :], dtype) for n, shape, dtype in kinds}
    return len({b.shape[0] for b in batches}) == 1 and len(kinds) > 1


def _first_example(batch: Tree) -> list[Any]:
    """Its numbers, whether arrays are NumPy's, JAX's or torch's."""
    arrays = [leaf for leaf in jax.tree.leaves(batch) if hasattr(leaf, "tolist") and getattr(leaf, "ndim", 0)]
    # What is spread over a mesh cannot always be cut there.
    return [(np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf)[:1].tolist() for leaf in arrays]


def _check(new: Step, number: int, first: int) -> None:
    """Refuse what is not finite."""
    for what, good in (("loss", np.isfinite(new.losses)), ("gradient, or its square,", new.sound)):
        if not good.all():
            at = int(good.argmin())
            found = f"{new.losses[at]}" if what == "loss" else f"NaN or infinite (the loss is {new.losses[at]:.6g})"
            raise ValueError(
                f"batch {number}, example {first + at}: its {what} is {found}; {int((~good).sum())} of "
                f"{good.size} are such in this batch: leave them out, or mend the loss"
            )
    if not new.finite:
        raise ValueError(
            f"batch {number}: each of its squared gradients is finite, but not their sum; scale the loss down"
        )
