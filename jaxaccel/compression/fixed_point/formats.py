"""Formats of fixed-point numbers: which values a word of W bits stands for, and what happens to all others.

    value = m · 2^(−F),    m an integer in [−2^(W−1), 2^(W−1) − 1], or in [0, 2^W − 1] without sign

W counts all bits, F those right of the binary point; I = W − F is what hardware tools call the integer bits. F may be
negative or greater than W. A number is brought into a format by rounding v = x·2^F and then dealing with overflow, in
this order. Both rules carry the names that high-level synthesis knows them by:

    rounding        v becomes                           overflow     an integer outside the range becomes
    rnd             ⌊v + ½⌋                (AP_RND)     sat          the nearest end of the range    (AP_SAT)
    rnd_min_inf     ⌈v − ½⌉                             sat_zero     0
    rnd_zero        ties towards zero                   sat_sym      as sat, in a symmetric range: [−hi, hi]
    rnd_inf         ties away from zero                 wrap         its low W bits                  (AP_WRAP)
    rnd_conv        ties to even
    trn             ⌊v⌋                    (AP_TRN)
    trn_zero        towards zero

Source: the arithmetic types of Dai et al., Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs,
arXiv 2401.17544; modes as AMD's Vitis HLS user guide UG1399 defines them for ap_fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROUNDINGS = ("rnd", "rnd_zero", "rnd_min_inf", "rnd_inf", "rnd_conv", "trn", "trn_zero")
OVERFLOWS = ("sat", "sat_zero", "sat_sym", "wrap")
LARGEST_WORD = 31
"""Raw values are held in int32, unsigned ones too."""
LARGEST_FRAC = 126
"""2^F and 2^(−F) are both normal numbers of float32."""
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class FixedPoint:
    """One format, static and hashable: it may be an attribute of a Flax NNX module or a static argument under jit.

    Attributes:
        word: W, all bits; 2 to 31, or 1 to 31 without sign.
        frac: F, bits right of the binary point; −126 to 126.
        signed: whether one of the bits is a sign.
        rounding: one of ``"rnd"``, ``"rnd_zero"``, ``"rnd_min_inf"``, ``"rnd_inf"``, ``"rnd_conv"``, ``"trn"``,
            ``"trn_zero"``. Hardware tools default to ``"trn"``.
        overflow: one of ``"sat"``, ``"sat_zero"``, ``"sat_sym"``, ``"wrap"``. Hardware tools default to ``"wrap"``.

    Raises:
        ValueError: for widths that are no Python integers or out of range, and for unknown modes.

    >>> f = FixedPoint(8, 5)
    >>> f.lo, f.hi, f.resolution, f.min, f.max, f.integer_bits
    (-128, 127, 0.03125, -4.0, 3.96875, 3)
    """

    word: int | Any
    frac: int | Any
    signed: bool | Any = True
    rounding: str | Any = "rnd"
    overflow: str | Any = "sat"

    def __post_init__(self) -> None:
        check_word(self.word, self.signed)
        _check_int("frac", self.frac)
        if abs(self.frac) > LARGEST_FRAC:
            raise ValueError(f"frac is {self.frac}, expected {-LARGEST_FRAC} to {LARGEST_FRAC}")
        check_modes(self.rounding, self.overflow)

    @property
    def integer_bits(self) -> int:
        """I = W − F, the sign included."""
        return self.word - self.frac

    @property
    def lo(self) -> int:
        """Smallest raw integer; ``sat_sym`` leaves out the one that has no opposite."""
        return raw_range(self.word, self.signed, self.overflow)[0]

    @property
    def hi(self) -> int:
        """Largest raw integer."""
        return raw_range(self.word, self.signed, self.overflow)[1]

    @property
    def resolution(self) -> float:
        """2^(−F), the distance of neighbours."""
        return 2.0**-self.frac

    @property
    def min(self) -> float:
        """Smallest value."""
        return self.lo * self.resolution

    @property
    def max(self) -> float:
        """Largest value."""
        return self.hi * self.resolution


Format = FixedPoint | Sequence[FixedPoint]
"""One format, or one for each channel of the last axis; those of channels differ only in ``frac``."""


def _check_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, expected a Python integer")


def check_word(word: Any, signed: Any = True) -> None:
    """Raise ``ValueError`` unless ``word`` is a number of bits that int32 holds."""
    _check_int("word", word)
    if not isinstance(signed, bool):
        raise ValueError(f"signed is {signed!r}, expected True or False")
    fewest = 2 if signed else 1
    if not fewest <= word <= LARGEST_WORD:
        kind = "a signed" if signed else "an unsigned"
        raise ValueError(f"word is {word}, expected {fewest} to {LARGEST_WORD} bits for {kind} format")


def check_modes(rounding: Any, overflow: Any) -> None:
    """Raise ``ValueError`` unless both modes are known."""
    for name, value, known in (("rounding", rounding, ROUNDINGS), ("overflow", overflow, OVERFLOWS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def raw_range(word: Any, signed: bool, overflow: str = "wrap") -> tuple[Any, Any]:
    """Smallest and largest raw integer that a cast can give."""
    if not signed:
        return 0, 2**word - 1
    hi = 2 ** (word - 1) - 1
    return (-hi if overflow == "sat_sym" else -hi - 1), hi


def largest_magnitude(fmt: FixedPoint) -> int:
    """Largest |m| of any word of this width, whatever the overflow mode."""
    lo, hi = raw_range(fmt.word, fmt.signed)
    return max(-lo, hi)


def check_int32(what: str, bound: int, widths: str) -> None:
    """Raise ``ValueError`` if numbers of magnitude up to ``bound`` overflow int32."""
    if bound > INT32_MAX:
        raise ValueError(
            f"{what} of {widths} can reach {bound} = 2^{bound.bit_length() - 1}.., expected at most 2^31 - 1: int32 "
            "would overflow; take fewer bits, or fewer terms"
        )


def _exact(word: int, frac: int, signed: bool, what: str) -> FixedPoint:
    if word > LARGEST_WORD:
        raise ValueError(f"{what} needs word {word}, expected at most {LARGEST_WORD} bits: cast the operands first")
    return FixedPoint(word, frac, signed, "trn", "wrap")


def multiply_format(a: FixedPoint, b: FixedPoint) -> FixedPoint:
    """Format that holds every product: W = W1 + W2 and F = F1 + F2, as hardware tools give it.

    Its modes, ``trn`` and ``wrap``, are those that tools give to results; neither ever acts, as the product is exact.

    Raises:
        ValueError: if it takes more than 31 bits.

    >>> p = multiply_format(FixedPoint(8, 5), FixedPoint(6, 5))
    >>> p.word, p.frac
    (14, 10)
    """
    return _exact(a.word + b.word, a.frac + b.frac, a.signed or b.signed, f"the product of {a.word} and {b.word} bits")


def add_format(a: FixedPoint, b: FixedPoint, terms: int = 2) -> FixedPoint:
    """Format that holds every sum: F is the larger of both, I the larger of both (a sign counted) and one more.

    Args:
        a: format of one summand.
        b: of the other.
        terms: how many numbers of these formats are added; ⌈log2 terms⌉ more bits instead of one.

    Raises:
        ValueError: if it takes more than 31 bits, or ``terms`` is no positive integer.

    >>> s = add_format(FixedPoint(8, 5), FixedPoint(6, 1))
    >>> s.word, s.frac
    (11, 5)
    """
    _check_int("terms", terms)
    if terms < 1:
        raise ValueError(f"terms is {terms}, expected at least 1")
    signed = a.signed or b.signed
    # An unsigned number beside a signed one needs a sign bit of its own.
    integer = max(f.integer_bits + (signed and not f.signed) for f in (a, b)) + (terms - 1).bit_length()
    frac = max(a.frac, b.frac)
    return _exact(integer + frac, frac, signed, f"the sum of {terms} numbers of {a.word} and {b.word} bits")


def dot_format(x: FixedPoint, w: FixedPoint, terms: int) -> FixedPoint:
    """Format that holds every sum of ``terms`` products: what an accumulator needs to be exact.

    Raises:
        ValueError: if it takes more than 31 bits.

    >>> s = dot_format(FixedPoint(8, 5), FixedPoint(6, 5), 33)
    >>> s.word, s.frac
    (20, 10)
    """
    product = multiply_format(x, w)
    return add_format(product, product, terms)


def split_channels(fmt: Any, name: str = "fmt") -> tuple[FixedPoint, int | tuple[int, ...]]:
    """A format and its F, or the common format of channels and their F.

    Raises:
        ValueError: if it is neither, or channels differ in more than ``frac``.
    """
    if isinstance(fmt, FixedPoint):
        return fmt, fmt.frac
    if not isinstance(fmt, Sequence) or not fmt or not all(isinstance(f, FixedPoint) for f in fmt):
        raise ValueError(f"{name} is {fmt!r}, expected a FixedPoint or a sequence of them")
    kinds = {(f.word, f.signed, f.rounding, f.overflow) for f in fmt}
    if len(kinds) > 1:
        raise ValueError(f"{name} has channels that differ in more than frac: {sorted(kinds)}")
    return fmt[0], tuple(f.frac for f in fmt)
