"""Which implementation of an op runs: one rule for all ops."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

import jax

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")

# The kernel that is meant for a platform; where an op lacks it, XLA compiles the op.
_KERNEL_OF = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def resolve_implementation(
    implementation: str | None,
    available: Mapping[str, Collection[str]],
    platform: str | None = None,
    refusals: Mapping[str, str | None] = MappingProxyType({}),
    slower: Collection[str] = (),
) -> str:
    """Choose the implementation of an op.

    The choice is static: it depends on the platform, on shapes and on options, never on values of arrays, so it is made
    while tracing.

    Args:
        implementation: ``"xla"``, ``"pallas_tpu"``, ``"pallas_gpu"``, or ``None`` for the best one for the platform.
        available: the implementations that the op has, each with the platforms that it runs on.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; JAX's default backend if ``None``. Give it where a program is
            compiled for another machine than this one.
        refusals: for implementations that exist but cannot take this very call, the reason why ("mask is given, ..."),
            or ``None`` where there is none. ``implementation=None`` passes over them; naming one raises the reason.
        slower: kernels that were measured and lost against XLA for such a call: ``None`` passes over them as well, and
            naming one runs it.

    Returns:
        The name of an implementation that runs on the platform. ``None`` never falls back silently from a kernel that
        was asked for by name.

    Raises:
        ValueError: if the name is unknown, the op has no such implementation, it cannot run on the platform, or it
            refuses the call.

    >>> op = {"xla": ("cpu", "gpu", "tpu"), "pallas_tpu": ("tpu",)}
    >>> resolve_implementation(None, op, platform="tpu"), resolve_implementation(None, op, platform="gpu")
    ('pallas_tpu', 'xla')
    >>> resolve_implementation(None, op, platform="tpu", refusals={"pallas_tpu": "mask is given"})
    'xla'
    >>> resolve_implementation(None, op, platform="tpu", slower=["pallas_tpu"])
    'xla'
    """
    platform = jax.default_backend() if platform is None else platform
    if implementation is None:
        for name in (_KERNEL_OF.get(platform), "xla"):
            if name is None or name in slower:
                continue
            if platform in available.get(name, ()) and refusals.get(name) is None:
                return name
        raise ValueError(
            f"platform is {platform!r}, and no implementation of this op runs there: it has {_list(available)}"
            + "".join(f"; {name} refuses: {reason}" for name, reason in refusals.items() if reason)
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)} or None")
    if implementation not in available:
        raise ValueError(
            f"implementation is {implementation!r}, which this op does not have: it has {_list(available)}"
        )
    if platform not in available[implementation]:
        raise ValueError(
            f"implementation is {implementation!r}, which cannot run on platform {platform!r}: "
            f"this op has {_list(available)}"
        )
    raise_refusal(implementation, refusals.get(implementation))
    return implementation


def raise_refusal(implementation: str, reason: str | None) -> None:
    """Raise ``ValueError`` if there is a reason why an implementation cannot take a call."""
    if reason is not None:
        raise ValueError(f"implementation is {implementation!r}, which cannot take this call: {reason}")


def _list(available: Mapping[str, Collection[str]]) -> str:
    return ", ".join(f"{name} (on {', '.join(platforms)})" for name, platforms in available.items()) or "none"
