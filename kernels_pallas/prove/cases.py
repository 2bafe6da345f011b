"""What a kernel offers to the prover: a function, its arguments, and what only its author knows about it."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import kernels_pallas

Shape = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """One function at one shape, ready to be compiled.

    Attributes:
        function: takes ``arguments`` positionally; holds one or more ``pallas_call``.
        arguments: shapes and dtypes.
        flops: FLOPs of its matrix products as it runs them, for the roofline.
        bytes: bytes that it moves between HBM (or GPU memory) and the chip, as it runs, for the roofline.
        trips: how often the body of each loop inside a kernel runs each time that the loop is reached, by kernel name,
            in the order of the program (an outer loop before its inner ones). ``None`` for a loop whose count the
            compiler writes down itself (grids, static loops). Kernels that are not listed have only such. TPU only.
        busy: the fraction of grid steps that do the work, for kernels that skip steps by a condition (``pl.when``).
            TPU only.
        note: what a reader of the table should know, such as how many iterations were assumed.
        draw: makes arguments of a key, where a program runs on a chip; needed where some are no floats. Standard
            normals if ``None``.
        equation: the same function, slowly and without a kernel: what results are compared with, where a program runs.
    """

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    flops: int | float
    bytes: int | float
    trips: Mapping[str, tuple[int | float | None, ...]] = dataclasses.field(default_factory=dict)
    busy: int | float = 1.0
    note: str = ""
    draw: Callable[[jax.Array], tuple[Any, ...]] | None = None
    equation: Callable[..., Any] | None = None


def normals(key: jax.Array, arguments: Sequence[Any]) -> tuple[jax.Array, ...]:
    """Standard normals of these shapes and dtypes.

    Raises:
        ValueError: for a dtype of whole numbers, which only an author can draw.
    """
    for index, argument in enumerate(arguments):
        if not jax.numpy.issubdtype(argument.dtype, jax.numpy.floating):
            raise ValueError(f"argument {index} has dtype {argument.dtype}: the case must say how to draw it (draw)")
    keys = jax.random.split(key, max(len(arguments), 1))
    return tuple(
        jax.random.normal(k, a.shape, jax.numpy.float32).astype(a.dtype) for k, a in zip(keys, arguments, strict=False)
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel, for one family of chips, with the shapes at which it is proven.

    Attributes:
        op: name of the op, the subpackage's.
        kernel: ``forward``, ``backward``, ``decode``, ...
        family: ``tpu`` or ``gpu``.
        build: makes the program for a shape.
        shapes: what is proven by default, every size by name; the first one has every name that the case knows.
        targets: chips that it is proven for by default.
        peers: makers of the same work done by a peer's kernel, by the peer's name.
    """

    op: str
    kernel: str
    family: str
    build: Callable[[Shape], Program]
    shapes: tuple[Shape, ...]
    targets: tuple[str, ...]
    peers: Mapping[str, Callable[[Shape], Program]] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Op, kernel and family, as tables show it."""
        return f"{self.op} {self.kernel} {self.family}"

    def shape(self, changes: Shape) -> Shape:
        """The first default shape with ``changes``.

        Raises:
            ValueError: if a name is not one of the case's sizes.
        """
        unknown = [name for name in changes if name not in self.shapes[0]]
        if unknown:
            raise ValueError(f"shape has {unknown[0]!r}, which {self.name} has not: it has {dict(self.shapes[0])}")
        return {**self.shapes[0], **changes}


def find_ops() -> tuple[str, ...]:
    """The ops of this package that have cases for the prover.

    >>> "prove" in find_ops()
    False
    """
    return tuple(
        module.name
        for module in pkgutil.iter_modules(kernels_pallas.__path__)
        if module.ispkg
        and module.name != "prove"
        and any(m.name == "cases" for m in pkgutil.iter_modules([f"{kernels_pallas.__path__[0]}/{module.name}"]))
    )


def find_cases(op: str) -> tuple[Case, ...]:
    """The cases of an op: a name from `find_ops`, or ``package.module:attribute`` of a tuple of cases of your own.

    Raises:
        ValueError: if there is no such op, module or attribute, or it holds something else.
    """
    module, _, attribute = op.partition(":")
    if not attribute:
        if op not in find_ops():
            raise ValueError(
                f"op is {op!r}, expected one of {', '.join(find_ops())}, or package.module:attribute of your own cases"
            )
        module, attribute = f"kernels_pallas.{op}.cases", "CASES"
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"op is {op!r}, which cannot be imported: {error}") from error
    cases = tuple(found) if isinstance(found, Sequence) else (found,)
    if not cases or not all(isinstance(case, Case) for case in cases):
        raise ValueError(f"op is {op!r}, expected a Case or a sequence of them, got {found!r}")
    return cases
