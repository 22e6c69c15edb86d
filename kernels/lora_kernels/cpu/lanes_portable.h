/* lanes.h in plain C: 8 lanes in arrays, for processors that no other file knows.
 *
 * Little-endian processors only, which the loader checks: words are read as they lie in memory.
 */
#define LANES 8
#define LANES_NAME "portable"

typedef struct {
    float at[LANES];
} vf;
typedef struct {
    uint32_t at[LANES];
} vu;
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

LANE vf vf_set1(float x)
{
    vf a;
    EACH a.at[i] = x;
    return a;
}

LANE vf vf_add(vf a, vf b)
{
    EACH a.at[i] += b.at[i];
    return a;
}

LANE vf vf_sub(vf a, vf b)
{
    EACH a.at[i] -= b.at[i];
    return a;
}

LANE vf vf_mul(vf a, vf b)
{
    EACH a.at[i] *= b.at[i];
    return a;
}

LANE vf vf_div(vf a, vf b)
{
    EACH a.at[i] /= b.at[i];
    return a;
}

LANE vf vf_fma(vf a, vf b, vf c)
{
    EACH c.at[i] += a.at[i] * b.at[i];
    return c;
}

LANE float vf_sum(vf a)
{
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            a.at[i] += a.at[i + half];
    return a.at[0];
}

LANE vu vu_load(const void *p)
{
    vu a;
    memcpy(&a, p, sizeof a);
    return a;
}

LANE vu vu_set1(uint32_t x)
{
    vu a;
    EACH a.at[i] = x;
    return a;
}

LANE vu vu_add(vu a, vu b)
{
    EACH a.at[i] += b.at[i];
    return a;
}

LANE vu vu_and(vu a, vu b)
{
    EACH a.at[i] &= b.at[i];
    return a;
}

LANE vu vu_or(vu a, vu b)
{
    EACH a.at[i] |= b.at[i];
    return a;
}

LANE vu vu_max(vu a, vu b)
{
    EACH a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return a;
}

LANE vu vu_shr(vu a, int bits)
{
    EACH a.at[i] >>= bits;
    return a;
}

LANE vu vu_shl(vu a, int bits)
{
    EACH a.at[i] <<= bits;
    return a;
}

LANE uint32_t vu_maximum(vu a)
{
    uint32_t most = 0;
    EACH most = a.at[i] > most ? a.at[i] : most;
    return most;
}

LANE vu vu_lane_over(int step)
{
    vu a;
    EACH a.at[i] = (uint32_t)(i / step);
    return a;
}

LANE vu vf_bits(vf a)
{
    vu b;
    memcpy(&b, &a, sizeof b);
    return b;
}

LANE vf vu_floats(vu a)
{
    vf b;
    memcpy(&b, &a, sizeof b);
    return b;
}

LANE vu vu_if_greater(vf a, vf b, uint32_t value)
{
    vu c;
    EACH c.at[i] = a.at[i] > b.at[i] ? value : 0;
    return c;
}

LANE vu vu_append(vu u, vf a, vf b)
{
    EACH u.at[i] = 2 * u.at[i] + (a.at[i] > b.at[i]);
    return u;
}

LANE void vu_store_bytes(uint8_t *p, vu a) { EACH p[i] = (uint8_t)a.at[i]; }

LANE vf vf_load_bf16(const uint16_t *p)
{
    uint16_t words[LANES]; /* copied, as p may be at an odd address */
    vu a;
    memcpy(words, p, sizeof words);
    EACH a.at[i] = (uint32_t)words[i] << 16;
    return vu_floats(a);
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

LANE uint16_t lanes_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

LANE vf vf_load_f16(const uint16_t *p)
{
    uint16_t words[LANES];
    vf a;
    memcpy(words, p, sizeof words);
    EACH a.at[i] = lanes_from_f16(words[i]);
    return a;
}

LANE vf vf_load_f64(const double *p)
{
    double values[LANES];
    vf a;
    memcpy(values, p, sizeof values);
    EACH a.at[i] = (float)values[i];
    return a;
}

LANE void vf_store_bf16(uint16_t *p, vf a)
{
    uint16_t words[LANES];
    EACH words[i] = lanes_to_bf16(a.at[i]);
    memcpy(p, words, sizeof words);
}

LANE void vf_store_f16(uint16_t *p, vf a)
{
    uint16_t words[LANES];
    EACH words[i] = lanes_to_f16(a.at[i]);
    memcpy(p, words, sizeof words);
}

LANE vf vf_gather256(const float *table, const uint8_t *index)
{
    vf a;
    EACH memcpy(&a.at[i], table + index[i], sizeof(float));
    return a;
}

LANE vf vf_pick(const float *s, vu which)
{
    vf a;
    EACH a.at[i] = s[which.at[i]];
    return a;
}

LANE vf vf_pick8(const float *s, vu which) { return vf_pick(s, which); }

LANE void vf_unzip(vf a, vf b, vf *even, vf *odd)
{
    for (int i = 0; i < LANES / 2; i++) {
        even->at[i] = a.at[2 * i];
        odd->at[i] = a.at[2 * i + 1];
        even->at[i + LANES / 2] = b.at[2 * i];
        odd->at[i + LANES / 2] = b.at[2 * i + 1];
    }
}

LANE vtable vtable_load(const float *t)
{
    vtable table;
    memcpy(&table, t, sizeof table);
    return table;
}

LANE vf vf_lookup(vtable t, vu index)
{
    vf a;
    EACH a.at[i] = t.at[index.at[i]];
    return a;
}

LANE vf vf_nibble(vtable t, vu words, int j)
{
    vf a;
    EACH a.at[i] = t.at[words.at[i] >> 4 * j & 15];
    return a;
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
