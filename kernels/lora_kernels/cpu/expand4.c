/* Expand 4-bit blocks: out_i = round(table[code_i] * scale_b), the product in float32.
 *
 * Half a byte is read a weight and two or four are written, so it should run as fast as memory
 * takes the result. Sixteen values can appear in a block: they are multiplied by its scale and
 * rounded once, sixteen products instead of one a weight, and what remains is a lookup of 32 codes
 * at a time in a table that stays in registers, two or three instructions. Bit-equal to the
 * definition, as it is the same product and the same rounding. bitsandbytes looks a code up,
 * multiplies and rounds it for each weight; torch.compile fetches each entry from memory.
 *
 * One shape of work serves a whole weight and a slice of it: lines of blocks, each line the same
 * number of blocks after the one before. A whole weight is one line. Pieces of 256 KB of the result
 * are claimed by the threads, small enough to stay in a core's own cache for whoever multiplies by
 * them next; a result of one piece stays on the caller. Nested scales are decoded on the way, some
 * hundred at a time into the stack, as all of them at once would be memory moved for nothing.
 *
 * A result larger than the caches goes past them (`stream`): a store that misses reads its line
 * first, a third more to move. For a smaller one that would be a loss, as the next reader would
 * find it in memory only; the caller knows.
 */
#include <errno.h>

#include "pool.h"
#include "weight4.h"

/* Called once a piece or less: seven copies, one in each kind of result's loop, would only take
 * longer to compile. */
#define APART __attribute__((noinline)) static

enum { SCALES = 256, PIECE = 256 * 1024, AHEAD = 16 };

typedef struct {
    weight4 weight;
    int64_t first;  /* block of the weight that the result begins with */
    int64_t stride; /* blocks of the weight from one line to the next */
    int64_t width;  /* elements in a line */
    int64_t across; /* blocks in a line, the last perhaps partial */
    char *out;
    int dtype, stream;
} expansion;

/* The table in registers: a table in memory would be read again for each block, as a compiler
 * cannot know that the result does not overwrite it. */
typedef struct {
    vf rows[16 / LANES];
} sixteen;

LANE sixteen times(sixteen table, float scale)
{
    for (int i = 0; i < 16 / LANES; i++)
        table.rows[i] = vf_mul(table.rows[i], vf_set1(scale));
    return table;
}

LANE void halves(sixteen values, const uint8_t *codes, int64_t count, char *out, int dtype,
                 int stream)
{
    uint16_t rounded[16];
    for (int i = 0; i < 16 / LANES; i++)
        if (dtype == LORA_BFLOAT16)
            vf_store_bf16(rounded + i * LANES, values.rows[i]);
        else
            vf_store_f16(rounded + i * LANES, values.rows[i]);
    const half_table table = half_table_load(rounded);
    for (int64_t i = 0; i < count; i += 32)
        half_expand32(table, codes + i / 2, (uint16_t *)(out + 2 * i), stream);
}

LANE void floats(sixteen values, const uint8_t *codes, int64_t count, char *out, int stream)
{
    float stored[16];
    for (int i = 0; i < 16 / LANES; i++)
        vf_store(stored + i * LANES, values.rows[i]);
    const vtable table = vtable_load(stored);
    for (int64_t i = 0; i < count; i += 32)
        float_expand32(table, codes + i / 2, (float *)(out + 4 * i), stream);
}

/* `count` elements of one block, a multiple of 32. Doubles are for tests of gradients. */
LANE void expand_block(sixteen table, float scale, const uint8_t *codes, int64_t count, char *out,
                       int dtype, int stream)
{
    const sixteen values = times(table, scale);
    if (dtype == LORA_FLOAT32)
        floats(values, codes, count, out, stream);
    else if (dtype != LORA_FLOAT64)
        halves(values, codes, count, out, dtype, stream);
    else
        for (int64_t i = 0; i < count; i += 32) {
            float single[32];
            double wide[32];
            floats(values, codes + i / 2, 32, (char *)single, 0);
            for (int j = 0; j < 32; j++)
                wide[j] = single[j];
            memcpy(out + 8 * i, wide, sizeof wide);
        }
}

LANE sixteen table_of(const weight4 *w)
{
    sixteen table;
    for (int i = 0; i < 16 / LANES; i++)
        table.rows[i] = vf_load(w->table + i * LANES);
    return table;
}

/* The last block of a weight, if it is not whole. The elements that do not fill 32 are expanded
 * beside: nothing is read or written beyond the last one. */
