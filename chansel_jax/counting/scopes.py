"""Named scopes that tell which module of a network an operation belongs to.

JAX keeps with each operation of a traced function the named scopes that it lies in, through every
transformation, into loops and out of derivatives. So while a network is traced the methods of its
classes open such a scope, whose name is the module's place.
"""

import contextlib
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx

_PLACE = "_module_scopes_place"  # the attribute that tells a module its place
_CONTAINERS = (nnx.List, nnx.Dict, nnx.bridge.ToNNX)  # all of whose attributes are their content
_one_at_a_time = threading.RLock()  # for the classes are changed for all threads


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Where a module stands. No place equals another, so that no trace is taken for another.

    Attributes:
        number: what its scope is called by.
        path: as in `"blocks.2.shortcut"`.
        kind: the name of the module's class.
    """

    number: int
    path: str
    kind: str


Outputs = dict[Place, tuple[int, ...] | None]


def has_scope(node: Any) -> bool:
    """Whether `node` is a module that can have a scope; a container's content has its own."""
    return isinstance(node, nnx.Pytree) and not isinstance(node, _CONTAINERS)


def set_place(module: nnx.Pytree, place: Place) -> None:
    """Tells a module its place, which it keeps through `nnx.split` and `nnx.merge`."""
    object.__setattr__(module, _PLACE, place)  # also where the class is frozen


@contextlib.contextmanager
def module_scopes(classes: Iterable[type]) -> Iterator[Outputs]:
    """While it lasts, methods of the `classes` open the scope of their module's place.

    Modules without a place stay as they are.

    Yields:
        The shape of what each module that was called returned last, its first array, or None if
        there is none; in the order of the first calls.
    """
    outputs: Outputs = {}
    with _one_at_a_time:
        methods = list(_methods(classes))
        try:
            for owner, name, method in methods:
                setattr(owner, name, _in_scope(method, outputs))
            yield outputs
        finally:
            for owner, name, method in methods:
                setattr(owner, name, method)


def number_of(scopes: str) -> int:
    """The number of the innermost place in `scopes`, as JAX writes named scopes; 0 without one."""
    return int(re.findall(r"module\[(\d+)\]", f"module[0]/{scopes}")[-1])


def _methods(classes: Iterable[type]) -> Iterator[tuple[type, str, Callable]]:
    """`__call__` and the public methods, with the classes that define them, Flax's base aside."""
    owners = {owner for each in classes for owner in each.__mro__} - set(nnx.Module.__mro__)
    for owner in owners:
        for name, value in vars(owner).items():
            binds = callable(value) and hasattr(value, "__get__")
            of_class = isinstance(value, type | staticmethod | classmethod)
            if binds and not of_class and (name == "__call__" or not name.startswith("_")):
                yield owner, name, value


def _in_scope(method: Callable, outputs: Outputs) -> Callable:
    @functools.wraps(method)
    def in_scope(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = method.__get__(self, type(self))
        place = getattr(self, _PLACE, None)
        if not isinstance(place, Place):
            return bound(*args, **kwargs)
        outputs.setdefault(place, None)
        with jax.named_scope(f"module[{place.number}]"):
            result = bound(*args, **kwargs)
        outputs[place] = next((array.shape for array in _arrays(result)), outputs[place])
        return result

    return in_scope


def _arrays(result: Any) -> Iterator[jax.Array]:
    """The arrays in tuples, lists and dicts; what else a method returns must not be touched."""
    if isinstance(result, jax.Array):
        yield result
    elif isinstance(result, tuple | list | dict):
        for each in result.values() if isinstance(result, dict) else result:
            yield from _arrays(each)
