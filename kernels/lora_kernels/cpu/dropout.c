/* Dropout from a counter: rows of numbers of 2, 4 or 8 bytes, copied with zeros where dropped.
 *
 * What decides is Philox 4x32-10 of the seed, the row and the column divided by 8 (dropout.py): 128
 * bits for eight neighbours. The draws of BATCH groups stand side by side in arrays, so that every
 * line of a round is one loop over lanes that the compiler turns into vectors. What comes out is
 * stored as the eight 16-bit numbers of group after group, and compared and selected in a second
 * loop. Some 10 instructions an element with AVX2; x is read and written once.
 *
 * Only whether a number is kept is decided here. Its bits are copied, so types matter by size alone.
 */
#include <stdint.h>
#include <string.h>

#include "pool.h"
#include "weight4.h"

enum { GROUP = 8, BATCH = 16, STEP = GROUP * BATCH, ROUNDS = 10 };
enum { PIECE = 1 << 14 }; /* elements that a thread claims at once */

typedef struct {
    const uint8_t *x;
    uint8_t *out;
    int64_t columns, size, stride; /* elements, bytes, bytes */
    uint32_t key[2];
    uint16_t threshold;
} job;

/* The numbers of BATCH groups from `group` on, in a row. */
static void draw(const job *j, int64_t row, int64_t group, uint16_t *numbers)
{
    uint32_t c[4][BATCH], k0 = j->key[0], k1 = j->key[1], words[4 * BATCH];
    for (int i = 0; i < BATCH; i++) {
        c[0][i] = (uint32_t)(group + i);
        c[1][i] = (uint32_t)row;
        c[2][i] = (uint32_t)((uint64_t)row >> 32);
        c[3][i] = 0;
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < BATCH; i++) {
            const uint64_t a = (uint64_t)c[0][i] * 0xD2511F53u, b = (uint64_t)c[2][i] * 0xCD9E8D57u;
            c[0][i] = (uint32_t)(b >> 32) ^ c[1][i] ^ k0;
            c[1][i] = (uint32_t)b;
            c[2][i] = (uint32_t)(a >> 32) ^ c[3][i] ^ k1;
            c[3][i] = (uint32_t)a;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < BATCH; i++)
        for (int w = 0; w < 4; w++)
            words[4 * i + w] = c[w][i];
    memcpy(numbers, words, sizeof words); /* little-endian: the low half of each comes first */
}

/* A copy of `count` elements, 0 where the number is below the threshold; out may be x. */
#define KEEP(name, type)                                                                           \
    static void name(const uint8_t *x, uint8_t *out, const uint16_t *numbers, uint16_t threshold,  \
                     int64_t count)                                                                \
    {                                                                                              \
        type values[STEP];                                                                         \
        memcpy(values, x, (size_t)count * sizeof *values);                                         \
        for (int64_t i = 0; i < count; i++)                                                        \
            values[i] = numbers[i] < threshold ? 0 : values[i];                                    \
        memcpy(out, values, (size_t)count * sizeof *values);                                       \
    }

KEEP(keep2, uint16_t)
KEEP(keep4, uint32_t)
KEEP(keep8, uint64_t)

static void drop_rows(void *context, int64_t begin, int64_t end)
{
    const job *j = context;
    uint16_t numbers[STEP];
    for (int64_t row = begin; row < end; row++)
        for (int64_t k = 0; k < j->columns; k += STEP) {
            const int64_t left = j->columns - k, count = left < STEP ? left : STEP;
            const uint8_t *x = j->x + row * j->stride + k * j->size;
            uint8_t *out = j->out + (row * j->columns + k) * j->size;
            draw(j, row, k / GROUP, numbers);
            if (j->size == 2)
                keep2(x, out, numbers, j->threshold, count);
            else if (j->size == 4)
                keep4(x, out, numbers, j->threshold, count);
            else
                keep8(x, out, numbers, j->threshold, count);
        }
}

/* Copy `rows` rows of `columns` elements of `size` bytes (2, 4 or 8), with zeros where dropped.
 *
 * stride     elements from one row of x to the next
 * seed       two 32-bit words, the low one first
 * threshold  numbers of 65536 below which an element is dropped
 * out        without gaps; may be x where that is too
 *
 * Returns 0.
 */
LORA_EXPORT int lora_drop(int threads, const void *x, int64_t rows, int64_t columns, int64_t stride,
                          int64_t size, const int64_t *seed, int threshold, void *out)
{
    job j = {.x = x, .out = out, .columns = columns, .size = size, .stride = stride * size};
    j.threshold = (uint16_t)threshold;
    memcpy(j.key, seed, sizeof j.key);
    if (!columns)
        return 0;
    return parallel_for(threads, rows, (PIECE + columns - 1) / columns, drop_rows, &j);
}
