"""exp and the sigmoid on 16 lanes, our own: a library's would differ between machines and between a row's lanes.

exp is 2^n times a polynomial of the rest, at most one unit in the last place off; 0 below -87.3, infinity above 88.3.
NaN stays NaN.
"""

from __future__ import annotations

from .vector import F32X16, I32X16, Builder, Value, fma, splat

MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
LOG2E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.42860682030941723212e-06
# Taylor's coefficients of e^r on |r| <= ln(2) / 2, from r^7 down
COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
TOO_SMALL, TOO_LARGE = -87.3, 88.3


def exp(b: Builder, x: Value) -> Value:
    """e^x of 16 floats."""
    shifted = fma(b, x, splat(F32X16, LOG2E), splat(F32X16, MAGIC))
    n = b.fsub(shifted, splat(F32X16, MAGIC))
    negative = b.fsub(splat(F32X16, 0.0), n)
    rest = fma(b, negative, splat(F32X16, LN2_LOW), fma(b, negative, splat(F32X16, LN2_HIGH), x))
    value = splat(F32X16, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        value = fma(b, value, rest, splat(F32X16, coefficient))
    # the integer n in an exponent's place: shifted's low bits are 2^22 + n, and what is above falls off the top
    exponent = b.shl(b.add(b.bitcast(shifted, I32X16), splat(I32X16, 127)), splat(I32X16, 23))
    value = b.fmul(value, b.bitcast(exponent, F32X16))
    value = b.select(b.fcmp_ordered("<", x, splat(F32X16, TOO_SMALL)), splat(F32X16, 0.0), value)
    return b.select(b.fcmp_ordered(">", x, splat(F32X16, TOO_LARGE)), splat(F32X16, float("inf")), value)


def sigmoid(b: Builder, x: Value) -> Value:
    """1 / (1 + e^-x) of 16 floats."""
    one = splat(F32X16, 1.0)
    return b.fdiv(one, b.fadd(one, exp(b, b.fsub(splat(F32X16, 0.0), x))))


def silu(b: Builder, x: Value) -> Value:
    """x / (1 + e^-x) of 16 floats."""
    return b.fdiv(x, b.fadd(splat(F32X16, 1.0), exp(b, b.fsub(splat(F32X16, 0.0), x))))
