/* lanes.h on NEON of 64-bit Arm: 4 lanes.
 *
 * The only lookup, tbl, is one of bytes: 16 indices at a time. So 16 floats are four tables of 16
 * bytes, the lowest of each entry, the next, .., and what was looked up is put together to floats
 * by zips: 27 instructions for 32 codes. Indices that lie in lanes already take another way: the
 * table as it lies in memory is 64 bytes in four registers, and entry c is bytes 4 c .. 4 c + 3.
 *
 * Never timed: compiled for every change and run in an emulator.
 */
#include <arm_neon.h>

#define LANES 4
#define LANES_NAME "neon"
#define LANES_LOOKUPS 1

typedef float32x4_t vf;
typedef uint32x4_t vu;
typedef struct {
    uint8x16_t byte0, byte1, byte2, byte3; /* of each entry */
    uint8x16_t row0, row1, row2, row3;     /* entries 0 .. 3, 4 .. 7, ..; costs nothing unused */
} vtable;
typedef struct {
    uint8x16_t low, high; /* the low and the high bytes of 16 entries */
} half_table;

LANE vf vf_load(const float *p) { return vld1q_f32(p); }
LANE void vf_store(float *p, vf a) { vst1q_f32(p, a); }
LANE vf vf_set1(float x) { return vdupq_n_f32(x); }
LANE vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
LANE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
LANE vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
LANE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
LANE float vf_sum(vf a) { return vaddvq_f32(a); }

LANE vu vu_load(const void *p) { return vreinterpretq_u32_u8(vld1q_u8((const uint8_t *)p)); }
LANE vu vu_set1(uint32_t x) { return vdupq_n_u32(x); }
LANE vu vu_add(vu a, vu b) { return vaddq_u32(a, b); }
LANE vu vu_and(vu a, vu b) { return vandq_u32(a, b); }
LANE vu vu_or(vu a, vu b) { return vorrq_u32(a, b); }
LANE vu vu_max(vu a, vu b) { return vmaxq_u32(a, b); }
LANE vu vu_shl(vu a, int bits) { return vshlq_u32(a, vdupq_n_s32(bits)); }
LANE uint32_t vu_maximum(vu a) { return vmaxvq_u32(a); }
LANE vu vf_bits(vf a) { return vreinterpretq_u32_f32(a); }
LANE vf vu_floats(vu a) { return vreinterpretq_f32_u32(a); }

LANE vu vu_lane_over(int step)
{
    const uint32_t lane[4] = {0, 1, 2, 3};
    return vshlq_u32(vld1q_u32(lane), vdupq_n_s32(-__builtin_ctz((unsigned)step)));
}

LANE vu vu_if_greater(vf a, vf b, uint32_t value)
{
    return vandq_u32(vcgtq_f32(a, b), vdupq_n_u32(value));
}

LANE vu vu_append(vu u, vf a, vf b)
{
    return vsubq_u32(vaddq_u32(u, u), vcgtq_f32(a, b)); /* a set mask is -1 */
}

LANE void vu_store_bytes(uint8_t *p, vu a)
{
    const uint16x4_t words = vmovn_u32(a);
    const uint32_t bytes = vget_lane_u32(
        vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
    memcpy(p, &bytes, 4);
}

LANE vf vf_load_bf16(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

LANE vf vf_load_f16(const uint16_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

LANE vf vf_load_f64(const double *p)
{
    return vcvt_high_f32_f64(vcvt_f32_f64(vld1q_f64(p)), vld1q_f64(p + 2));
}

LANE void vf_store_bf16(uint16_t *p, vf a)
{
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    up = vbslq_u32(vceqq_f32(a, a), vshrq_n_u32(up, 16), vdupq_n_u32(0x7fc0));
    vst1_u16(p, vmovn_u32(up));
}

LANE void vf_store_f16(uint16_t *p, vf a)
{
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}

LANE vf vf_gather256(const float *table, const uint8_t *index)
{
    float values[4];
    for (int i = 0; i < 4; i++)
        memcpy(values + i, table + index[i], sizeof(float));
    return vld1q_f32(values);
}

LANE vf vf_pick(const float *s, vu which)
{
    const uint32x4_t base = vdupq_n_u32(0x03020100);
    const uint32x4_t at = vmlaq_n_u32(base, which, 0x04040404);
    const uint8x16_t bytes = vreinterpretq_u8_f32(vld1q_f32(s));
    return vreinterpretq_f32_u8(vqtbl1q_u8(bytes, vreinterpretq_u8_u32(at)));
}

LANE vf vf_pick8(const float *s, vu which)
{
    const uint32x4_t base = vdupq_n_u32(0x03020100);
    const uint32x4_t at = vmlaq_n_u32(base, which, 0x04040404);
    const uint8x16x2_t bytes = {
        {vreinterpretq_u8_f32(vld1q_f32(s)), vreinterpretq_u8_f32(vld1q_f32(s + 4))}};
    return vreinterpretq_f32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_u32(at)));
}

LANE void vf_unzip(vf a, vf b, vf *even, vf *odd)
{
    *even = vuzp1q_f32(a, b);
    *odd = vuzp2q_f32(a, b);
}

LANE vtable vtable_load(const float *t)
{
    const uint8_t *bytes = (const uint8_t *)t;
    const uint8x16x4_t split = vld4q_u8(bytes);
    const vtable table = {
        split.val[0],    split.val[1],         split.val[2],         split.val[3],
        vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)};
    return table;
}

