/* One step of AdamW over many tensors whose moments are 8-bit codes in blocks of 256.
 *
 * A tensor is a row of a table of addresses, and a thread claims blocks by their number over all of
 * them, so that a hundred small tensors and one large one take the same time. A block is read and
 * written once, 16 bytes an element; in between it lies in the first-level cache. Every loop is over
 * 256 elements without a branch, so the compiler makes vectors of it, square roots, divisions and
 * the hash of the rounding included.
 *
 * Bit-equal to the definition (adamw8.py): the same operations in the same order, none contracted.
 */
#include <math.h>
#include <string.h>

#include "pool.h"
#include "weight4.h"

enum { BLOCK = 256, PIECE = 32 /* blocks that a thread claims */ };

typedef struct {
    uint8_t *p; /* floats, as are g and the units */
    const uint8_t *g;
    uint8_t *mean;
    uint8_t *mean_unit;
    uint8_t *root;
    uint8_t *root_unit;
    int64_t numel;
    int64_t before; /* blocks of the tensors before this one */
} tensor;

typedef struct {
    float decay, beta1, rest1, beta2, rest2, correction, eps, rate;
} factors;

typedef struct {
    const tensor *tensors;
    int64_t count;
    factors f;
    uint32_t key; /* of the rounding */
} job;

/* The largest of numbers that are not negative: as integers their bits order alike. */
LANE float largest(const float *values)
{
    uint32_t most = 0;
    float result;
    for (int i = 0; i < BLOCK; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    memcpy(&result, &most, sizeof result);
    return result;
}

LANE float unit_of(const float *values, double scale)
{
    const float unit = largest(values) * (float)scale;
    return unit < 0x1p-126f ? 0x1p-126f : unit;
}

/* Numbers in [0, 1): a hash of the element's index and the step. */
LANE float noise(uint32_t x, uint32_t key)
{
    x ^= key;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x ^= x >> 16;
    return (float)(int32_t)(x >> 8) * 0x1p-24f;
}

/* A whole block: `first` is the index of its first element in its tensor. */
LANE void update(const job *j, uint32_t first, float *restrict p, const float *restrict g,
                 int8_t *restrict mean, uint8_t *restrict root, float *mean_unit, float *root_unit)
{
    const factors f = j->f;
    const float old_mean = *mean_unit, old_root = *root_unit;
    float m[BLOCK], s[BLOCK];
    for (int i = 0; i < BLOCK; i++) {
        const float a = mean[i], b = (float)root[i] * (float)root[i], before = b * b * old_root;
        m[i] = f.beta1 * (a * fabsf(a) * old_mean) + f.rest1 * g[i];
        s[i] = sqrtf(f.beta2 * (before * before) + f.rest2 * (g[i] * g[i]));
        p[i] = p[i] * f.decay - f.rate * (m[i] / (s[i] * f.correction + f.eps));
    }
    const float m_unit = unit_of(m, 1 / 16129.0), s_unit = unit_of(s, 1 / 4228250625.0);
    for (int i = 0; i < BLOCK; i++) {
        const int32_t code = (int32_t)(sqrtf(fabsf(m[i]) / m_unit) + 0.5f);
        mean[i] = (int8_t)(m[i] < 0 ? -code : code);
    }
    for (int i = 0; i < BLOCK; i++) {
        const float x = sqrtf(sqrtf(s[i] / s_unit)) + noise(first + (uint32_t)i, j->key);
        const int32_t code = (int32_t)x, least = s[i] > 0; /* x is below 256.1 */
        const int32_t raised = code > least ? code : least;
        root[i] = (uint8_t)(raised < 255 ? raised : 255);
    }
    *mean_unit = m_unit;
    *root_unit = s_unit;
}

/* A block of a tensor, in a copy: the first-level cache holds it, the tensors may begin anywhere, and
 * a last one that is partial is filled up with zeros, which stay zeros and change no maximum. */
static void update_block(const job *j, const tensor *t, int64_t block)
{
    const int64_t at = block * BLOCK, left = t->numel - at;
    const size_t count = left < BLOCK ? (size_t)left : BLOCK;
    float p[BLOCK] = {0}, g[BLOCK] = {0}, mean_unit, root_unit;
    int8_t mean[BLOCK] = {0};
    uint8_t root[BLOCK] = {0};
    memcpy(p, t->p + at * 4, count * sizeof *p);
    memcpy(g, t->g + at * 4, count * sizeof *g);
    memcpy(mean, t->mean + at, count);
    memcpy(root, t->root + at, count);
    memcpy(&mean_unit, t->mean_unit + block * 4, sizeof mean_unit);
    memcpy(&root_unit, t->root_unit + block * 4, sizeof root_unit);
    update(j, (uint32_t)at, p, g, mean, root, &mean_unit, &root_unit);
    memcpy(t->p + at * 4, p, count * sizeof *p);
    memcpy(t->mean + at, mean, count);
    memcpy(t->root + at, root, count);
    memcpy(t->mean_unit + block * 4, &mean_unit, sizeof mean_unit);
    memcpy(t->root_unit + block * 4, &root_unit, sizeof root_unit);
}

static void update_blocks(void *context, int64_t begin, int64_t end)
{
    const job *j = context;
    int64_t low = 0, high = j->count; /* the last tensor that begins at `begin` or before */
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (j->tensors[middle].before <= begin)
            low = middle;
        else
            high = middle;
    }
    const tensor *t = j->tensors + low;
    for (int64_t i = begin; i < end; i++) {
        while (i - t->before >= (t->numel + BLOCK - 1) / BLOCK)
            t++;
        update_block(j, t, i - t->before);
    }
}

/* Update `count` tensors, which have `blocks` blocks in sum.
 *
 * tensors  a row of `tensor` each: six addresses, the elements, the blocks of those before
 * numbers  the 8 factors
 * key      of the rounding, a function of the step
 *
 * Returns 0.
 */
LORA_EXPORT int lora_adamw8(int threads, const void *tensors, int64_t count, int64_t blocks,
                            const float *numbers, uint32_t key)
{
    job j = {.tensors = tensors, .count = count, .key = key};
    memcpy(&j.f, numbers, sizeof j.f);
    return parallel_for(threads, blocks, PIECE, update_blocks, &j);
}
