"""Functions whose lowering is chosen when a program is compiled, not when it is traced.

While a function is traced, JAX cannot tell for which platform and how many devices it will be
compiled, or whether the program is to be exported. When it lowers the program it can. So a function
is a JAX primitive here, and the rule that lowers the primitive chooses how it is computed. The
functions are linear in each operand, which makes all derivatives follow from it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Jaxpr, JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chansel_jax.ops.limits import Options
from chansel_jax.ops.lowerings import ANYWHERE, NATIVE, Place, by_definition
from chansel_jax.ops.window import Window

Flags = tuple[bool, ...]


class Function(NamedTuple):
    """A function of images and kernels that is linear in each operand.

    Attributes:
        compute: takes this, the name of a lowering and the operands, and returns the output. What
            it does by the lowering that `choose` returns for `ANYWHERE` can be differentiated in
            any way.
        choose: takes this, a place and the operands, of which only shapes and dtypes count, and
            returns the name of the lowering there.
        window: of the kernels.
        lowering: what was asked for.
        options: beside the window.
        moments: whether `compute` returns mean and variance of each channel of the output beside
            it; in two dimensions what is in C++ does.
    """

    compute: Callable[..., jax.Array]
    choose: Callable[..., str]
    window: Window
    lowering: str
    options: Options
    moments: bool = False

    def at(self, place: Place) -> Callable[..., jax.Array]:
        """The function as it is computed at a place."""

        def computed(*operands: jax.Array) -> jax.Array:
            return self.compute(self, self.choose(self, place, *operands), *operands)

        return computed


_bind: ContextVar[Callable | None] = ContextVar("bind", default=None)


@contextlib.contextmanager
def bound_by(bind: Callable[..., jax.Array]) -> Iterator[None]:
    """Has `call` take `bind` in the place of this module's, where no sharding is explicit."""
    token = _bind.set(bind)
    try:
        yield
    finally:
        _bind.reset(token)


def call(function: Function, *operands: jax.Array) -> jax.Array:
    """The function of images `(N, H, W, C)`, whose batch may be sharded, and of kernels.

    First derivatives take the lowering that is chosen, others what XLA makes of the function; there
    are all, of any order.

    Raises:
        ValueError: when the program is compiled, if a lowering in C++ was asked for where it cannot
            be called.
    """
    divided = _divided() if jax.device_count() > 1 else None

    how = {"function": function, "levels": (), "divided": divided}
    sharding = jax.typeof(operands[0]).sharding
    if sharding.spec[0] is None or sharding.mesh.size == 1:
        return (_bind.get() or bind)(*operands, **how)
    # The axes are explicit, so it is known here how the batch is divided.
    batch = PartitionSpec(sharding.spec[0])
    specs = (batch, *[PartitionSpec()] * (len(operands) - 1))
    bound = functools.partial(bind, **how)
    return jax.shard_map(bound, mesh=sharding.mesh, in_specs=specs, out_specs=batch)(*operands)


@functools.cache
def _divided() -> Any:
    """A program with a `custom_partitioning` in it.

    JAX tells the devices and their mesh only to rules of programs that hold one, be it in a
    primitive's parameters.
    """
    identity = custom_partitioning(lambda x: x)
    identity.def_partition(
        partition=lambda mesh, arguments, result: (mesh, lambda x: x, result.sharding, arguments),
        sharding_rule=" -> ",
    )
    return jax.make_jaxpr(identity)(0.0)


def varying_alike(*operands: jax.Array) -> list[jax.Array]:
    """The operands, in `jax.shard_map` all varying over the axes that any of them varies over."""
    varying = [jax.typeof(operand).manual_axis_type.varying for operand in operands]
    every = frozenset().union(*varying)
    return [
        lax.pcast(operand, tuple(every - axes), to="varying") if every - axes else operand
        for operand, axes in zip(operands, varying, strict=True)
    ]


def needs_lax(options: Options, *operands: jax.Array) -> bool:
    """Whether only a convolution of `jax.lax` can have the output's dtype and all shardings."""
    images, *kernels = [jax.typeof(operand).sharding.spec for operand in operands]
    divided = any(axis is not None for axis in (*images[1:], *itertools.chain(*kernels)))
    return divided or options.preferred_element_type is not None or options.out_sharding is not None