LANE vf vf_lookup(vtable t, vu index)
{
    const uint32x4_t base = vdupq_n_u32(0x03020100);
    const uint32x4_t at = vmlaq_n_u32(base, index, 0x04040404); /* 4 c + 0, 1, 2, 3 */
    const uint8x16x4_t rows = {{t.row0, t.row1, t.row2, t.row3}};
    return vreinterpretq_f32_u8(vqtbl4q_u8(rows, vreinterpretq_u8_u32(at)));
}

/* Entries of 4 of 16 indices: those from 4 * quarter on. */
LANE vf lanes_quarter(vtable t, uint8x16_t index, int quarter)
{
    const uint8x16_t a = vqtbl1q_u8(t.byte0, index), b = vqtbl1q_u8(t.byte1, index);
    const uint8x16_t c = vqtbl1q_u8(t.byte2, index), d = vqtbl1q_u8(t.byte3, index);
    const uint16x8_t low = vreinterpretq_u16_u8(quarter < 2 ? vzip1q_u8(a, b) : vzip2q_u8(a, b));
    const uint16x8_t high = vreinterpretq_u16_u8(quarter < 2 ? vzip1q_u8(c, d) : vzip2q_u8(c, d));
    return vreinterpretq_f32_u16(quarter % 2 ? vzip2q_u16(low, high) : vzip1q_u16(low, high));
}

/* Written so that of 8 calls, j = 0 .. 7, a compiler does once what they share: all but the last
 * zips. The bytes of the words are put in another order first: byte 0 of each, byte 1, .. */
LANE vf vf_nibble(vtable t, vu words, int j)
{
    static const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_u32(words), vld1q_u8(order));
    const uint8x16_t index = j % 2 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
    return lanes_quarter(t, index, j / 2);
}

LANE half_table half_table_load(const uint16_t *t)
{
    const uint8x16x2_t split = vld2q_u8((const uint8_t *)t);
    const half_table table = {split.val[0], split.val[1]};
    return table;
}

/* 32 indices, a byte each, in order. */
LANE uint8x16x2_t lanes_indices(const uint8_t *codes)
{
    const uint8x16_t bytes = vld1q_u8(codes);
    return vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
}

LANE void half_expand32(half_table t, const uint8_t *codes, uint16_t *out, int stream)
{
    const uint8x16x2_t index = lanes_indices(codes);
    (void)stream;
    for (int i = 0; i < 2; i++) {
        const uint8x16x2_t both = {
            {vqtbl1q_u8(t.low, index.val[i]), vqtbl1q_u8(t.high, index.val[i])}};
        vst2q_u8((uint8_t *)(out + 16 * i), both);
    }
}

LANE void float_expand32(vtable t, const uint8_t *codes, float *out, int stream)
{
    const uint8x16x2_t index = lanes_indices(codes);
    (void)stream;
    for (int i = 0; i < 8; i++)
        vst1q_f32(out + 4 * i, lanes_quarter(t, index.val[i / 4], i % 4));
}

LANE void lanes_prefetch(const void *p) { __builtin_prefetch(p); }
LANE void lanes_fence(void) {}
