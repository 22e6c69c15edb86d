/* RMS norm, a row at a time: y = w round(x r) with r = 1 / sqrt(mean(x^2) + eps).
 *
 * A row is read once from memory and once more from the first-level cache: the first pass adds up
 * its squares, the second writes. Backward does the same with x and dy:
 *
 *     g = dy w     dx = r (g - x r mean(g x r))     dw = sum over rows of dy round(x r)
 *
 * r is summed up again instead of being kept. All in float32. `round` is to the dtype of x, as
 * Hugging Face has it before the product with w. dw is summed for each piece of rows by itself;
 * the caller adds those up, in an order that does not depend on threads.
 */
#include "floats.h"
#include "pool.h"

enum { CHAINS = 4 };      /* sums side by side, so that one need not wait for another */
enum { FEW = 1 << 15 };   /* elements in all below which threads cost more than they save */

typedef struct {
    const char *x, *dy;
    int64_t rows, columns, x_stride, grain;
    const float *weight;
    float eps;
    int round, out_dtype; /* of y and dy */
    char *out;            /* y, or dx, or NULL */
    float *dw;            /* a row of `columns` for each piece, or NULL */
} norm;

/* The sums of a^2 and of a b over a row, b = dy w, or 0 without dy. */
LANE void sums(const norm *j, const char *x, const char *dy, int dtype, int out_dtype, float *squares,
               float *products)
{
    vf square[CHAINS], product[CHAINS];
    for (int c = 0; c < CHAINS; c++)
        square[c] = product[c] = vf_set1(0.0f);
    int64_t i = 0;
    for (; i < j->columns; i += CHAINS * LANES) {
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++) {
            const int64_t at = i + c * LANES, left = j->columns - at;
            if (left <= 0)
                break;
            const vf a = floats_read_some(x + at * bytes_of(dtype), dtype, left);
            square[c] = vf_fma(a, a, square[c]);
            if (dy) {
                const vf d = floats_read_some(dy + at * bytes_of(out_dtype), out_dtype, left);
                const vf w = floats_read_some(j->weight + at, LORA_FLOAT32, left);
                product[c] = vf_fma(vf_mul(d, w), a, product[c]);
            }
        }
    }
    *squares = vf_sum(vf_add(vf_add(square[0], square[1]), vf_add(square[2], square[3])));
    *products = vf_sum(vf_add(vf_add(product[0], product[1]), vf_add(product[2], product[3])));
}

LANE vf rounded(const norm *j, vf a, int dtype) { return j->round ? floats_round(a, dtype) : a; }

LANE void forward_rows(const norm *j, int dtype, int out_dtype, int64_t begin, int64_t end)
{
    for (int64_t row = begin; row < end; row++) {
        const char *x = j->x + row * j->x_stride * bytes_of(dtype);
        char *y = j->out + row * j->columns * bytes_of(out_dtype);
        float squares, unused;
        sums(j, x, NULL, dtype, out_dtype, &squares, &unused);
        const float mean = squares / (float)j->columns + j->eps;
        const vf r = vf_set1(1.0f / __builtin_sqrtf(mean));
        for (int64_t i = 0; i < j->columns; i += LANES) {
            const int64_t left = j->columns - i;
            const vf a = vf_mul(floats_read_some(x + i * bytes_of(dtype), dtype, left), r);
            const vf w = floats_read_some(j->weight + i, LORA_FLOAT32, left);
            const vf out = vf_mul(rounded(j, a, dtype), w);
            floats_write_some(y + i * bytes_of(out_dtype), out_dtype, out, left);
        }
    }
}

LANE void backward_rows(const norm *j, int dtype, int out_dtype, int64_t begin, int64_t end)
{
    float *dw = j->dw ? j->dw + begin / j->grain * j->columns : NULL;
    if (dw)
        memset(dw, 0, (size_t)j->columns * sizeof *dw);
    for (int64_t row = begin; row < end; row++) {
        const char *x = j->x + row * j->x_stride * bytes_of(dtype);
        const char *dy = j->dy + row * j->columns * bytes_of(out_dtype);
        float squares, products;
        sums(j, x, dy, dtype, out_dtype, &squares, &products);
        const float columns = (float)j->columns;
        const float root = 1.0f / __builtin_sqrtf(squares / columns + j->eps);
        const vf r = vf_set1(root), share = vf_set1(-(products * root / columns));
        for (int64_t i = 0; i < j->columns; i += LANES) {
            const int64_t left = j->columns - i;
            const vf a = vf_mul(floats_read_some(x + i * bytes_of(dtype), dtype, left), r);
            const vf d = floats_read_some(dy + i * bytes_of(out_dtype), out_dtype, left);
            if (j->out) {
                const vf g = vf_mul(d, floats_read_some(j->weight + i, LORA_FLOAT32, left));
                char *dx = j->out + (row * j->columns + i) * bytes_of(dtype);
                floats_write_some(dx, dtype, vf_mul(r, vf_fma(a, share, g)), left);
            }
            if (dw) {
                const vf sum = floats_read_some(dw + i, LORA_FLOAT32, left);
                const vf more = vf_fma(d, rounded(j, a, dtype), sum);
                floats_write_some(dw + i, LORA_FLOAT32, more, left);
            }
        }
    }
}

LANE void rows_of(void *context, int dtype, int64_t begin, int64_t end)
{
    const norm j = *(const norm *)context; /* a copy of our own: no store can change it */
    if (j.dy && j.out_dtype == dtype)
        backward_rows(&j, dtype, dtype, begin, end);
    else if (j.dy)
        backward_rows(&j, dtype, LORA_FLOAT32, begin, end);
    else if (j.out_dtype == dtype)
        forward_rows(&j, dtype, dtype, begin, end);
    else
        forward_rows(&j, dtype, LORA_FLOAT32, begin, end);
}

static void rows_float32(void *j, int64_t begin, int64_t end)
{
    rows_of(j, LORA_FLOAT32, begin, end);
}

static void rows_bfloat16(void *j, int64_t begin, int64_t end)
{
    rows_of(j, LORA_BFLOAT16, begin, end);
}

static void rows_float16(void *j, int64_t begin, int64_t end)
{
    rows_of(j, LORA_FLOAT16, begin, end);
}

/* Normalise rows; or, with dy, give the gradients of that.
 *
 * dtype      of x and dx; not float64
 * out_dtype  of y and dy: the same, or float32
 * round      whether x r is rounded to `dtype` before the product with the weight
 * dy         (rows, columns) without gaps, or NULL for the forward pass
 * x_stride   from row to row of x, in elements
 * weight     `columns` floats
 * grain      rows that a thread claims at once
 * out        y (rows, columns); of the gradient, dx or NULL
 * dw         (rows / grain rounded up, columns) floats, or NULL
 *
 * Returns 0.
 */
LORA_EXPORT int lora_rms_norm(int threads, int dtype, int out_dtype, int round, const void *dy,
                              const void *x, int64_t x_stride, const float *weight, float eps,
                              int64_t rows, int64_t columns, int64_t grain, void *out, float *dw)
{
    static task *const run[] = {[LORA_FLOAT32] = rows_float32,
                                [LORA_BFLOAT16] = rows_bfloat16,
                                [LORA_FLOAT16] = rows_float16};
    norm j = {.x = x,
              .dy = dy,
              .rows = rows,
              .columns = columns,
              .x_stride = x_stride,
              .grain = grain,
              .weight = weight,
              .eps = eps,
              .round = round,
              .out_dtype = out_dtype,
              .out = out,
              .dw = dw};
    return parallel_for(rows * columns < FEW ? 1 : threads, rows, grain, run[dtype], &j);
}
