/* Vectors of 32-bit lanes: what the operators need of an instruction set, and nothing else.
 *
 * Every operator is written once, on these functions; each instruction set has a file that says
 * what they are on it. LANES is 16 with AVX-512, 8 with AVX2, 4 with NEON and in plain C. The
 * compiler's flags choose.
 *
 *   vf, vu          LANES floats, LANES unsigned integers
 *   vtable          16 floats to look up by a 4-bit index, in registers
 *   half_table      16 numbers of 16 bits, likewise
 *
 * LANES_LOOKUPS is 1 where a table lies in registers, 0 where a lookup is a load for each lane.
 *
 * No pointer need be aligned, except where `stream` is set.
 *
 *   vf_load, vf_store, vf_set1(x), vf_add, vf_mul, vf_div, vf_sum(a) -> float
 *   vf_fma(a, b, c)              a b + c, rounded once where the hardware can, so not for results
 *                                that have to be equal to the bit everywhere
 *   vf_load_bf16, vf_load_f16    from LANES numbers of 16 bits
 *   vf_load_f64                  from LANES doubles, rounded to nearest even
 *   vf_store_bf16, vf_store_f16  rounded to nearest even; subnormals kept, unlike vcvtneps2bf16
 *   vf_gather256(table, index)   table[index[lane]], of 256 floats, by LANES bytes
 *   vf_unzip(a, b, &even, &odd)  of the 2 LANES numbers that a and then b hold
 *   vf_pick(s, which)            s[which[lane]], which < 4; may read s[0 .. 3]
 *   vf_pick8(s, which)           the same, which < 8; may read s[0 .. 7]
 *   vu_load(pointer)             LANES little-endian words
 *   vu_set1, vu_add, vu_and, vu_or, vu_max (of values below 2^31)
 *   vu_shl(a, bits)
 *   vu_lane_over(step)           lane / step; step a power of two
 *   vu_maximum(a) -> uint32_t    over lanes, of values below 2^31
 *   vu_store_bytes(to, a)        the lowest byte of each lane
 *   vf_bits, vu_floats           the same bits as the other type
 *   vu_if_greater(a, b, value)   value where a > b, else 0: also where either is NaN
 *   vu_append(u, a, b)           2 u + 1 where a > b, else 2 u: also where either is NaN
 *   vtable_load(const float[16]), vf_lookup(table, index < 16)
 *   vf_nibble(table, words, j)   table[words >> 4 j & 15], j in 0 .. 7
 *   half_table_load(const uint16_t[16])
 *   half_expand32(table, codes, out, stream)    16 bytes of codes to 32 entries, in order
 *   float_expand32(table, codes, out, stream)   the same, floats
 *   lanes_prefetch(pointer)      bring a cache line in; the address may be anything
 *   lanes_fence()                after stores with `stream`, before others may read
 *
 * `stream` writes past the caches, for results larger than they are: `out` is then aligned to 64.
 */
#ifndef LORA_LANES_H
#define LORA_LANES_H

#include <stdint.h>
#include <string.h>

#define LANE static inline __attribute__((always_inline, unused))

#if defined(LORA_PORTABLE)
#include "lanes_portable.h"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) &&                    \
    defined(__AVX512DQ__)
#include "lanes_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"
#elif defined(__aarch64__)
#include "lanes_neon.h"
#else
#include "lanes_portable.h"
#endif

#endif
