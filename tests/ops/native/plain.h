/* What lanes.h promises of one number, from the definitions, and numbers to try it on.
 *
 * A rounding is a multiple of the worth of the last place, found in double. Nothing is taken from
 * the files under test, so that the portable lanes are tested too.
 */
#ifndef PLAIN_H
#define PLAIN_H

#include <stdint.h>
#include <string.h>

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static double double_of(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

static double power_of_two(int exponent) { return double_of((uint64_t)(1023 + exponent) << 52); }

static uint32_t noise(uint32_t i)
{
    i = (i ^ (i >> 16)) * 0x7feb352du;
    i = (i ^ (i >> 15)) * 0x846ca68bu;
    return i ^ (i >> 16);
}

enum { SPECIALS = 22 };
static const uint32_t specials[SPECIALS] = {
    0,          0x80000000, 0x00000001, 0x80000001, 0x007fffff, 0x00800000, 0x80800000, 0x3f800000,
    0xbf800000, 0x3f800001, 0x3fc00000, 0x40400000, 0x33800000, 0x4b7fffff, 0x7f7fffff, 0xff7fffff,
    0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xffffffff, 0x34000001};

/* Number i of triples of floats, part by part: all triples of special ones, then any bits, and
 * numbers near 1 in turn. */
enum { TRIPLES = SPECIALS * SPECIALS * SPECIALS + 40000 };
static float triple(uint32_t i, uint32_t part)
{
    if (i < SPECIALS * SPECIALS * SPECIALS) {
        for (; part; part--)
            i /= SPECIALS;
        return float_of(specials[i % SPECIALS]);
    }
    const uint32_t any = noise(3 * i + part);
    return float_of(i % 2 ? any : 0x3e800000 + (any & 0x81ffffff));
}

static int same_bits(float a, float b) { return bits_of(a) == bits_of(b); }

/* The same number; any NaN is like another. */
static int same(float a, float b) { return same_bits(a, b) || (a != a && b != b); }

/* The bits, without the sign, of a number rounded to nearest even: in a format with `digits` bits
 * after the leading one, exponents from `least` on and the bits `most` for infinity. */
static uint32_t rounded(double number, int digits, int least, uint32_t most)
{
    uint64_t bits;
    memcpy(&bits, &number, 8);
    bits &= ~0ull >> 1;
    int exponent = (int)(bits >> 52) - 1023;
    if (exponent > 127)
        return most;
    exponent = exponent < least ? least : exponent;
    double units = double_of(bits) * power_of_two(digits - exponent); /* exact */
    units = (units + 0x1p52) - 0x1p52;
    const uint32_t all = ((uint32_t)(exponent - least) << digits) + (uint32_t)units;
    return all < most ? all : most;
}

/* The number of 16 bits, exactly. */
static float from_half(uint32_t half)
{
    const uint32_t exponent = half >> 10 & 31, rest = half & 1023;
    const uint32_t sign = half >> 15 << 31;
    if (exponent == 31)
        return float_of(sign | 0x7f800000 | rest << 13);
    const double units = exponent ? 1024 + rest : rest;
    const double magnitude = units * power_of_two((exponent ? (int)exponent : 1) - 25);
    return float_of(sign | bits_of((float)magnitude));
}

/* a b + c, rounded once: the sum in double is made odd where it is not exact, so that no second
 * rounding can meet a tie (Boldo and Melquiond 2008). */
static float fused(float a, float b, float c)
{
    const double product = (double)a * b, sum = product + c; /* the product is exact */
    const double back = sum - product, error = (product - (sum - back)) + (c - back);
    if (error != 0 && error == error && sum - sum == 0) {
        uint64_t bits;
        memcpy(&bits, &sum, 8);
        if (!(bits & 1))
            bits += (error > 0) == (sum > 0) ? 1 : UINT64_MAX;
        return (float)double_of(bits);
    }
    return (float)sum;
}

#endif
