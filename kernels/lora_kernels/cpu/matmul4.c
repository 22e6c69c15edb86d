/* y = x Wᵀ + bias for few rows of x, straight from the codes of W.
 *
 * With few rows a product is as fast as W is read, and half a byte a weight is an eighth of what
 * expanding W to 16 bits and multiplying would move. So W is never written anywhere: a weight
 * exists in a register, between the lookup of its code and the multiplication.
 *
 * A vector of LANES words of 32 bits holds the codes of a chunk, 8 LANES weights of one row:
 *
 *     word d of the chunk            codes of the elements 8d .. 8d + 7
 *     bits 4j .. 4j + 3 of word d    of element 8d + (j ^ 1): a byte's first code is its high one
 *
 * Nibble j of all words is one lookup, with no code put back into order. It is x that is put into
 * the order of the codes instead, once a call: stream j of a chunk holds the elements 8d + (j ^ 1)
 * one after another. The eight streams are multiplied by what was looked up and added up, and the
 * scales of the chunk's blocks multiply the sums, not the weights: far fewer products.
 *
 *     y[m][n] = Σ over blocks b of scale[n][b] · Σ over i in b of table[code[n][i]] · x[m][i]
 *
 * All of it is float32, and W is not rounded at all: against float64 the result is as good as a
 * dense float32 product, where weights rounded to bfloat16 are a thousand times worse. Other known
 * ways are cheaper in instructions and not in time, as memory is the limit: two bfloat16 products
 * an instruction round W and x; bytes of W and x multiplied as integers need x in fixed point, of
 * which an outlier takes the digits. In return the scales come late: a sum of one block overflows
 * where |table · x| adds up to more than float32 holds, though small scales would bring it back.
 *
 * A tile is some rows of W by some of x, all sums in registers; both counts are constants, so that
 * each has its own code. One row of x takes one row of W at a time, as it lies in memory, and keeps
 * two sums, so that an addition need not wait for the one before; several rows of W, if x is so
 * long that it comes from the second-level cache each time. More rows of x take several of W,
 * so that what is loaded and looked up is used more than once. More than four rows take W in turns,
 * a piece of it at a time, which then still lies in the cache.
 *
 * A result is summed by one thread, in an order that depends on nothing but K, the block size and
 * how many rows of x share the tile: the same bits on any number of threads.
 */
#include <errno.h>
#include <stdlib.h>

#include "lanes.h"
#include "pool.h"
#include "weight4.h"

enum {
    CHUNK = 8 * LANES, /* weights */
    CHUNK_BYTES = 4 * LANES,
    X_ROWS = 4,                  /* of x in a tile, at most */
    W_ROWS = LANES == 8 ? 2 : 4, /* of W, where x has several: what 16 or 32 registers hold */
    SCALES = 256,                /* decoded at a time; a multiple of the blocks in a chunk */
    NEAR = 8192,                 /* columns of x that stay in the first cache, as floats */
    AHEAD = 4096,                /* bytes that a single row of x prefetches: nearer comes late */
    PIECE_ROWS = 256,            /* of W, which a thread takes at a time, at most */
    PIECE_WEIGHTS = 1 << 20,     /* likewise: half a megabyte of codes, read from end to end */
    PIECES_EACH = 8,             /* of a thread, at least, as threads are not equally fast */
    FEW_PRODUCTS = 1 << 20,      /* some 20 µs: below that, threads cost more than they save */
};

_Static_assert(PIECE_ROWS % W_ROWS == 0 && PIECE_ROWS % LANES == 0,
               "sums of a piece are written a tile at a time and rounded a vector at a time");

typedef struct {
    weight4 weight;
    int shift;         /* the block size is 2^shift */
    const float *x;    /* tile by tile, in each chunk by chunk, the tile's rows side by side */
    int64_t x_rows;
    int64_t padded;    /* columns, with the zeros that make the last chunk whole */
    const float *bias; /* or NULL */
    char *y;
    int dtype;
} product;

