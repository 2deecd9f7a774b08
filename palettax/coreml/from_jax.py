"""A JAX function to a Core ML model whose tables and indices are, bit for bit, ours; no torch."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import coremltools as ct
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, SequenceKey

from palettax._extras import require
from palettax._keys import warn_caller
from palettax._paths import leaf_name, leaf_names
from palettax._typing import Tree
from palettax.coreml.compare import same
from palettax.coreml.constants import BROADCAST_PASS, CLIP_PASS
from palettax.coreml.fold import FOLD_PASS
from palettax.coreml.forms import in_package, parse_target
from palettax.coreml.inject import flushed, free_name, mb, table_op
from palettax.coreml.moves import Move
from palettax.coreml.package import op_name
from palettax.coreml.read import Use, record_leaves
from palettax.coreml.scoped import quiet
from palettax.coreml.stablehlo import OLDEST, composite, float_leaf, named, program_of
from palettax.leaf import PalettizedArray, as_numpy, is_palettized
from palettax.leaf.plain import check_plain

_TO_HALF = "common::add_fp16_cast"
_OF_LOOPS = "common::loop_invariant_elimination"
"""It refuses a program whose loop takes two tables."""
_OF_CONCRETE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
)
"""What JAX raises where a value is needed, and there is only a shape."""
_FOREIGN = (jnp.bfloat16, np.float64)
"""Float types that Core ML does not compute in."""


def from_jax(
    function: Callable[..., Any],
    example_inputs: Any,
    params: Tree | None = None,
    *,
    minimum_deployment_target: ct.target | str = "iOS18",
    compute_precision: Any = None,
    **convert_options: Any,
) -> ct.models.MLModel:
    """Convert a function whose weights hold `PalettizedArray`s; each becomes a lookup table of the program.

    Args:
        function: of `example_inputs`, or of `params` and those: what `jax.jit` takes, such as `apply` of a Linen
            module, a lambda around it, or an NNX module, of which a copy in eval mode is converted. Weights may be in
            `params`, or be what the function holds or refers to.
        example_inputs: an array, or a tuple of arguments; trees of arrays, or of `jax.ShapeDtypeStruct`.
        params: the function's first argument, constants of the program. Floats that Core ML does not have, in it and in
            the inputs, become float32.
        minimum_deployment_target: a member of `coremltools.target` or its name, from iOS18. A scale without a mask is
            kept as it is from iOS26; at iOS18 it multiplies a float table into one per block, and a table of levels is
            repeated for each block.
        compute_precision: as in `coremltools.convert`; its default computes in float16 and rounds the tables to it.
        convert_options: the other options of `coremltools.convert`.

    Returns:
        The model. Its metadata say which op is which leaf, and how the program has it transposed, reshaped or reversed,
        for `read_palettes` and `audit`. Inputs have the names of the function's parameters (`input_0` for the first of
        *args), with the keys of a tree behind; outputs are `output`, of a tuple `output_0` and on, of a dict its keys.

    Raises:
        ValueError: a target before iOS18, params beside an NNX module, a palettized weight that a function which holds
            it uses in a loop, or an op that stablehlo-coreml does not convert.
        ImportError: stablehlo-coreml is not installed.

    Warns:
        UserWarning: a palettized weight that is no table of the package, and why.

    Example:
        >>> import palettax as px
        >>> from palettax.coreml import read_palettes
        >>> weight = jax.random.normal(jax.random.key(0), (64, 64))
        >>> small = px.palettize({"dense": weight}, px.kmeans(nbits=2))
        >>> mlmodel = from_jax(lambda params, x: jax.nn.relu(x @ params["dense"]), jnp.ones((1, 64)), small)
        >>> read_palettes(mlmodel)["dense"].bits_per_weight < 3
        True
    """
    require("stablehlo_coreml", "stablehlo")
    from stablehlo_coreml import build_pass_pipeline

    target = parse_target(minimum_deployment_target)
    if target < OLDEST:
        raise ValueError(
            f"minimum_deployment_target={target.name}: stablehlo-coreml converts for {OLDEST.name} or later"
        )
    function, params = _without_state(function, params)
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    if any(map(is_palettized, jax.tree.leaves(inputs, is_leaf=is_palettized))):
        raise ValueError("example_inputs holds palettized weights, which are no inputs; give their tree as params")
    found = _palettized(function, params)
    flat = _flat(function, params, inputs)
    tables = _Tables(found, target, flat, half=compute_precision is not ct.precision.FLOAT32)
    moves: dict[str, list[Move]] = {}
    pipeline: Any = build_pass_pipeline(convert_options.pop("pass_pipeline", None))
    pipeline.remove_passes([_OF_LOOPS])
    pipeline.insert_pass(0, FOLD_PASS)
    pipeline.insert_pass(0, BROADCAST_PASS)
    if compute_precision in (None, ct.precision.FLOAT16):
        pipeline.insert_pass(pipeline.passes.index(_TO_HALF), CLIP_PASS)
    pipeline.set_options(FOLD_PASS, {"moves": moves, "dense": tables.constants})
    options = {"skip_model_load": True, "compute_precision": compute_precision, **convert_options}
    with quiet():
        make = functools.partial(program_of, inputs=flat.arrays, target=target, **tables.makers)
        try:
            program = make(flat.calling(True))
        except _OF_CONCRETE:  # it computes in NumPy with some of its params
            program = make(flat.calling(False))
        _name_outputs(program, flat.outputs)
        mlmodel: Any = ct.convert(
            program,
            source="milinternal",
            minimum_deployment_target=target,
            pass_pipeline=pipeline,
            **options,
        )
    for name in found.keys() - tables.dense - {use.name for use in tables.uses}:
        warn_caller(f"{name}: no table of the package is this weight: the function makes no use of it as it is")
    record_leaves(mlmodel, tables.uses, moves)
    return mlmodel


def _without_state(function: Any, params: Tree) -> tuple[Any, Tree]:
    """An NNX module in eval mode as a function of its state, and that state; any other function as it is."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(function, nnx.Module):
        return function, params
    if params is not None:
        raise ValueError(
            f"{type(function).__name__} is an NNX module, which holds its weights: put these into it with nnx.merge, "
            "and leave params out"
        )
    module: Any = nnx.clone(function)
    module.eval()
    graph, state = nnx.split(module)

    def call(state: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, state)(*inputs)

    first = inspect.Parameter("state", inspect.Parameter.POSITIONAL_ONLY)
    call.__signature__ = inspect.Signature([first, *inspect.signature(function).parameters.values()])
    return call, state


