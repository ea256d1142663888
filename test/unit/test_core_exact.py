"""An oracle for the reduce rule in exact rational arithmetic, and the maker of its golden file.

It shares nothing with `mapreduce.core.reduce`: values are fractions, rounding is Python's `round`,
which is half to even. `python test/unit/test_core_exact.py` rewrites test/golden/reduce.json; a
change of that file is a change of the protocol.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "reduce.json"


class Format(NamedTuple):
    """An IEEE-754 binary format: widths of the exponent and of the stored significand."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def itemsize(self) -> int:
        return (1 + self.exponent_bits + self.mantissa_bits) // 8

    @property
    def sign(self) -> int:
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def inf(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def nan(self) -> int:
        return self.inf | 1 << (self.mantissa_bits - 1)

    @property
    def least_exponent(self) -> int:
        return 2 - (1 << (self.exponent_bits - 1))

    def is_nan(self, bits: int) -> bool:
        return bits & ~self.sign > self.inf

    def decode(self, bits: int) -> Fraction:
        """Return the exact value of a finite number."""
        exponent, mantissa = divmod(bits & ~self.sign, 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        scale = max(exponent, 1) - 1 + self.least_exponent - self.mantissa_bits
        value = mantissa * Fraction(2) ** scale
        return -value if bits & self.sign else value

    def encode(self, value: Fraction, negative: bool) -> int:
        """Round to nearest even; `negative` is the sign, also of a zero."""
        sign = self.sign if negative else 0
        value = abs(value)
        exponent = self.least_exponent
        if value:
            exponent = value.numerator.bit_length() - value.denominator.bit_length()
            exponent -= value < Fraction(2) ** exponent
            exponent = max(exponent, self.least_exponent)
        mantissa = round(value / Fraction(2) ** (exponent - self.mantissa_bits))
        bits = ((exponent - self.least_exponent) << self.mantissa_bits) + mantissa
        return sign | min(bits, self.inf)

    def convert(self, bits: int, other: Format) -> int:
        """Return the same number in another format, a NaN as the canonical one."""
        if self.is_nan(bits):
            return other.nan
        negative = bool(bits & self.sign)
        if bits & ~self.sign == self.inf:
            return other.inf | (other.sign if negative else 0)
        return other.encode(self.decode(bits), negative)

    def add(self, a: int, b: int) -> int:
        infinite = [x for x in (a, b) if x & ~self.sign == self.inf]
        if self.is_nan(a) or self.is_nan(b) or len(set(infinite)) == 2:
            return self.nan
        if infinite:
            return infinite[0]
        total = self.decode(a) + self.decode(b)
        negative = total < 0 or (total == 0 and bool(a & b & self.sign))
        return self.encode(total, negative)

    def divide(self, a: int, count: int) -> int:
        if self.is_nan(a) or a & ~self.sign == self.inf:
            return a
        return self.encode(self.decode(a) / count, bool(a & self.sign))


FORMATS = {
    "float32": Format(8, 23),
    "float64": Format(11, 52),
    "float16": Format(5, 10),
    "bfloat16": Format(8, 7),
}
INTEGERS = {"int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8}
ITEMSIZE = {label: fmt.itemsize for label, fmt in FORMATS.items()} | INTEGERS


def exact_reduce(label: str, op: str, columns: list[list[int]]) -> list[int]:
    """Reduce K lists of bit patterns by the rule, element by element."""
    if label in INTEGERS:
        modulus = 1 << 8 * INTEGERS[label]
        return [sum(column) % modulus for column in zip(*columns, strict=True)]
    fmt = FORMATS[label]
    work = FORMATS["float32"] if fmt.itemsize == 2 else fmt
    result = []
    for column in zip(*columns, strict=True):
        acc, *rest = (fmt.convert(bits, work) for bits in column)
        for bits in rest:
            acc = work.add(acc, bits)
        if op == "avg":
            acc = work.divide(acc, len(column))
        result.append(work.convert(acc, fmt))
    return result


def pack(label: str, patterns: list[int]) -> bytes:
    """Bit patterns as little-endian elements."""
    return b"".join(bits.to_bytes(ITEMSIZE[label], "little") for bits in patterns)


def unpack(label: str, data: bytes) -> list[int]:
    size = ITEMSIZE[label]
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


def specials(label: str) -> list[int]:
    """Bit patterns at which arithmetic goes wrong, if it does."""
    if label in INTEGERS:
        top = 1 << (8 * INTEGERS[label] - 1)
        return [0, 1, 2, top - 1, top, top + 1, 2 * top - 1]
    fmt = FORMATS[label]
    least_normal, one = 1 << fmt.mantissa_bits, fmt.inf // 2 & ~((1 << fmt.mantissa_bits) - 1)
    signalling, payload = fmt.inf | 1, fmt.nan | 5
    positive = [0, 1, least_normal - 1, least_normal, one, one + 1]
    positive += [fmt.inf - 1, fmt.inf, signalling, payload]
    return positive + [bits | fmt.sign for bits in positive]


def near_ties(label: str) -> list[list[int]]:
    """Two columns whose sums are just below, at and just above the middle of two 16-bit floats."""
    fmt = FORMATS[label]
    pairs = []
    for upper, part, sign in itertools.product((0x3C00, 0x3C01, 0x3FFF), (-1, 0, 1), (0, fmt.sign)):
        exponent = upper >> fmt.mantissa_bits
        half_ulp = (exponent - fmt.mantissa_bits - 1) << fmt.mantissa_bits
        pairs.append((upper | sign, (half_ulp + part) | sign))
    return [list(column) for column in zip(*pairs, strict=True)]


def absorbed(label: str) -> list[int]:
    """Return `big, small, -big`: their sum in this order is 0, with `small` last it is `small`."""
    fmt = FORMATS[label]
    work = FORMATS["float32"] if fmt.itemsize == 2 else fmt
    big = fmt.encode(Fraction(1 << 15), False)
    small = fmt.encode(Fraction(2) ** (15 - work.mantissa_bits - 1), False)
    return [big, small, big | fmt.sign]


def stream(label: str, rank: int, elements: int, banded: bool) -> bytes:
    """Reproducible contributions: SHAKE-128 output as element bits.

    `banded` clears the upper exponent bits so that the ranks' magnitudes overlap; otherwise every
    pattern occurs, NaN and infinities included.
    """
    size = ITEMSIZE[label]
    data = hashlib.shake_128(f"mapreduce {label} {rank}".encode()).digest(elements * size)
    if not banded:
        return data
    fmt = FORMATS[label]
    low = fmt.sign | ((8 << fmt.mantissa_bits) - 1)  # sign, 3 exponent bits, mantissa
    middle = (fmt.inf // 2 & fmt.inf) & ~((8 << fmt.mantissa_bits) - 1)
    return pack(label, [bits & low | middle for bits in unpack(label, data)])


def operations(label: str) -> tuple[str, ...]:
    return ("sum", "avg") if label in FORMATS else ("sum",)


def golden_cases(label: str) -> list[tuple[str, list[list[int]]]]:
    """Return (why, columns) of every pinned vector."""
    pairs = itertools.product(specials(label), repeat=2)
    cases = [
        ("every pair of specials", [list(column) for column in zip(*pairs, strict=True)]),
        ("one contributor", [specials(label)]),
    ]
    if label in FORMATS:
        orders = zip(*itertools.permutations(absorbed(label)), strict=True)
        cases.append(("six rank orders", [list(column) for column in orders]))
        if ITEMSIZE[label] == 2:
            cases.append(("around ties", near_ties(label)))
    return cases


def golden_vectors() -> list[dict[str, object]]:
    return [
        {
            "dtype": label,
            "why": why,
            "inputs": [pack(label, column).hex() for column in columns],
            "outputs": {
                op: pack(label, exact_reduce(label, op, columns)).hex() for op in operations(label)
            },
        }
        for label in ITEMSIZE
        for why, columns in golden_cases(label)
    ]


def golden_streams(elements: int = 1500) -> list[dict[str, object]]:
    streams: list[dict[str, object]] = []
    for label, count, banded in itertools.product(ITEMSIZE, (1, 3, 8), (False, True)):
        if banded and label in INTEGERS:
            continue
        columns = [unpack(label, stream(label, rank, elements, banded)) for rank in range(count)]
        outputs = {op: pack(label, exact_reduce(label, op, columns)) for op in operations(label)}
        streams.append(
            {
                "dtype": label,
                "contributors": count,
                "elements": elements,
                "banded": banded,
                "sha256": {op: hashlib.sha256(run).hexdigest() for op, run in outputs.items()},
            }
        )
    return streams


@pytest.mark.parametrize(("label", "code"), [("float64", "d"), ("float32", "f"), ("float16", "e")])
def test_the_oracle_agrees_with_struct(label: str, code: str) -> None:
    fmt = FORMATS[label]
    for bits in specials(label) + unpack(label, stream(label, 99, 200, banded=False)):
        (value,) = struct.unpack(f"<{code}", pack(label, [bits]))
        if fmt.is_nan(bits):
            assert math.isnan(value)
        elif math.isfinite(value):
            assert fmt.decode(bits) == Fraction(value)
            assert fmt.encode(Fraction(value), bool(bits & fmt.sign)) == bits


def test_the_oracle_adds_and_divides_like_python() -> None:
    fmt = FORMATS["float64"]
    numbers = unpack("float64", stream("float64", 7, 400, banded=True))
    for a, b in zip(numbers[::2], numbers[1::2], strict=True):
        x, y = (struct.unpack("<d", pack("float64", [bits]))[0] for bits in (a, b))
        assert pack("float64", [fmt.add(a, b)]) == struct.pack("<d", x + y)
        assert pack("float64", [fmt.divide(a, 7)]) == struct.pack("<d", x / 7)


def write_golden() -> None:
    """Rewrite the golden file, one case a line."""
    parts = []
    for name, cases in (("vectors", golden_vectors()), ("streams", golden_streams())):
        lines = ",\n".join(json.dumps(case) for case in cases)
        parts.append(f'"{name}": [\n{lines}\n]')
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    write_golden()
