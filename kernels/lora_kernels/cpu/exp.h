/* e to the power of LANES floats, on the functions of lanes.h alone.
 *
 * x = n ln 2 + r with |r| <= ln(2)/2, so exp(x) = 2^n exp(r). Adding 1.5 * 2^23 rounds x / ln 2 to
 * an integer and leaves n in the low bits of the sum, from where a shift brings it to the exponent.
 * ln 2 is taken off in two parts, of which the first has so few digits that its products with n
 * are exact, and exp(r) is a polynomial of degree 6, fitted for the least relative error (3e-9,
 * a twentieth of a rounding).
 *
 * Error: at most 1.1 units in the last place for -87.3 <= x <= 88.72, with or without a fused
 * multiply-add. Below, 0 instead of a subnormal number; above, infinity; NaN stays NaN.
 */
#ifndef LORA_EXP_H
#define LORA_EXP_H

#include "lanes.h"

LANE vf vf_exp(vf x)
{
    const vu all = vu_set1(0xffffffff);
    const vf rounder = vf_set1(0x1.8p23f);
    const vf sum = vf_fma(x, vf_set1(0x1.715476p0f), rounder); /* 1 / ln 2 */
    const vf n = vf_add(sum, vf_set1(-0x1.8p23f));
    vf r = vf_fma(n, vf_set1(-0x1.62e4p-1f), x); /* the first 15 bits of ln 2 */
    r = vf_fma(n, vf_set1(-0x1.7f7d1cp-20f), r);
    vf p = vf_fma(vf_set1(0x1.6a2358p-10f), r, vf_set1(0x1.123a6cp-7f));
    p = vf_fma(p, r, vf_set1(0x1.5558f4p-5f));
    p = vf_fma(p, r, vf_set1(0x1.555490p-3f));
    p = vf_fma(p, r, vf_set1(0x1.fffffcp-2f));
    p = vf_fma(vf_mul(r, r), p, r);
    p = vf_add(p, vf_set1(1.0f));
    vu bits = vu_add(vf_bits(p), vu_shl(vf_bits(sum), 23));
    /* a mask of what is not greater is 1 or 0, plus all ones */
    const vf least = vf_set1(-87.3f), most = vf_set1(0x1.62e42ep6f);
    const vu seen = vu_or(vu_if_greater(x, least, 1), vu_if_greater(most, x, 1)); /* 0 for NaN */
    bits = vu_and(bits, vu_add(vu_if_greater(least, x, 1), all));
    bits = vu_and(bits, vu_add(vu_if_greater(x, most, 1), all));
    bits = vu_or(bits, vu_if_greater(x, most, 0x7f800000));
    return vu_floats(vu_or(bits, vu_and(vu_add(seen, all), vu_set1(0x7fc00000))));
}

#endif
