/* The scales of 4-bit blocks in 8 bits (double quantization): the index of the nearest of 256.
 *
 * Groups of 256 scales, less their mean, are divided by the group's largest magnitude. Nearest is
 * meant exactly, so quotients and midpoints are doubles, as in the definition (scales4.py), and the
 * result is bit-equal to it. 5 bytes are moved for each scale, of which there is one for 32 weights
 * or more; the time is that of 8 comparisons a scale, each of which waits for the one before it.
 * Hence WIDE searches side by side. The definition makes a dozen passes over arrays, the larger of
 * them doubles.
 *
 * Cells instead of a search, as bitsandbytes has them, need 65536 entries for this table, which is
 * dense around zero, and give another code than the nearest for 2 scales in 1000.
 */
#include "pool.h"
#include "weight4.h"

enum { GROUP = 256, WIDE = 8, PIECE = 16 /* groups that a thread claims */ };

typedef struct {
    const float *scales;
    int64_t count;
    float offset;
    double middle[255];
    uint8_t *codes;
    float *absmax;
} job;

/* The number of midpoints below each quotient; all 255 for NaN, as torch.bucketize has it. */
static void nearest(const double *middle, const double *quotient, uint8_t *codes)
{
    for (int i = 0; i < GROUP; i += WIDE) {
        uint32_t below[WIDE] = {0};
        for (uint32_t step = 128; step; step /= 2)
            for (int k = 0; k < WIDE; k++) {
                const int above = !(quotient[i + k] <= middle[below[k] + step - 1]);
                below[k] += above ? step : 0;
            }
        for (int k = 0; k < WIDE; k++)
            codes[i + k] = (uint8_t)below[k];
    }
}

/* As integers the bits of magnitudes order alike, and NaN is above infinity, above all numbers. */
static float largest(const float *values)
{
    uint32_t most = 0;
    float result;
    for (int i = 0; i < GROUP; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(&result, &most, sizeof result);
    return result;
}

static void encode_group(const job *j, int64_t group)
{
    const int64_t first = group * GROUP, left = j->count - first;
    const size_t here = left < GROUP ? (size_t)left : GROUP;
    float centred[GROUP] = {0};
    double quotient[GROUP];
    uint8_t codes[GROUP];
    memcpy(centred, j->scales + first, here * sizeof *centred);
    for (size_t i = 0; i < here; i++)
        centred[i] -= j->offset;
    const float absmax = largest(centred);
    const double bound = absmax < TINY ? TINY : absmax;
    for (int i = 0; i < GROUP; i++)
        quotient[i] = centred[i] / bound;
    nearest(j->middle, quotient, codes);
    memcpy(j->codes + first, codes, here);
    memcpy(j->absmax + group, &absmax, sizeof absmax);
}

static void encode_groups(void *context, int64_t begin, int64_t end)
{
    for (int64_t group = begin; group < end; group++)
        encode_group(context, group);
}

/* Encode `count` scales: the index of the entry of `table` nearest to (scale - offset) / absmax.
 *
 * table   256 floats, ascending
 * codes   `count` bytes, written
 * absmax  ceil(count / 256) floats, written: the largest |scale - offset| of each group
 *
 * Returns 0.
 */
LORA_EXPORT int lora_encode_scales(int threads, const float *scales, int64_t count, float offset,
                                   const float *table, uint8_t *codes, float *absmax)
{
    job j = {.scales = scales, .count = count, .offset = offset, .codes = codes, .absmax = absmax};
    float entries[256];
    memcpy(entries, table, sizeof entries);
    for (int i = 0; i < 255; i++)
        j.middle[i] = ((double)entries[i] + (double)entries[i + 1]) / 2;
    return parallel_for(threads, (count + GROUP - 1) / GROUP, PIECE, encode_groups, &j);
}