APART void expand_partial(const weight4 *w, float scale, const uint8_t *codes, int64_t count,
                          char *out, int dtype)
{
    const sixteen table = table_of(w);
    const int64_t most = count / 32 * 32, rest = count - most;
    uint8_t padded[16] = {0};
    double values[32]; /* or as many of a smaller type */
    expand_block(table, scale, codes, most, out, dtype, 0);
    memcpy(padded, codes + most / 2, (size_t)(rest + 1) / 2);
    expand_block(table, scale, padded, 32, (char *)values, dtype, 0);
    memcpy(out + most * bytes_of(dtype), values, (size_t)(rest * bytes_of(dtype)));
}

APART void decode_scales(const weight4 *w, int64_t first, int64_t count, float *out)
{
    weight4_scales(w, first, count, out);
}

/* Blocks begin .. end - 1 of the result. `dtype` and `stream` are constants where this is called,
 * so that each kind of result has a loop of its own. */
LANE void expand_blocks(const expansion *e, int64_t begin, int64_t end, int dtype, int stream)
{
    const weight4 *w = &e->weight;
    const sixteen table = table_of(w);
    const int64_t block = w->block, size = bytes_of(dtype);
    float scales[SCALES];
    while (begin < end) { /* to the end of the line, or of the scales' memory */
        const int64_t line = begin / e->across, at = begin % e->across;
        const int64_t first = e->first + line * e->stride + at;
        int64_t blocks = e->across - at < end - begin ? e->across - at : end - begin;
        blocks = blocks < SCALES ? blocks : SCALES;
        begin += blocks;
        decode_scales(w, first, blocks, scales);

        const uint8_t *codes = w->codes + first * (block / 2);
        if (e->stride > e->across)
            for (int64_t i = 0; i < blocks * (block / 2); i += 64)
                lanes_prefetch(codes + AHEAD * e->stride * (block / 2) + i);
        char *out = e->out + (line * e->width + at * block) * size;
        const int64_t left = e->width - at * block, whole = left / block;
        const int64_t full = blocks < whole ? blocks : whole;
        for (int64_t b = 0; b < full; b++, codes += block / 2, out += block * size)
            expand_block(table, scales[b], codes, block, out, dtype, stream);
        if (full < blocks)
            expand_partial(w, scales[full], codes, left % block, out, dtype);
    }
}

static void expand_piece(void *context, int64_t begin, int64_t end)
{
    const expansion *e = context;
    if (e->dtype == LORA_FLOAT64)
        expand_blocks(e, begin, end, LORA_FLOAT64, 0);
    else if (e->dtype == LORA_FLOAT32 && e->stream)
        expand_blocks(e, begin, end, LORA_FLOAT32, 1);
    else if (e->dtype == LORA_FLOAT32)
        expand_blocks(e, begin, end, LORA_FLOAT32, 0);
    else if (e->dtype == LORA_BFLOAT16 && e->stream)
        expand_blocks(e, begin, end, LORA_BFLOAT16, 1);
    else if (e->dtype == LORA_BFLOAT16)
        expand_blocks(e, begin, end, LORA_BFLOAT16, 0);
    else if (e->stream)
        expand_blocks(e, begin, end, LORA_FLOAT16, 1);
    else
        expand_blocks(e, begin, end, LORA_FLOAT16, 0);
    if (e->stream)
        lanes_fence();
}

/* Expands `lines` lines of `width` elements. Line i begins with block first + i * stride of the
 * weight; only if there is one line need its width not be whole blocks.
 *
 * threads  at most so many work on it
 * out      lines * width numbers of `dtype`, without gaps; it need not be aligned
 * dtype    an enum lora_dtype
 * stream   1: past the caches, if out is aligned to 64 bytes
 *
 * The other arguments are fields of a weight4, with `block` a multiple of 32. Returns 0 or a number
 * of errno.h.
 */
LORA_EXPORT int lora_expand4(int threads, const uint8_t *codes, const float *scales,
                             const uint8_t *nested, const float *scale_absmax,
                             const float *scale_offset, const float *scale_table,
                             const float *table, int64_t block, int64_t first, int64_t stride,
                             int64_t lines, int64_t width, void *out, int dtype, int stream)
{
    if (block < 32 || block % 32)
        return EINVAL;
    expansion e = {
        .weight = {.codes = codes,
                   .scales = scales,
                   .nested = nested,
                   .scale_absmax = scale_absmax,
                   .scale_offset = scale_offset,
                   .scale_table = scale_table,
                   .table = table,
                   .block = block},
        .first = first,
        .stride = stride,
        .width = width,
        .across = (width + block - 1) / block,
        .out = out,
        .dtype = dtype,
        /* so every 32 elements begin at a multiple of 64 bytes, except after a partial block */
        .stream = stream && (uintptr_t)out % 64 == 0 && dtype != LORA_FLOAT64,
    };
    const int64_t grain = PIECE / (block * bytes_of(dtype));
    return parallel_for(threads, lines * e.across, grain > 1 ? grain : 1, expand_piece, &e);
}
