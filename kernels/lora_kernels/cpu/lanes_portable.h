/* lanes.h in plain C: 4 lanes, for processors that no other file knows.
 *
 * The lanes are vectors of 16 bytes as GCC and Clang have them for every processor: what it can do
 * four at a time is done so, and the rest one by one. (Structs of arrays would need no extension,
 * but compilers take them apart into single numbers and do not put those together again: a third of
 * the speed and three times the code.) A lookup is a load for each lane, so LANES_LOOKUPS is 0.
 *
 * Little-endian processors only, which the loader checks: words are read as they lie in memory.
 */
#define LANES 4
#define LANES_NAME "portable"
#define LANES_LOOKUPS 0

typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef int32_t lanes_mask __attribute__((vector_size(16)));
typedef struct {
    float at[16];
} vtable;
typedef struct {
    uint16_t at[16];
} half_table;

#define EACH for (int i = 0; i < LANES; i++)

LANE vf vf_load(const float *p)
{
    vf a;
    memcpy(&a, p, sizeof a);
    return a;
}

LANE void vf_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
LANE vf vf_set1(float x) { return (vf){x, x, x, x}; }
LANE vf vf_add(vf a, vf b) { return a + b; }
LANE vf vf_mul(vf a, vf b) { return a * b; }
LANE vf vf_div(vf a, vf b) { return a / b; }
LANE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
LANE float vf_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }

LANE vu vu_load(const void *p)
{
    vu a;
    memcpy(&a, p, sizeof a);
    return a;
}

LANE vu vu_set1(uint32_t x) { return (vu){x, x, x, x}; }
LANE vu vu_add(vu a, vu b) { return a + b; }
LANE vu vu_and(vu a, vu b) { return a & b; }
LANE vu vu_or(vu a, vu b) { return a | b; }
LANE vu vu_shl(vu a, int bits) { return a << (uint32_t)bits; }
LANE vu vu_lane_over(int step) { return (vu){0, 1, 2, 3} / (uint32_t)step; }
LANE vu vf_bits(vf a) { return (vu)a; }
LANE vf vu_floats(vu a) { return (vf)a; }

LANE vu vu_max(vu a, vu b) /* below 2^31, and more processors compare signed numbers */
{
    const vu greater = (vu)((lanes_mask)a > (lanes_mask)b);
    return (a & greater) | (b & ~greater);
}

LANE uint32_t vu_maximum(vu a)
{
    uint32_t most = 0;
    EACH most = a[i] > most ? a[i] : most;
    return most;
}

/* A set mask is -1. */
LANE vu vu_if_greater(vf a, vf b, uint32_t value) { return (vu)(a > b) & vu_set1(value); }
LANE vu vu_append(vu u, vf a, vf b) { return u + u - (vu)(a > b); }

LANE void vu_store_bytes(uint8_t *p, vu a)
{
    const vu byte = a & vu_set1(255);
    const uint32_t bytes = byte[0] | byte[1] << 8 | byte[2] << 16 | byte[3] << 24;
    memcpy(p, &bytes, sizeof bytes);
}

LANE vf vf_load_bf16(const uint16_t *p)
{
    uint16_t w[LANES]; /* copied, as p may be at an odd address */
    memcpy(w, p, sizeof w);
    return vu_floats(vu_shl((vu){w[0], w[1], w[2], w[3]}, 16));
}

LANE float lanes_from_f16(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t bits = sign | (rest << 13);
    float value;
    if (rest >= 0x7c00) { /* infinity and NaN */
        bits |= 0x7f800000;
    } else if (rest >= 0x0400) {
        bits += (127 - 15) << 23;
    } else { /* subnormal: a multiple of 2^-24, exact in a float */
        value = (float)rest * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    }
    memcpy(&value, &bits, 4);
    return value;
}

LANE uint16_t lanes_to_f16(float value)
{
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return (uint16_t)(sign | 0x7e00); /* NaN */
    if (bits >= 0x477ff000)               /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) { /* below 2^-14: the sum's last bit is worth 2^-24, and it rounds */
        float small;
        memcpy(&small, &bits, 4);
        small += 0.5f;
        memcpy(&bits, &small, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1) - ((127 - 15) << 23);
    return (uint16_t)(sign | bits >> 13);
}

LANE vf vf_load_f16(const uint16_t *p)
{
    uint16_t words[LANES];
    vf a = {0};
    memcpy(words, p, sizeof words);
    EACH a[i] = lanes_from_f16(words[i]);
    return a;
}

LANE vf vf_load_f64(const double *p)
{
    double values[LANES];
    vf a = {0};
    memcpy(values, p, sizeof values);
    EACH a[i] = (float)values[i];
    return a;
}

LANE void vf_store_bf16(uint16_t *p, vf a)
{
    const vu bits = vf_bits(a), up = bits + (bits >> 16 & 1) + 0x7fff, nan = (vu)(a != a);
    const vu words = (up >> 16 & ~nan) | (nan & 0x7fc0);
    const uint64_t all = words[0] | words[1] << 16 | (uint64_t)(words[2] | words[3] << 16) << 32;
    memcpy(p, &all, sizeof all);
}

LANE void vf_store_f16(uint16_t *p, vf a)
{
    uint16_t words[LANES];
    EACH words[i] = lanes_to_f16(a[i]);
    memcpy(p, words, sizeof words);
}

LANE vf vf_gather256(const float *table, const uint8_t *index)
{
    float values[LANES];
    EACH memcpy(values + i, table + index[i], sizeof *values);
    return vf_load(values);
}

LANE vf vf_pick(const float *s, vu which)
{
    return (vf){s[which[0]], s[which[1]], s[which[2]], s[which[3]]};
}

LANE vf vf_pick8(const float *s, vu which) { return vf_pick(s, which); }

LANE void vf_unzip(vf a, vf b, vf *even, vf *odd)
{
    *even = (vf){a[0], a[2], b[0], b[2]};
    *odd = (vf){a[1], a[3], b[1], b[3]};
}

LANE vtable vtable_load(const float *t)
{
    vtable table;
    memcpy(&table, t, sizeof table);
    return table;
}

LANE vf vf_lookup(vtable t, vu index) { return vf_pick(t.at, index); }
LANE vf vf_nibble(vtable t, vu words, int j)
{
    return vf_pick(t.at, words >> 4 * (uint32_t)j & 15);
}

LANE half_table half_table_load(const uint16_t *t)
{
    half_table table;
    memcpy(&table, t, sizeof table);
    return table;
}

LANE void half_expand32(half_table t, const uint8_t *codes, uint16_t *out, int stream)
{
    uint16_t values[32];
    (void)stream;
    for (int i = 0; i < 16; i++) {
        values[2 * i] = t.at[codes[i] >> 4];
        values[2 * i + 1] = t.at[codes[i] & 15];
    }
    memcpy(out, values, sizeof values);
}

LANE void float_expand32(vtable t, const uint8_t *codes, float *out, int stream)
{
    float values[32];
    (void)stream;
    for (int i = 0; i < 16; i++) {
        values[2 * i] = t.at[codes[i] >> 4];
        values[2 * i + 1] = t.at[codes[i] & 15];
    }
    memcpy(out, values, sizeof values);
}

LANE void lanes_prefetch(const void *p) { __builtin_prefetch(p); }
LANE void lanes_fence(void) {}