/* --- x in the order of the codes ------------------------------------------------------------- */

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static vf load_as_float(const char *x, int dtype)
{
    if (dtype == LORA_BFLOAT16)
        return vf_load_bf16((const uint16_t *)x);
    if (dtype == LORA_FLOAT16)
        return vf_load_f16((const uint16_t *)x);
    return vf_load((const float *)x);
}

/* Chunk c goes to out + c * apart. `columns` is a multiple of LANES, as every block size is. */
static void reorder_row(const char *x, int dtype, int64_t columns, float *out, int64_t apart)
{
    for (int64_t first = 0; first < columns; first += CHUNK, out += apart) {
        float chunk[CHUNK] = {0};
        for (int64_t i = 0; i < CHUNK && first + i < columns; i += LANES)
            vf_store(chunk + i, load_as_float(x + (first + i) * bytes_of(dtype), dtype));
        for (int word = 0; word < LANES; word++)
            for (int j = 0; j < 8; j++)
                out[j * LANES + word] = chunk[8 * word + (j ^ 1)];
    }
}

/* Rows of x are shared out evenly: how many the tile takes that begins with row m. */
static int rows_of_tile(int64_t x_rows, int64_t m)
{
    const int64_t left = x_rows - m, tiles = (left + X_ROWS - 1) / X_ROWS;
    return (int)((left + tiles - 1) / tiles);
}

static void reorder(const char *x, const product *p, float *out)
{
    const int64_t columns = p->weight.columns, row_bytes = columns * bytes_of(p->dtype);
    for (int64_t m = 0; m < p->x_rows;) {
        const int tile = rows_of_tile(p->x_rows, m);
        for (int i = 0; i < tile; i++, m++)
            reorder_row(x + m * row_bytes, p->dtype, columns, out + i * CHUNK, tile * CHUNK);
        out += tile * p->padded;
    }
}

/* --- sums of a tile -------------------------------------------------------------------------- */

