/* Turn channel pairs (i, i + R/2) of q or k, where they lie.
 *
 *     out_i = x_i cos_i - x_(i+R/2) sin_i      out_(i+R/2) = x_(i+R/2) cos_i + x_i sin_i
 *
 * Channels from R on are copied. One position at a time: its cosines and sines are read once from
 * memory and stay in the first-level cache for all heads. No multiply-add is fused, so that float32
 * results are those of the definition to the bit.
 */
#include "floats.h"
#include "pool.h"

enum { FEW = 1 << 15 };   /* elements in all below which threads cost more than they save */
enum { PIECE = 1 << 13 }; /* elements that a thread claims at once, about */

typedef struct {
    const char *x;
    const float *cos, *sin;
    int64_t heads, tokens, channels, turned; /* turned: R */
    int64_t x_stride[3], out_stride[3];      /* of batch, head and token, in elements */
    int64_t cos_stride[2], sin_stride[2];    /* of batch and token */
    float sign;
    char *out;
} turning;

LANE void turn(const turning *j, int dtype, const char *x, const float *cos, const float *sin,
               char *out)
{
    const int64_t half = j->turned / 2, size = bytes_of(dtype);
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i, second = half * size;
        const vf a = floats_read_some(x + i * size, dtype, left);
        const vf b = floats_read_some(x + i * size + second, dtype, left);
        const vf c = floats_read_some(cos + i, LORA_FLOAT32, left);
        const vf s = vf_mul(floats_read_some(sin + i, LORA_FLOAT32, left), vf_set1(j->sign));
        const vf minus = vf_mul(s, vf_set1(-1.0f));
        floats_write_some(out + i * size, dtype, vf_add(vf_mul(a, c), vf_mul(b, minus)), left);
        floats_write_some(out + i * size + second, dtype, vf_add(vf_mul(b, c), vf_mul(a, s)), left);
    }
    if (j->turned < j->channels)
        memcpy(out + j->turned * size, x + j->turned * size,
               (size_t)((j->channels - j->turned) * size));
}

LANE void turn_tokens(void *context, int dtype, int64_t begin, int64_t end)
{
    const turning j = *(const turning *)context; /* a copy of our own: no store can change it */
    const int64_t size = bytes_of(dtype);
    for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / j.tokens, t = i % j.tokens;
        const char *x = j.x + (b * j.x_stride[0] + t * j.x_stride[2]) * size;
        char *out = j.out + (b * j.out_stride[0] + t * j.out_stride[2]) * size;
        const float *cos = j.cos + b * j.cos_stride[0] + t * j.cos_stride[1];
        const float *sin = j.sin + b * j.sin_stride[0] + t * j.sin_stride[1];
        for (int64_t h = 0; h < j.heads; h++)
            turn(&j, dtype, x + h * j.x_stride[1] * size, cos, sin,
                 out + h * j.out_stride[1] * size);
    }
}

static void turn_float32(void *j, int64_t begin, int64_t end)
{
    turn_tokens(j, LORA_FLOAT32, begin, end);
}

static void turn_bfloat16(void *j, int64_t begin, int64_t end)
{
    turn_tokens(j, LORA_BFLOAT16, begin, end);
}

static void turn_float16(void *j, int64_t begin, int64_t end)
{
    turn_tokens(j, LORA_FLOAT16, begin, end);
}

/* Turn x (batch, heads, tokens, channels) by the angles of each token, or back.
 *
 * dtype    of x and out; not float64
 * inverse  1: by the negative angles
 * turned   R, even: the channels that take part
 * layout   14 integers: batch, heads, tokens, channels; then strides in elements: of x those of
 *          batch, head and token, of out the same, of cos and of sin those of batch and token.
 *          Channels lie side by side everywhere.
 * cos, sin R/2 floats are read for each token
 *
 * Returns 0.
 */
LORA_EXPORT int lora_rotary(int threads, int dtype, int inverse, const void *x, const float *cos,
                            const float *sin, int64_t turned, const int64_t *layout, void *out)
{
    int64_t sizes[4];
    memcpy(sizes, layout, sizeof sizes);
    static task *const run[] = {[LORA_FLOAT32] = turn_float32,
                                [LORA_BFLOAT16] = turn_bfloat16,
                                [LORA_FLOAT16] = turn_float16};
    turning j = {.x = x,
                 .cos = cos,
                 .sin = sin,
                 .heads = sizes[1],
                 .tokens = sizes[2],
                 .channels = sizes[3],
                 .turned = turned,
                 .sign = inverse ? -1.0f : 1.0f,
                 .out = out};
    memcpy(j.x_stride, layout + 4, sizeof j.x_stride);
    memcpy(j.out_stride, layout + 7, sizeof j.out_stride);
    memcpy(j.cos_stride, layout + 10, sizeof j.cos_stride);
    memcpy(j.sin_stride, layout + 12, sizeof j.sin_stride);
    const int64_t each = sizes[1] * sizes[3], tokens = sizes[0] * sizes[2];
    const int64_t grain = each && each < PIECE ? PIECE / each : 1;
    return parallel_for(each * tokens < FEW ? 1 : threads, tokens, grain, run[dtype], &j);
}