def without_late(lowering: str, by_lax: str) -> str:
    """`by_lax`, in the place of `"auto"`, for operands of which `needs_lax` is true.

    Raises:
        ValueError: if a lowering in C++ was asked for by name.
    """
    if lowering in NATIVE:
        raise ValueError(
            f"lowering={lowering!r} does not have explicit shardings of other axes than the batch; "
            "'auto' finds one that has"
        )
    return by_lax if lowering == "auto" else lowering


# Three primitives: the output, its tangent, and the gradients by those operands that have a
# tangent, which `which` tells. `levels` has a row for each `jax.vmap` around the function, the
# outermost first: of each operand, whether it has the axis. These axes are in front, in that order.
# `divided` is that of `_divided`, or None.

_output = Primitive("multilinear")
_tangent = Primitive("multilinear_tangent")
_gradients = Primitive("multilinear_gradients")
_gradients.multiple_results = True


def bind(*operands: jax.Array, **how: Any) -> jax.Array:
    """The output, of operands that in `jax.shard_map` may vary over other axes."""
    return _output.bind(*varying_alike(*operands), **how)


def _compute_output(
    place: Place, *, function: Function, levels: Sequence[Flags], divided: Any
) -> Callable:
    return _mapped(function.at(place), levels)


def _compute_tangent(
    _: Place, *, function: Function, levels: Sequence[Flags], which: Flags, divided: Any
) -> Callable:
    def compute(*arguments: jax.Array) -> jax.Array:
        operands, tangents = arguments[: len(which)], iter(arguments[len(which) :])
        terms = []
        for i, has_tangent in enumerate(which):
            if has_tangent:
                changed = (*operands[:i], next(tangents), *operands[i + 1 :])
                terms.append(
                    _output.bind(*changed, function=function, levels=levels, divided=divided)
                )
        return functools.reduce(jnp.add, terms)

    return compute


