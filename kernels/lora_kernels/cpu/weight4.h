/* A 4-bit matrix as Python hands it over, and its scales as floats.
 *
 * The struct mirrors `Weight4` of operands.py. Blocks run over the matrix read row by row, so block
 * b holds elements b * block .. (b + 1) * block - 1, whichever rows they lie in.
 */
#ifndef LORA_WEIGHT4_H
#define LORA_WEIGHT4_H

#include "lanes.h"

#define LORA_EXPORT __attribute__((visibility("default")))

enum lora_dtype { LORA_FLOAT32 = 0, LORA_BFLOAT16 = 1, LORA_FLOAT16 = 2, LORA_FLOAT64 = 3 };

LANE int64_t bytes_of(int dtype)
{
    return dtype == LORA_FLOAT64 ? 8 : dtype == LORA_FLOAT32 ? 4 : 2;
}

/* What scales below are taken as when something is divided by them: the reciprocal stays finite. */
#define TINY 1e-38f

typedef struct {
    const uint8_t *codes; /* two elements a byte, the first in the high nibble */
    const float *scales;  /* one a block, or NULL if they are nested: */
    const uint8_t *nested;
    const float *scale_absmax; /* one a group of 256 blocks */
    const float *scale_offset; /* 1 */
    const float *scale_table;  /* 256 */
    const float *table;        /* 16, the value of each code */
    int64_t rows, columns, block;
} weight4;

/* A float that need not be aligned: tensors of a file may lie anywhere. */
static inline float weight4_float(const float *p)
{
    float value;
    memcpy(&value, p, sizeof value);
    return value;
}

/* The scales of `count` blocks from `first` on: table[q] * absmax + offset, rounded twice. */
static inline void weight4_scales(const weight4 *w, int64_t first, int64_t count, float *out)
{
    if (w->scales) {
        memcpy(out, w->scales + first, (size_t)count * sizeof *out);
        return;
    }
    const float offset = weight4_float(w->scale_offset);
    int64_t b = first, end = first + count;
    while (b < end) { /* group by group, whole vectors first */
        const int64_t group = (b / 256 + 1) * 256, stop = group < end ? group : end;
        const float absmax = weight4_float(w->scale_absmax + b / 256);
        for (; b + LANES <= stop; b += LANES) {
            const vf value = vf_gather256(w->scale_table, w->nested + b);
            vf_store(out + (b - first), vf_add(vf_mul(value, vf_set1(absmax)), vf_set1(offset)));
        }
        for (; b < stop; b++) {
            const float product = weight4_float(w->scale_table + w->nested[b]) * absmax;
            out[b - first] = product + offset;
        }
    }
}

#endif
