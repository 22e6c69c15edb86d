/* Quantize to 4-bit blocks: floats to codes, two a byte, and one float32 scale a block.
 *
 * A weight is read once from memory and once more from the first-level cache, which the largest
 * block (4096 elements) fits: the first pass finds the block's largest magnitude, the second
 * divides by it and finds the codes. 2.6 bytes of memory traffic a weight of bfloat16, and with
 * AVX-512 about 53 instructions for 32 weights.
 *
 * The largest magnitude is looked for among the bits, as integers. They order like the magnitudes,
 * and infinity and NaN are above all numbers, so the maximum also tells whether all is finite.
 *
 * A code is the number of midpoints of the sorted table that lie strictly below the quotient, found
 * by four comparisons. Each appends a bit to an index, and the index picks what to compare with
 * next from 1, 2, 4 and 8 midpoints: tables so small that a lookup is one instruction everywhere.
 * (bitsandbytes asks 15 scalar comparisons of each element; the definition cuts [-1, 1] into cells,
 * tables of thousands of entries, which vectors can only gather from.) A table that is not
 * ascending takes one more lookup, from rank to code.
 *
 * The two elements of a byte should come to lie in one lane. Numbers of bfloat16 do by themselves,
 * as the halves of a 32-bit word, and are never widened. Others are unzipped.
 *
 * Bit-equal to the definition (blockwise4_reference.py): full blocks are multiplied by the rounded
 * reciprocal, a partial last block is divided. That one is padded with zeros, which change no
 * maximum and fill the nibble left over with the code of 0, as they should.
 */
#include <stdatomic.h>

#include "lanes.h"
#include "pool.h"
#include "weight4.h"

enum { STEP = 2 * LANES, LARGEST_BLOCK = 4096 };
enum { PIECE = 1 << 16 }; /* elements that a thread claims at once */

static const uint32_t INFINITE = 0x7f800000;

typedef struct {
    float first;     /* midpoint 7 of the 15 */
    float second[4]; /* 3, 11 */
    float third[4];  /* 1, 5, 9, 13 */
    float fourth[8]; /* 0, 2, .. 14 */
    float code[16];  /* of each rank; integers in the bits of floats, for vf_lookup */
    int ascending;   /* the code is the rank */
} searched;

typedef struct {
    const uint8_t *x;
    int64_t block;
    searched table;
    uint8_t *codes;
    float *scales;
    atomic_int bad; /* something is not finite */
} job;

/* --- the table ------------------------------------------------------------------------------- */

/* Sort, equal entries in the order they stand in, the first of which then has the code. */
static void sort_table(const float *table, float *values, uint32_t *codes)
{
    for (uint32_t i = 0; i < 16; i++) {
        uint32_t at = i;
        for (; at > 0 && values[at - 1] > table[i]; at--) {
            values[at] = values[at - 1];
            codes[at] = codes[at - 1];
        }
        values[at] = table[i];
        codes[at] = i;
    }
    for (int i = 1; i < 16; i++)
        if (values[i] == values[i - 1])
            codes[i] = codes[i - 1];
}

static searched prepare(const float *table)
{
    searched s = {0};
    float given[16], values[16], middle[15];
    uint32_t codes[16];
    memcpy(given, table, sizeof given);
    sort_table(given, values, codes);
    memcpy(s.code, codes, sizeof codes);
    s.ascending = 1;
    for (uint32_t i = 0; i < 16; i++)
        s.ascending &= codes[i] == i;
    for (int i = 0; i < 15; i++)
        middle[i] = (values[i] + values[i + 1]) / 2;
    s.first = middle[7];
    for (int i = 0; i < 2; i++)
        s.second[i] = middle[8 * i + 3];
    for (int i = 0; i < 4; i++)
        s.third[i] = middle[4 * i + 1];
    for (int i = 0; i < 8; i++)
        s.fourth[i] = middle[2 * i];
    return s;
}

/* In plain C comparing with all midpoints takes fewer instructions than loads for each lane. */
LANE vu count_below(const searched *s, vf quotient)
{
    vu below = vu_if_greater(quotient, vf_set1(s->first), 1);
    for (int i = 0; i < 2; i++)
        below = vu_add(below, vu_if_greater(quotient, vf_set1(s->second[i]), 1));
    for (int i = 0; i < 4; i++)
        below = vu_add(below, vu_if_greater(quotient, vf_set1(s->third[i]), 1));
    for (int i = 0; i < 8; i++)
        below = vu_add(below, vu_if_greater(quotient, vf_set1(s->fourth[i]), 1));
    return below;
}

LANE vu search(const searched *s, vf quotient)
{
    vu rank = vu_append(vu_set1(0), quotient, vf_set1(s->first));
    rank = vu_append(rank, quotient, vf_pick(s->second, rank));
    rank = vu_append(rank, quotient, vf_pick(s->third, rank));
    return vu_append(rank, quotient, vf_pick8(s->fourth, rank));
}

LANE vu find_codes(const searched *s, vf quotient)
{
    const vu rank = LANES_LOOKUPS ? search(s, quotient) : count_below(s, quotient);
    return s->ascending ? rank : vf_bits(vf_lookup(vtable_load(s->code), rank));
}

/* --- one block ------------------------------------------------------------------------------- */

/* STEP elements as float32: the even and the odd ones of bfloat16, else the first half and the
 * second. */