class _Flat(NamedTuple):
    """A function of arrays that returns arrays.

    Attributes:
        calling: gives the function, whose parameters have the names of the inputs, given whether its dense weights are
            to have names: else they are constants of JAX, whose values it can see.
        arrays: an example of its arguments.
        inputs: the names of its arguments.
        outputs: the names of what it returns, once it is traced.
    """

    calling: Callable[[bool], Callable[..., list[Any]]]
    arrays: list[Any]
    inputs: list[str]
    outputs: list[str]


def _palettized(function: Any, params: Tree) -> dict[str, PalettizedArray]:
    """The palettized weights that a function is given, holds or refers to, by dotted name."""
    found: dict[str, PalettizedArray] = {}
    for tree in (params, *_held(function)):
        try:
            paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_palettized)[0]
        except (TypeError, ValueError):  # no tree: a dict whose keys cannot be sorted
            continue
        seen = set(map(id, found.values()))
        for name, (_, leaf) in zip(leaf_names([path for path, _ in paths], "."), paths, strict=True):
            if is_palettized(leaf) and id(leaf) not in seen:
                found[free_name(name or "weight", found)] = leaf
    return found


def _held(function: Any) -> Iterator[Any]:
    """What a function closes over, refers to, is bound to, or is."""
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values(), *_held(function.func))
        return
    plain = inspect.unwrap(getattr(function, "__func__", function))
    found = [function.__self__] if inspect.ismethod(function) else [] if inspect.isfunction(plain) else [function]
    if inspect.isfunction(plain):
        variables = inspect.getclosurevars(plain)
        found += [*variables.nonlocals.values(), *variables.globals.values()]
    for value in found:
        if inspect.ismodule(value):
            continue
        if hasattr(value, "__dict__") and jax.tree_util.all_leaves([value]):  # an object that is no tree
            yield from ({name: own} for name, own in vars(value).items())
        else:
            yield value


