/* lanes.h on AVX2, FMA and F16C: 8 lanes.
 *
 * A table of 16 floats is two registers: both halves are looked up by the low three bits of an
 * index (vpermps), and its fourth bit, moved to the sign, blends them. Tables of 16-bit numbers are
 * two of bytes, the low and the high ones, for pshufb.
 */
#include <immintrin.h>

#define LANES 8
#define LANES_NAME "avx2"
#define LANES_LOOKUPS 1

typedef __m256 vf;
typedef __m256i vu;
typedef struct {
    __m256 low, high; /* entries 0 .. 7, 8 .. 15 */
} vtable;
typedef struct {
    __m256i low, high; /* the low and the high bytes of 16 entries, twice */
} half_table;

LANE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
LANE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
LANE vf vf_set1(float x) { return _mm256_set1_ps(x); }
LANE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
LANE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
LANE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
LANE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

LANE float vf_sum(vf a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

LANE vu vu_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
LANE vu vu_set1(uint32_t x) { return _mm256_set1_epi32((int)x); }
LANE vu vu_add(vu a, vu b) { return _mm256_add_epi32(a, b); }
LANE vu vu_and(vu a, vu b) { return _mm256_and_si256(a, b); }
LANE vu vu_or(vu a, vu b) { return _mm256_or_si256(a, b); }
LANE vu vu_max(vu a, vu b) { return _mm256_max_epu32(a, b); }
LANE vu vu_shl(vu a, int bits) { return _mm256_slli_epi32(a, bits); }
LANE vu vf_bits(vf a) { return _mm256_castps_si256(a); }
LANE vf vu_floats(vu a) { return _mm256_castsi256_ps(a); }

LANE uint32_t vu_maximum(vu a)
{
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1)));
}

LANE vu vu_lane_over(int step)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_srl_epi32(lane, _mm_cvtsi32_si128(__builtin_ctz((unsigned)step)));
}

LANE vu vu_if_greater(vf a, vf b, uint32_t value)
{
    const __m256i mask = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
    return _mm256_and_si256(mask, _mm256_set1_epi32((int)value));
}

LANE vu vu_append(vu u, vf a, vf b)
{
    const __m256i mask = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(u, u), mask); /* a set mask is -1 */
}

/* The low words of 8 lanes, all below 2^16, in order. */
LANE __m128i lanes_words(__m256i a)
{
    return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

LANE void vu_store_bytes(uint8_t *p, vu a)
{
    const __m128i words = lanes_words(_mm256_and_si256(a, _mm256_set1_epi32(255)));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}

LANE vf vf_load_bf16(const uint16_t *p)
{
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

LANE vf vf_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

LANE vf vf_load_f64(const double *p)
{
    const __m128 low = _mm256_cvtpd_ps(_mm256_loadu_pd(p));
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)), low);
}

LANE void vf_store_bf16(uint16_t *p, vf a)
{
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128((__m128i *)p, lanes_words(up));
}

LANE void vf_store_f16(uint16_t *p, vf a)
{
    const __m128i half = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)p, half);
}

LANE vf vf_gather256(const float *table, const uint8_t *index)
{
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)index);
    return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(bytes), 4);
}

LANE vf vf_pick(const float *s, vu which)
{
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(s)), which);
}

LANE vf vf_pick8(const float *s, vu which)
{
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(s), which);
}

/* Shuffles stay within 128 bits, so the quarters come out in the order a b a b. */
LANE vf lanes_quarters(vf a)
{
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
}

LANE void vf_unzip(vf a, vf b, vf *even, vf *odd)
{
    *even = lanes_quarters(_mm256_shuffle_ps(a, b, 0x88));
    *odd = lanes_quarters(_mm256_shuffle_ps(a, b, 0xdd));
}

LANE vtable vtable_load(const float *t)
{
    const vtable table = {_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8)};
    return table;
}

/* By the low three bits of `index`, and the sign of `side`. */
LANE vf lanes_blend(vtable t, __m256i index, __m256i side)
{
    const __m256 low = _mm256_permutevar8x32_ps(t.low, index);
    const __m256 high = _mm256_permutevar8x32_ps(t.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(side));
}

LANE vf vf_lookup(vtable t, vu index)
{
    return lanes_blend(t, index, _mm256_slli_epi32(index, 28));
}

LANE vf vf_nibble(vtable t, vu words, int j)
{
    return lanes_blend(t, _mm256_srli_epi32(words, 4 * j), _mm256_slli_epi32(words, 28 - 4 * j));
}

LANE half_table half_table_load(const uint16_t *t)
{
    const __m128i first = _mm_loadu_si128((const __m128i *)t);
    const __m128i second = _mm_loadu_si128((const __m128i *)(t + 8));
    const __m128i byte = _mm_set1_epi16(255);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    const half_table table = {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
    return table;
}

/* 32 indices, a byte each, in order. */
LANE __m256i lanes_indices(const uint8_t *codes)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)codes), mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i odd = _mm_and_si128(bytes, mask);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

LANE void half_expand32(half_table t, const uint8_t *codes, uint16_t *out, int stream)
{
    const __m256i index = lanes_indices(codes);
    const __m256i low = _mm256_shuffle_epi8(t.low, index);
    const __m256i high = _mm256_shuffle_epi8(t.high, index);
    const __m256i even = _mm256_unpacklo_epi8(low, high); /* entries 0 .. 7 and 16 .. 23 */
    const __m256i odd = _mm256_unpackhi_epi8(low, high);
    const __m256i first = _mm256_permute2x128_si256(even, odd, 0x20);
    const __m256i second = _mm256_permute2x128_si256(even, odd, 0x31);
    if (stream) {
        _mm256_stream_si256((__m256i *)out, first);
        _mm256_stream_si256((__m256i *)(out + 16), second);
    } else {
        _mm256_storeu_si256((__m256i *)out, first);
        _mm256_storeu_si256((__m256i *)(out + 16), second);
    }
}

LANE void float_expand32(vtable t, const uint8_t *codes, float *out, int stream)
{
    const __m256i index = lanes_indices(codes);
    __m128i part[2] = {_mm256_castsi256_si128(index), _mm256_extracti128_si256(index, 1)};
    for (int i = 0; i < 4; i++) {
        const __m128i bytes = i % 2 ? _mm_unpackhi_epi64(part[i / 2], part[i / 2]) : part[i / 2];
        const __m256 values = vf_lookup(t, _mm256_cvtepu8_epi32(bytes));
        if (stream)
            _mm256_stream_ps(out + 8 * i, values);
        else
            _mm256_storeu_ps(out + 8 * i, values);
    }
}

LANE void lanes_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
LANE void lanes_fence(void) { _mm_sfence(); }