/* Adds the products of a chunk of `rows` rows of W by `x_rows` of x. */
LANE void add_chunk(const uint8_t *const codes[W_ROWS], vtable table, const vf scales[W_ROWS],
                    const float *x, const int rows, const int x_rows, vf totals[W_ROWS][X_ROWS])
{
    const int chains = x_rows == 1 ? 2 : 1;
    vf sums[2][W_ROWS][X_ROWS];
    vu words[W_ROWS];
    for (int r = 0; r < rows; r++)
        words[r] = vu_load(codes[r]);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        vf weights[W_ROWS];
        for (int r = 0; r < rows; r++)
            weights[r] = vf_nibble(table, words[r], j);
        for (int i = 0; i < x_rows; i++) {
            const vf values = vf_load(x + (8 * i + j) * LANES);
            for (int r = 0; r < rows; r++) {
                vf *sum = &sums[j % chains][r][i];
                *sum = j < chains ? vf_mul(weights[r], values) : vf_fma(weights[r], values, *sum);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < x_rows; i++) {
            const vf sum = chains == 1 ? sums[0][r][i] : vf_add(sums[0][r][i], sums[1][r][i]);
            totals[r][i] = vf_fma(sum, scales[r], totals[r][i]);
        }
}

/* What is left of a row and no longer fills a chunk, with zeros behind. */
static const uint8_t *copy_rest(const uint8_t *codes, int64_t bytes, uint8_t *rest)
{
    memset(rest, 0, CHUNK_BYTES);
    return memcpy(rest, codes, (size_t)bytes);
}

/* Adds the products of `count` blocks of some rows of W, from column `first` on. `n` says which
 * rows they are; `x` is the tile's, from the same column on. */
LANE void add_blocks(const product *p, const int64_t n[W_ROWS], int64_t first, int64_t count,
                     vtable table, const float *x, const int rows, const int x_rows,
                     vf totals[W_ROWS][X_ROWS])
{
    const weight4 *w = &p->weight;
    const int64_t row_bytes = w->columns / 2;
    /* one row comes to what lies ahead of it; several come next to the same columns of others */
    const int64_t ahead = rows > 1 ? rows * row_bytes : AHEAD;
    /* a chunk of 128 most often has several blocks, and asking costs more than the answer saves */
    const int several = CHUNK > 64 || w->block < CHUNK;
    const vu which = vu_lane_over((int)w->block / 8);
    const uint8_t *codes[W_ROWS];
    float decoded[W_ROWS][SCALES + 3]; /* vf_pick reads four where one is left */
    uint8_t rest[W_ROWS][CHUNK_BYTES];
    for (int r = 0; r < rows; r++) {
        codes[r] = w->codes + n[r] * row_bytes + first / 2;
        weight4_scales(w, (n[r] * w->columns + first) >> p->shift, count, decoded[r]);
        memset(decoded[r] + count, 0, 3 * sizeof(float));
    }
    const int64_t columns = count << p->shift, whole = columns / CHUNK * CHUNK;
    for (int64_t k = 0; k < columns; k += CHUNK, x += x_rows * CHUNK) {
        vf scales[W_ROWS];
        if (k == whole)
            for (int r = 0; r < rows; r++)
                codes[r] = copy_rest(codes[r], (columns - whole) / 2, rest[r]);
        for (int r = 0; r < rows; r++) {
            const float *scale = decoded[r] + (k >> p->shift);
            scales[r] = several ? vf_pick(scale, which) : vf_set1(*scale);
            lanes_prefetch(codes[r] + ahead);
        }
        add_chunk(codes, table, scales, x, rows, x_rows, totals);
        for (int r = 0; r < rows; r++)
            codes[r] += CHUNK_BYTES;
    }
}

/* Multiplies `rows` rows of W from n on by the rows m .. m + x_rows - 1 of x, adds the bias, and
 * writes what row i of x gives to `sums + i * PIECE_ROWS`. If W or the piece ends before the tile
 * does, its last row stands in for those that are missing, and what comes of them is not read. */
LANE void multiply_tile(const product *p, int64_t n, int64_t end, int64_t m, const int rows,
                        const int x_rows, float *sums)
{
    const vtable table = vtable_load(p->weight.table);
    const int64_t columns = p->weight.columns, span = (int64_t)SCALES << p->shift;
    int64_t row[W_ROWS];
    vf totals[W_ROWS][X_ROWS];
    for (int r = 0; r < rows; r++) {
        row[r] = smaller(n + r, end - 1);
        for (int i = 0; i < x_rows; i++)
            totals[r][i] = vf_set1(0);
    }
    for (int64_t k = 0; k < columns; k += span) {
        const int64_t count = smaller(columns - k, span) >> p->shift;
        const float *x = p->x + m * p->padded + k * x_rows;
        add_blocks(p, row, k, count, table, x, rows, x_rows, totals);
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < x_rows; i++) {
            const float sum = vf_sum(totals[r][i]);
            sums[i * PIECE_ROWS + r] = p->bias ? sum + weight4_float(p->bias + row[r]) : sum;
        }
}

/* --- pieces ---------------------------------------------------------------------------------- */

LANE void multiply_rows(const product *p, int64_t begin, int64_t end, int64_t m, const int rows,
                        const int x_rows, float *sums)
{
    for (int64_t n = begin; n < end; n += rows)
        multiply_tile(p, n, end, m, rows, x_rows, sums + (n - begin));
}

static void round_row(const float *sums, int64_t count, int dtype, char *y)
{
    const int64_t size = bytes_of(dtype);
    for (int64_t i = 0; i < count; i += LANES) {
        float single[LANES];
        uint16_t half[LANES];
        const vf values = vf_load(sums + i);
        if (dtype == LORA_BFLOAT16)
            vf_store_bf16(half, values);
        else if (dtype == LORA_FLOAT16)
            vf_store_f16(half, values);
        else
            vf_store(single, values);
        const size_t bytes = (size_t)(smaller(count - i, LANES) * size);
        memcpy(y + i * size, size == 2 ? (void *)half : (void *)single, bytes);
    }
}

/* Rows begin .. end - 1 of W times all of x. */
static void multiply_piece(void *context, int64_t begin, int64_t end)
{
    const product *p = context;
    for (int64_t m = 0; m < p->x_rows;) {
        const int x_rows = rows_of_tile(p->x_rows, m);
        float sums[X_ROWS * PIECE_ROWS] = {0};
        if (x_rows == 1 && p->padded <= NEAR)
            multiply_rows(p, begin, end, m, 1, 1, sums);
        else if (x_rows == 1)
            multiply_rows(p, begin, end, m, W_ROWS, 1, sums);
        else if (x_rows == 2)
            multiply_rows(p, begin, end, m, W_ROWS, 2, sums);
        else if (x_rows == 3)
            multiply_rows(p, begin, end, m, W_ROWS, 3, sums);
        else
            multiply_rows(p, begin, end, m, W_ROWS, 4, sums);
        for (int i = 0; i < x_rows; i++, m++) {
            char *y = p->y + (m * p->weight.rows + begin) * bytes_of(p->dtype);
            round_row(sums + i * PIECE_ROWS, end - begin, p->dtype, y);
        }
    }
}

/* How many rows of W are a piece. */
static int64_t piece_rows(const weight4 *w, int threads)
{
    const int64_t in_bytes = PIECE_WEIGHTS / (w->columns ? w->columns : 1);
    const int64_t shared = w->rows / ((int64_t)threads * PIECES_EACH);
    const int64_t rows = smaller(PIECE_ROWS, smaller(in_bytes, shared)) / W_ROWS * W_ROWS;
    return rows ? rows : W_ROWS;
}

/* y (x_rows, rows) = x (x_rows, columns) Wᵀ + bias.
 *
 * threads  at most so many work on it; below 1: one
 * columns  a multiple of `block`, a power of two from 32 to 4096
 * x        numbers of `dtype` without gaps
 * dtype    an enum lora_dtype, not float64
 * bias     float32 (rows) or NULL; added before the result is rounded
 * y        numbers of `dtype` without gaps
 *
 * The other arguments are fields of a weight4. Returns 0; EINVAL for a block size, a number of
 * columns or a dtype that does not fit; ENOMEM.
 */
LORA_EXPORT int lora_matmul4(int threads, const uint8_t *codes, const float *scales,
                             const uint8_t *nested, const float *scale_absmax,
                             const float *scale_offset, const float *scale_table,
                             const float *table, int64_t rows, int64_t columns, int64_t block,
                             const void *x, int64_t x_rows, int dtype, const float *bias, void *y)
{
    if (block < 32 || block & (block - 1) || columns % block || dtype < 0 || dtype > LORA_FLOAT16)
        return EINVAL;
    product p = {
        .weight = {codes, scales, nested, scale_absmax, scale_offset, scale_table, table, rows,
                   columns, block},
        .shift = __builtin_ctzll((uint64_t)block),
        .x_rows = x_rows,
        .padded = (columns + CHUNK - 1) / CHUNK * CHUNK,
        .bias = bias,
        .y = y,
        .dtype = dtype,
    };
    float *copy = aligned_alloc(64, (size_t)(x_rows * p.padded) * sizeof(float) + 64);
    if (!copy)
        return ENOMEM;
    reorder(x, &p, copy);
    p.x = copy;
    /* as floats, as a product of three sizes may exceed an integer */
    if (threads < 1 || (double)rows * (double)columns * (double)x_rows < FEW_PRODUCTS)
        threads = 1;
    const int64_t grain = piece_rows(&p.weight, threads);
    const int error = parallel_for(threads, rows, grain, multiply_piece, &p);
    free(copy);
    return error;
}