LANE void read_two(const uint8_t *x, int dtype, vf *a, vf *b)
{
    const uint8_t *half = x + LANES * bytes_of(dtype);
    if (dtype == LORA_BFLOAT16) {
        const vu words = vu_load(x);
        *a = vu_floats(vu_shl(words, 16));
        *b = vu_floats(vu_and(words, vu_set1(0xffff0000)));
    } else if (dtype == LORA_FLOAT16) {
        *a = vf_load_f16((const uint16_t *)x);
        *b = vf_load_f16((const uint16_t *)half);
    } else if (dtype == LORA_FLOAT32) {
        *a = vf_load((const float *)x);
        *b = vf_load((const float *)half);
    } else {
        *a = vf_load_f64((const double *)x);
        *b = vf_load_f64((const double *)half);
    }
}

/* The bits of the largest magnitude of `count` elements, a multiple of STEP. */
LANE uint32_t largest(const uint8_t *x, int64_t count, int dtype)
{
    const vu magnitude = vu_set1(0x7fffffff);
    vu most_a = vu_set1(0), most_b = vu_set1(0);
    for (int64_t i = 0; i < count; i += STEP) {
        vf a, b;
        read_two(x + i * bytes_of(dtype), dtype, &a, &b);
        most_a = vu_max(most_a, vu_and(vf_bits(a), magnitude));
        most_b = vu_max(most_b, vu_and(vf_bits(b), magnitude));
    }
    return vu_maximum(vu_max(most_a, most_b));
}

/* Write the codes of `count` elements, a multiple of STEP; `divide` as a partial block does. */
LANE void encode(const searched *s, const uint8_t *x, int64_t count, int dtype, float bound,
                 int divide, uint8_t *codes)
{
    const vf divisor = vf_set1(bound), factor = vf_set1(1.0f / bound);
    for (int64_t i = 0; i < count; i += STEP) {
        vf a, b;
        read_two(x + i * bytes_of(dtype), dtype, &a, &b);
        if (dtype != LORA_BFLOAT16)
            vf_unzip(a, b, &a, &b);
        const vu high = find_codes(s, divide ? vf_div(a, divisor) : vf_mul(a, factor));
        const vu low = find_codes(s, divide ? vf_div(b, divisor) : vf_mul(b, factor));
        vu_store_bytes(codes + i / 2, vu_or(vu_shl(high, 4), low));
    }
}

LANE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* --- all of them ----------------------------------------------------------------------------- */

LANE void full_blocks(job *j, int64_t begin, int64_t end, int dtype)
{
    const searched table = j->table; /* a copy of our own: no store to codes can change it */
    const int64_t block = j->block;
    for (int64_t i = begin; i < end; i++) {
        const uint8_t *x = j->x + i * block * bytes_of(dtype);
        const uint32_t bits = largest(x, block, dtype);
        const float absmax = float_of(bits);
        if (bits >= INFINITE)
            atomic_store_explicit(&j->bad, 1, memory_order_relaxed);
        encode(&table, x, block, dtype, absmax < TINY ? TINY : absmax, 0, j->codes + i * block / 2);
        j->scales[i] = absmax;
    }
}

/* The last block, of fewer elements than others. Not timed: the type is asked at each step. */
static void partial_block(job *j, int64_t i, int64_t count, int dtype)
{
    uint8_t x[LARGEST_BLOCK * 8] = {0}, codes[LARGEST_BLOCK / 2];
    const int64_t padded = (count + STEP - 1) / STEP * STEP;
    memcpy(x, j->x + i * j->block * bytes_of(dtype), (size_t)(count * bytes_of(dtype)));
    const uint32_t bits = largest(x, padded, dtype);
    const float absmax = float_of(bits), bound = absmax < TINY ? TINY : absmax;
    if (bits >= INFINITE)
        atomic_store_explicit(&j->bad, 1, memory_order_relaxed);
    encode(&j->table, x, padded, dtype, bound, 1, codes);
    memcpy(j->codes + i * j->block / 2, codes, (size_t)((count + 1) / 2));
    j->scales[i] = bits ? bound : 0.0f;
}

static void blocks_float32(void *j, int64_t begin, int64_t end)
{
    full_blocks(j, begin, end, LORA_FLOAT32);
}

static void blocks_bfloat16(void *j, int64_t begin, int64_t end)
{
    full_blocks(j, begin, end, LORA_BFLOAT16);
}

static void blocks_float16(void *j, int64_t begin, int64_t end)
{
    full_blocks(j, begin, end, LORA_FLOAT16);
}

static void blocks_float64(void *j, int64_t begin, int64_t end)
{
    full_blocks(j, begin, end, LORA_FLOAT64);
}

/* Quantize `count` elements of `dtype` at x in blocks of `block`, a power of two from 32 to 4096.
 *
 * table   16 floats, the value of each code, in any order
 * codes   ceil(count / 2) bytes, written
 * scales  ceil(count / block) floats, written
 * flag    set to 1 if an element is not finite, else left as it is; or NULL
 *
 * Returns 0.
 */
LORA_EXPORT int lora_quantize4(int threads, int dtype, const void *x, int64_t count, int64_t block,
                               const float *table, uint8_t *codes, float *scales, int32_t *flag)
{
    static task *const run[] = {[LORA_FLOAT32] = blocks_float32,
                                [LORA_BFLOAT16] = blocks_bfloat16,
                                [LORA_FLOAT16] = blocks_float16,
                                [LORA_FLOAT64] = blocks_float64};
    job j = {.x = x, .block = block, .table = prepare(table), .codes = codes, .scales = scales};
    const int64_t whole = count / block;
    const int failed = parallel_for(threads, whole, PIECE / block, run[dtype], &j);
    if (failed)
        return failed;
    if (count % block)
        partial_block(&j, whole, count % block, dtype);
    if (flag && atomic_load(&j.bad)) {
        const int32_t one = 1;
        memcpy(flag, &one, sizeof one);
    }
    return 0;
}