def _compute_gradients(
    place: Place, *, function: Function, levels: Sequence[Flags], which: Flags, divided: Any
) -> Callable:
    def compute(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        *operands, dy = arguments
        _, pull = jax.vjp(*some_of(function.at(place), operands, which))
        return pull(dy)

    return _mapped(compute, [(*flags, True) for flags in levels])


def some_of(computed: Callable, arguments: Sequence, which: Sequence[bool]) -> list[Any]:
    """`computed` as a function of those arguments that `which` tells, and these."""

    def of_some(*some: jax.Array) -> Any:
        rest = iter(some)
        return computed(*(next(rest) if w else a for a, w in zip(arguments, which, strict=True)))

    return [of_some, *(a for a, w in zip(arguments, which, strict=True) if w)]


def _mapped(computed: Callable, levels: Sequence[Flags]) -> Callable:
    for flags in reversed(levels):
        computed = jax.vmap(computed, [0 if flag else None for flag in flags])
    return computed


# Shapes


def _shapes(
    levels: Sequence[Flags], operands: Sequence[jax.Array]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The sizes of the axes that `jax.vmap` added, and each operand's shape without them."""
    sizes, own = {}, []
    for i, operand in enumerate(operands):
        has = [level for level, flags in enumerate(levels) if flags[i]]
        sizes |= dict(zip(has, operand.shape, strict=False))
        own.append(operand.shape[len(has) :])
    return tuple(sizes[level] for level in range(len(levels))), own


def output_type(
    *arguments: Any,
    function: Function,
    levels: Sequence[Flags],
    which: Flags | None = None,
    divided: Any,
) -> Any:
    operands = arguments if which is None else arguments[: len(which)]
    sizes, (images, *_, last) = _shapes(levels, operands)
    *kernel_size, _, channels = last
    output = function.window.output_size(images[1:-1], kernel_size)
    return _typed(operands[0], (*sizes, images[0], *output, channels), bool(levels))


def _gradient_types(
    *arguments: Any, function: Function, levels: Sequence[Flags], which: Flags, divided: Any
) -> list[Any]:
    sizes, own = _shapes([(*flags, True) for flags in levels], arguments)
    return [
        _typed(operand, (*sizes, *shape), bool(levels))
        for operand, shape, has_tangent in zip(arguments, own, (*which, False), strict=True)
        if has_tangent
    ]


def _typed(like: Any, shape: tuple[int, ...], is_mapped: bool) -> Any:
    """The type of an array of `shape`, whose first axis is sharded as that of `like`."""
    spec = PartitionSpec() if is_mapped else PartitionSpec(like.sharding.spec[0])
    sharding = NamedSharding(like.sharding.mesh, spec)
    return like.update(shape=shape, weak_type=False, sharding=sharding)


# Derivatives


def _output_jvp(primals: Sequence, tangents: Sequence, **how: Any) -> tuple[Any, Any]:
    return _output.bind(*primals, **how), bind_tangent(primals, tangents, **how)


def bind_tangent(primals: Sequence, tangents: Sequence, **how: Any) -> Any:
    """The output's tangent, where those of some operands are zero."""
    which = tuple(type(tangent) is not ad.Zero for tangent in tangents)
    given = [tangent for tangent, has_one in zip(tangents, which, strict=True) if has_one]
    return _tangent.bind(*primals, *given, which=which, **how)


def by_jax(primitive: Primitive, definition: Callable[..., Callable]) -> Callable:
    """The rule for a derivative's own derivative: that of what XLA computes it by.

    Args:
        primitive: the derivative.
        definition: takes the primitive's parameters, and returns a function of its arguments.
    """

    def rule(primals: Sequence, tangents: Sequence, **how: Any) -> tuple[Any, Any]:
        which = [type(tangent) is not ad.Zero for tangent in tangents]
        of_some, *some = some_of(definition(**how), primals, which)
        given = [tangent for tangent, has_one in zip(tangents, which, strict=True) if has_one]
        _, found = jax.jvp(of_some, some, given)
        return primitive.bind(*primals, **how), list(found) if type(found) is tuple else found

    return rule


def _tangent_transpose(dy: Any, *arguments: Any, which: Flags, levels: Any, **how: Any) -> list:
    operands, tangents = arguments[: len(which)], arguments[len(which) :]
    if type(dy) is ad.Zero:
        return [ad.Zero(a.aval) if ad.is_undefined_primal(a) else None for a in arguments]
    found = _gradients.bind(*operands, dy, which=which, levels=levels, **how)
    positions = [i for i, has_tangent in enumerate(which) if has_tangent]
    summed = [
        _over_others(g, [f[i] for f in levels]) for g, i in zip(found, positions, strict=True)
    ]
    wanted = [ad.is_undefined_primal(tangent) for tangent in tangents]
    return [None] * len(which) + [g if w else None for g, w in zip(summed, wanted, strict=True)]


def _over_others(gradient: jax.Array, has_axis: Sequence[bool]) -> jax.Array:
    """The sum of the gradients of one operand over those mapped axes that it does not have."""
    return gradient.sum([level for level, has_it in enumerate(has_axis) if not has_it])


def output_transpose(dy: Any, *operands: Any, levels: Any, **how: Any) -> list:
    """The output is linear in each operand, so the gradient by one does not depend on its value."""
    which = tuple(map(ad.is_undefined_primal, operands))
    zeros = [
        jnp.zeros(o.aval.shape, o.aval.dtype) if w else o
        for o, w in zip(operands, which, strict=True)
    ]
    (found,) = _gradients.bind(*zeros, dy, which=which, levels=levels, **how)
    found = _over_others(found, [flags[which.index(True)] for flags in levels])
    return [found if w else None for w in which]


# jax.vmap


def _batched(primitive: Primitive) -> Callable:
    def rule(arguments: Sequence, axes: Sequence, *, levels: Any, **how: Any) -> tuple[Any, Any]:
        which = how.get("which", ())
        count = len(arguments) if primitive is _output else len(which)
        size = next(a.shape[d] for a, d in zip(arguments, axes, strict=True) if d is not None)
        has = [axis is not None for axis in axes]
        flags, needed = _flags(primitive, has, which, count)
        of_kernels = any(flags[1:]) or (primitive is _gradients and any(which[1:]))
        joins = not levels and not of_kernels
        needed[0] = needed[0] or joins
        moved = [
            jnp.moveaxis(a, axis, 0)
            if axis is not None
            else (jnp.broadcast_to(a, (size, *a.shape)) if need else a)
            for a, axis, need in zip(arguments, axes, needed, strict=True)
        ]
        if joins:
            return _merged(primitive, moved, needed, how)
        found = primitive.bind(*moved, levels=(flags, *levels), **how)
        return found, [0] * len(found) if primitive.multiple_results else 0

    return rule


def _flags(
    primitive: Primitive, has: Sequence[bool], which: Flags, count: int
) -> tuple[Flags, list[bool]]:
    """Which operands have the axis from now on, and which arguments must be given it.

    An operand has it where its tangent does, and the gradient of the output always.
    """
    if primitive is _gradients:
        return tuple(has[:count]), [*has[:count], True]
    positions = [i for i, has_tangent in enumerate(which) if has_tangent]
    of_tangents = dict(zip(positions, has[count:], strict=True))
    flags = tuple(h or of_tangents.get(i, False) for i, h in enumerate(has[:count]))
    return flags, [*flags, *(flags[i] for i in positions)]


def _merged(
    primitive: Primitive, arguments: Sequence, has: Sequence[bool], how: Any
) -> tuple[Any, Any]:
    """What has the axis are images alone, of which it joins the batch."""
    size, batch = arguments[0].shape[:2]
    joined = [
        a.reshape(size * batch, *a.shape[2:]) if h else a
        for a, h in zip(arguments, has, strict=True)
    ]
    found = primitive.bind(*joined, levels=(), **how)
    apart = jax.tree.map(lambda y: y.reshape(size, batch, *y.shape[1:]), found)
    return apart, [0] * len(found) if primitive.multiple_results else 0


# Lowering


def _lowered(primitive: Primitive, compute: Callable, platform: str | None) -> Callable:
    def rule(context: mlir.LoweringRuleContext, *arguments: Any, **how: Any) -> Any:
        place, devices = place_of(context, platform)
        lowering = how["function"].lowering
        if lowering in NATIVE and not place.calls:
            raise ValueError(
                f"lowering={lowering!r} calls C++, which a program can do on CPUs, if it is not "
                "exported and the axes of its mesh are all automatic, all explicit or all manual"
            )
        if devices and how["levels"]:
            place = Place(platform, False)
        computed = compute(place, **how)
        types = [ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in]
        context = context.replace(avals_in=types)
        if devices and place.calls and primitive is not _tangent:
            computed = _over_devices(computed, primitive, types, how)
            module = context.module_context
            axes = dataclasses.replace(module.axis_context, device_assignment=devices)
            context = context.replace(module_context=module.replace(axis_context=axes))
        lowered = mlir.lower_fun(computed, multiple_results=primitive.multiple_results)
        return lowered(context, *arguments)

    return rule


def place_of(
    context: mlir.LoweringRuleContext, platform: str | None
) -> tuple[Place, tuple[jax.Device, ...]]:
    """Where the program will run, and the devices if XLA divides it over several."""
    module = context.module_context
    axes, devices = module.axis_context, ()
    # What is exported must run where this package is not installed.
    calls = platform == "cpu" and not module.lowering_parameters.for_export
    if manual := getattr(axes, "manual_axes", None):
        calls = calls and set(manual) == set(axes.mesh.axis_names)
    elif (count := getattr(axes, "num_devices", 1)) > 1:
        devices = tuple(jax.devices(platform)[:count])  # their order is all that counts
        calls = calls and axes.abstract_mesh is not None and len(devices) == count
    return Place(platform, calls), devices


def _over_devices(computed: Callable, primitive: Primitive, types: Sequence, how: Any) -> Callable:
    """`computed` by every device for its part of the batch; gradients of kernels are added."""
    which = how.get("which", ())
    batches = [True] + [False] * (len(types) - 1)  # which arguments have the batch axis
    if primitive is _gradients:
        batches[-1] = True
        results = [i == 0 for i, has_tangent in enumerate(which) if has_tangent]
    else:
        results = [True]
    several = primitive.multiple_results

    def partition(mesh, arguments, outputs):
        batch = _axes_of_batch(mesh, arguments[0])

        def local(*arrays):
            found = computed(*arrays)
            if batch is None or not several:
                return found
            return tuple(
                y if of_batch else lax.psum(y, batch)
                for y, of_batch in zip(found, results, strict=True)
            )

        def sharding(of_batch):
            return NamedSharding(mesh, PartitionSpec(batch if of_batch else None))

        outs = tuple(map(sharding, results))
        return mesh, local, outs if several else outs[0], tuple(map(sharding, batches))

    def infer(mesh, arguments, outputs):
        _, _, outs, _ = partition(mesh, arguments, outputs)
        return outs

    divided = custom_partitioning(computed)
    divided.def_partition(
        infer_sharding_from_operands=infer,
        partition=partition,
        sharding_rule=_sharding_rule(types, batches, which),
    )
    # A program holds only the address of `divided`, and beside it what it computes and how that is
    # divided, by which JAX can find the program again at a later start.
    shapes = (jax.ShapeDtypeStruct(t.shape, t.dtype) for t in types)
    computes = f"{which} {jax.make_jaxpr(computed)(*shapes)} {_how_it_is_divided()}"

    def described(*arrays: jax.Array) -> Any:
        with set_xla_metadata(computes=hashlib.sha256(computes.encode()).hexdigest()):
            return divided(*arrays)

    return described


@functools.cache
def _how_it_is_divided() -> str:
    """Of this module's source: a program that another version of it has divided is another one."""
    return hashlib.sha256(__spec__.loader.get_data(__file__)).hexdigest()


def _axes_of_batch(mesh: Mesh, images: Any) -> str | tuple[str, ...] | None:
    """The axes of the mesh that the batch is divided over, if it can be in equal parts.

    Else XLA would fill the last part up, with images that are none.
    """
    spec = images.sharding.spec
    axes = spec[0] if spec else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[name] for name in names)
    return axes if images.shape[0] % parts == 0 else None


def _sharding_rule(types: Sequence, batches: Sequence[bool], which: Flags) -> str:
    """The rule of Shardy: only the batch `n` is one factor of several arrays."""
    names = (f"x{i}" for i in range(10**6))

    def factors(ndim, of_batch):
        first = ["n"] if of_batch else [next(names)]
        return " ".join([*first, *(next(names) for _ in range(ndim - 1))])

    inputs = [factors(len(t.shape), b) for t, b in zip(types, batches, strict=True)]
    if which:
        outputs = [
            factors(len(t.shape), i == 0)
            for i, (t, has_tangent) in enumerate(zip(types, which, strict=False))
            if has_tangent
        ]
    else:
        outputs = [factors(len(types[0].shape), True)]
    return f"{', '.join(inputs)} -> {', '.join(outputs)}"


def definition(equation: JaxprEqn) -> Jaxpr | None:
    """What an equation of one of the primitives computes by definition; None for all others."""
    if equation.primitive not in _COMPUTED_BY:
        return None
    compute = _COMPUTED_BY[equation.primitive](ANYWHERE, **equation.params)
    with by_definition():
        jaxpr = jax.make_jaxpr(compute)(*(operand.aval for operand in equation.invars)).jaxpr
    # Gradients do not need the output.
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def define(primitive: Primitive, compute: Callable) -> None:
    """Has `definition` take `compute`, of a primitive's operands and parameters."""
    _COMPUTED_BY[primitive] = lambda _, **how: functools.partial(compute, **how)


def always_compile(primitive: Primitive, parameters: Sequence[str]) -> None:
    """Has the primitive compiled wherever it is called, since that is when its lowering is chosen.

    Args:
        primitive: that has no rule for a call with arrays yet.
        parameters: the names of all that it takes beside arrays.
    """

    def evaluate(*operands: jax.Array, **how: Any) -> Any:
        return primitive.bind(*operands, **how)

    compiled = jax.jit(evaluate, static_argnames=parameters)

    def at_once(*operands: jax.Array, **how: Any) -> Any:
        with jax.disable_jit(False):
            return compiled(*operands, **how)

    primitive.def_impl(at_once)


def _register(primitive: Primitive, compute: Callable, types: Callable, jvp: Callable) -> None:
    always_compile(primitive, ("function", "levels", "which", "divided"))
    primitive.def_abstract_eval(types)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = _batched(primitive)
    for platform in (None, "cpu"):
        mlir.register_lowering(primitive, _lowered(primitive, compute, platform), platform)


_COMPUTED_BY = {
    _output: _compute_output,
    _tangent: _compute_tangent,
    _gradients: _compute_gradients,
}
_register(_output, _compute_output, output_type, _output_jvp)
_register(
    _tangent,
    _compute_tangent,
    output_type,
    by_jax(_tangent, functools.partial(_compute_tangent, ANYWHERE)),
)
_register(
    _gradients,
    _compute_gradients,
    _gradient_types,
    by_jax(_gradients, functools.partial(_compute_gradients, ANYWHERE)),
)
ad.primitive_transposes[_output] = output_transpose
ad.primitive_transposes[_tangent] = _tangent_transpose