def _flat(function: Callable[..., Any], params: Tree, inputs: tuple[Any, ...]) -> _Flat:
    """A function of arrays alone, its first argument, if it is given params, a constant of it."""
    signature = list(inspect.signature(function).parameters.values())
    if params is not None and signature and signature[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del signature[0]
    own = [p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    paths, structure = jax.tree_util.tree_flatten_with_path(inputs)
    names: list[str] = []
    for (place, *rest), _ in paths:
        first = own[place.idx] if place.idx < len(own) else f"input_{place.idx}"
        names.append(free_name(_feature_name((GetAttrKey(first), *rest)), names))

    # Not within the function: there everything is an op of the program, float types that Core ML lacks included.
    leaves, params_structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_palettized)
    constants = zip(
        leaf_names([path for path, _ in leaves], "."), [_as_constant(leaf) for _, leaf in leaves], strict=True
    )
    constants, outputs = list(constants), list[str]()

    def weight(name: str, leaf: Any, with_names: bool) -> Any:
        if is_palettized(leaf):  # Here and not by the layers: some of them look at the parts of what is no array.
            return jnp.asarray(leaf)
        return named(name, leaf) if with_names and _is_weight(leaf) else leaf

    def calling(with_names: bool) -> Callable[..., list[Any]]:
        def call(*arrays: Any) -> list[Any]:
            given = jax.tree.unflatten(structure, arrays)
            if params is not None:
                weights = [weight(name, leaf, with_names) for name, leaf in constants]
                given = (jax.tree.unflatten(params_structure, weights), *given)
            paths, _ = jax.tree_util.tree_flatten_with_path(function(*given))
            outputs[:] = [_feature_name(path) for path, _ in paths]
            return [array for _, array in paths]

        positional = inspect.Parameter.POSITIONAL_ONLY
        call.__signature__ = inspect.Signature([inspect.Parameter(name, positional) for name in names])
        return call

    return _Flat(calling, [_in_core_ml(array) for _, array in paths], names, outputs)


def _as_constant(leaf: Any) -> Any:
    """A leaf of the params, if dense in a float type that Core ML has."""
    return leaf.astype(np.float32) if not is_palettized(leaf) and getattr(leaf, "dtype", None) in _FOREIGN else leaf


def _is_weight(leaf: Any) -> bool:
    """Whether a leaf is a dense array of floats, as ops name them."""
    floats = getattr(leaf, "dtype", None) in (np.float16, np.float32)
    return floats and not is_palettized(leaf) and leaf.ndim > 0


def _in_core_ml(example: Any) -> Any:
    """The shape of an input, in a float type that Core ML has."""
    dtype = jnp.result_type(example)
    return jax.ShapeDtypeStruct(np.shape(example), np.float32 if dtype in _FOREIGN else dtype)


def _feature_name(path: tuple[Any, ...]) -> str:
    """A name for an input or an output; what is in no dict is an output."""
    if not path or isinstance(path[0], SequenceKey):
        path = (GetAttrKey("output"), *path)
    return op_name(leaf_name(path, "_"))


def _name_outputs(program: Any, names: list[str]) -> None:
    """Give the outputs of a program their names, but for those that are inputs too."""
    function = program.functions[program.default_function_name]
    taken = {*function.inputs, *(var.name for op in function.operations for var in op.outputs)}
    for var, name in zip(function.outputs, names, strict=True):
        if var.op is not None and var.name in taken:
            taken.remove(var.name)
            var.name = free_name(name, taken)
            taken.add(var.name)


class _Tables:
    """Makes the ops of weights, one for all palettized ones that are equal, and remembers which are which.

    Attributes:
        uses: the tables that were made.
        dense: the names of the palettized weights that no table holds.
        constants: the names of the ops of dense weights.
    """

    def __init__(self, found: dict[str, PalettizedArray], target: ct.target, flat: _Flat, half: bool) -> None:
        self.target, self.flat, self.half = target, flat, half
        self.constants: list[str] = []
        self.uses: list[Use] = []
        self.dense: set[str] = set()
        self._names = {id(leaf): name for name, leaf in found.items()}
        self._known = {name: float_leaf(as_numpy(leaf)) for name, leaf in found.items()}
        self._made: list[tuple[PalettizedArray, Any]] = []

    @property
    def makers(self) -> dict[str, Callable[..., Any]]:
        """What `program_of` asks for."""
        return {"as_array": self.as_array, "table": self.make, "constant": self.constant}

    def constant(self, name: str, values: np.ndarray) -> Any:
        """The variable of a dense weight."""
        self.constants.append(self._free_op(name or "weight"))
        return mb.const(val=values, name=self.constants[-1])

    def _free_op(self, name: str) -> str:
        """A name that is no other weight's, and no input's or output's."""
        taken = {*self.constants, *self.flat.inputs, *self.flat.outputs, *(use.op for use in self.uses)}
        return free_name(op_name(name), taken)

    def as_array(self, leaf: PalettizedArray) -> Any:
        """What to compute with while the function is traced."""
        name = self._names.get(id(leaf), f"a weight {leaf.shape}")
        try:
            check_plain(name, leaf, blocked_scale=True)
        except ValueError as error:
            if name not in self.dense:
                warn_caller(f"{error}; it stays dense")
            self.dense.add(name)
            return leaf.depalettize()
        return composite(leaf)

    def make(self, leaf: PalettizedArray) -> Any:
        """The variable of a weight whose parts are known; its names are those of the leaves with the same parts."""
        for other, var in self._made:
            if same(leaf, other):
                return var
        names = [name for name, other in self._known.items() if same(leaf, other)]
        names = names or [free_name("weight", {*self._known, *(use.name for use in self.uses)})]
        small = in_package(leaf, self.target)
        op = self._free_op(names[0])
        self.uses += [Use(name, small, op) for name in names]
        var = table_op(flushed(small) if self.half else small, np.dtype(leaf.dtype), op)
        self._made.append((leaf, var))
        return var
