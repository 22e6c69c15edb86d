/* lanes.h on AVX-512 (F, BW, VL, DQ): 16 lanes.
 *
 * A table of 16 floats is one register and a lookup one vpermps, which reads the low four bits of
 * each index and needs no masking. vpermw reads five: a table of 16 numbers is held twice.
 */
#include <immintrin.h>

#define LANES 16
#define LANES_NAME "avx512"
#define LANES_LOOKUPS 1

typedef __m512 vf;
typedef __m512i vu;
typedef __m512 vtable;
typedef __m512i half_table;

LANE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
LANE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
LANE vf vf_set1(float x) { return _mm512_set1_ps(x); }
LANE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
LANE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
LANE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
LANE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LANE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }

LANE vu vu_load(const void *p) { return _mm512_loadu_si512(p); }
LANE vu vu_set1(uint32_t x) { return _mm512_set1_epi32((int)x); }
LANE vu vu_add(vu a, vu b) { return _mm512_add_epi32(a, b); }
LANE vu vu_and(vu a, vu b) { return _mm512_and_si512(a, b); }
LANE vu vu_or(vu a, vu b) { return _mm512_or_si512(a, b); }
LANE vu vu_max(vu a, vu b) { return _mm512_max_epu32(a, b); }
LANE vu vu_shl(vu a, int bits) { return _mm512_slli_epi32(a, (unsigned)bits); }
LANE uint32_t vu_maximum(vu a) { return _mm512_reduce_max_epu32(a); }
LANE vu vf_bits(vf a) { return _mm512_castps_si512(a); }
LANE vf vu_floats(vu a) { return _mm512_castsi512_ps(a); }

LANE vu vu_lane_over(int step)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_srl_epi32(lane, _mm_cvtsi32_si128(__builtin_ctz((unsigned)step)));
}

LANE vu vu_if_greater(vf a, vf b, uint32_t value)
{
    return _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), (int)value);
}

LANE vu vu_append(vu u, vf a, vf b)
{
    const __m512i twice = _mm512_add_epi32(u, u);
    const __mmask16 greater = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(twice, greater, twice, _mm512_set1_epi32(1));
}

LANE void vu_store_bytes(uint8_t *p, vu a)
{
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a));
}

LANE vf vf_load_bf16(const uint16_t *p)
{
    const __m256i words = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

LANE vf vf_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

LANE vf vf_load_f64(const double *p)
{
    const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(p));
    const __m256 high = _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

LANE void vf_store_bf16(uint16_t *p, vf a)
{
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    up = _mm512_mask_set1_epi32(_mm512_srli_epi32(up, 16), nan, 0x7fc0);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(up));
}

LANE void vf_store_f16(uint16_t *p, vf a)
{
    const __m256i half = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)p, half);
}

LANE vf vf_gather256(const float *table, const uint8_t *index)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)index);
    return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), table, 4);
}

LANE vf vf_pick(const float *s, vu which)
{
    return _mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_loadu_ps(s)));
}

LANE vf vf_pick8(const float *s, vu which)
{
    return _mm512_permutexvar_ps(which, _mm512_castps256_ps512(_mm256_loadu_ps(s)));
}

LANE void vf_unzip(vf a, vf b, vf *even, vf *odd)
{
    const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                            30);
    *even = _mm512_permutex2var_ps(a, first, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(1)), b);
}

LANE vtable vtable_load(const float *t) { return _mm512_loadu_ps(t); }
LANE vf vf_lookup(vtable t, vu index) { return _mm512_permutexvar_ps(index, t); }
LANE vf vf_nibble(vtable t, vu words, int j)
{
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, (unsigned)(4 * j)), t);
}

LANE half_table half_table_load(const uint16_t *t)
{
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)t));
}

LANE void half_expand32(half_table t, const uint8_t *codes, uint16_t *out, int stream)
{
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    /* of each pair of words the first becomes the high nibble, the second the whole byte, of
     * which vpermw reads five bits: the low nibble, and one that chooses between equal halves */
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    const __m512i words = _mm512_permutexvar_epi16(index, t);
    if (stream)
        _mm512_stream_si512((__m512i *)out, words);
    else
        _mm512_storeu_si512(out, words);
}

LANE void float_expand32(vtable t, const uint8_t *codes, float *out, int stream)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)codes);
    for (int half = 0; half < 2; half++) {
        const __m512i byte = _mm512_cvtepu8_epi64(half ? _mm_unpackhi_epi64(bytes, bytes) : bytes);
        const __m512i index =
            _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
        const __m512 values = _mm512_permutexvar_ps(index, t);
        if (stream)
            _mm512_stream_ps(out + 16 * half, values);
        else
            _mm512_storeu_ps(out + 16 * half, values);
    }
}

LANE void lanes_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
LANE void lanes_fence(void) { _mm_sfence(); }
