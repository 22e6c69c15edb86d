/* Softmax cross-entropy of rows of logits, and in their place its gradient.
 *
 * A row is read twice. The first pass keeps the largest logit so far and the sum of exponentials
 * under it; when a block of the row brings a larger one, the sum is scaled to it. The second pass
 * writes the gradient over the logits. A row of 128,256 words in 16 bits is 256 KB, so it comes
 * from the second-level cache the second time: 2 bytes read and 2 written a logit, from memory.
 *
 * The exponentials are exp.h's, within 2 units in the last place, and a block's sum of them goes
 * into a double: with LANES sums a block no sum of floats is longer than BLOCK / LANES. The
 * logarithm of the whole sum, one a row, is computed in double here. So nothing depends on the C
 * library, and a row gives the same bits on any number of threads, alone or among others.
 *
 * tanh for a cap: (1 - e) / (1 + e) with e = exp(-2 |x|) would lose the digits of small numbers,
 * which are x (1 + x² P(x²)) with P of degree 4, fitted on |x| < 0.55 (relative error 1e-9).
 *
 * A logit of -inf adds nothing; one of +inf or NaN makes the row NaN, as in PyTorch.
 */
#include "exp.h"
#include "floats.h"
#include "lanes.h"
#include "pool.h"
#include "weight4.h"

enum {
    BLOCK = 64 * LANES,    /* logits between two looks at the maximum */
    PIECE_LOGITS = 1 << 16 /* that a thread takes at once, at least */
};

#define INFINITE __builtin_inff()

typedef struct {
    uint8_t *logits; /* rows of `columns`, of words first .. first + columns - 1 */
    int64_t columns, first, classes;
    const int64_t *targets;
    float *losses;         /* one a row, or NULL: norms are given */
    float *norms;          /* two a row: the largest y, and the sum of exp(y - largest) */
    float scale, cap;      /* y = cap tanh(scale z / cap); cap 0: y = scale z */
    double smoothing;
    int gradient;
} job;

/* --- functions of a vector ------------------------------------------------------------------- */

LANE vf choose(vf where_less, vf than, vf a, vf b)
{
    const vu yes = vu_if_greater(than, where_less, 1), all = vu_set1(0xffffffff);
    const vu taken = vu_and(vf_bits(a), vu_if_greater(than, where_less, 0xffffffff));
    return vu_floats(vu_or(taken, vu_and(vf_bits(b), vu_add(yes, all))));
}

/* The larger; b where a is NaN. */
LANE vf larger(vf a, vf b) { return choose(b, a, a, b); }

LANE vf vf_tanh(vf x)
{
    const vf one = vf_set1(1.0f), size = vu_floats(vu_and(vf_bits(x), vu_set1(0x7fffffff)));
    const vf e = vf_exp(vf_mul(size, vf_set1(-2.0f)));
    const vf far = vf_div(vf_fma(e, vf_set1(-1.0f), one), vf_add(e, one));
    const vf z = vf_mul(x, x);
    vf p = vf_fma(vf_set1(-0x1.9bba4ep-8f), z, vf_set1(0x1.595682p-6f));
    p = vf_fma(p, z, vf_set1(-0x1.b92bbap-5f));
    p = vf_fma(p, z, vf_set1(0x1.110d3cp-3f));
    p = vf_fma(p, z, vf_set1(-0x1.55554cp-2f));
    const vf near = vf_fma(vf_mul(p, z), size, size);
    const vf magnitude = choose(size, vf_set1(0.55f), near, far);
    return vu_floats(vu_or(vf_bits(magnitude), vu_and(vf_bits(x), vu_set1(0x80000000))));
}

/* y of some logits; *slope is dy/dz. */
LANE vf judged(const job *j, vf z, int capped, vf *slope)
{
    *slope = vf_set1(j->scale);
    if (!capped)
        return vf_mul(z, vf_set1(j->scale));
    const vf t = vf_tanh(vf_mul(z, vf_set1(j->scale / j->cap)));
    *slope = vf_mul(vf_fma(vf_mul(t, t), vf_set1(-1.0f), vf_set1(1.0f)), vf_set1(j->scale));
    return vf_mul(t, vf_set1(j->cap));
}

LANE float first_of(vf a)
{
    float lanes[LANES];
    vf_store(lanes, a);
    return lanes[0];
}

LANE float largest_of(vf a)
{
    float lanes[LANES], most;
    vf_store(lanes, a);
    most = lanes[0];
    for (int i = 1; i < LANES; i++)
        most = lanes[i] > most ? lanes[i] : most;
    return most;
}

/* log x for 1 <= x: 2 artanh((f - 1) / (f + 1)) of the fraction f in [0.7, 1.5), whose square is
 * below 0.04, so that 9 terms leave 1e-14. NaN for what is not finite. */
static double log_of(double x)
{
    uint64_t bits;
    double f, sum = 0;
    if (!(x < __builtin_inf()))
        return __builtin_nan("");
    memcpy(&bits, &x, sizeof bits);
    int64_t power = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffff) | (uint64_t)1023 << 52;
    memcpy(&f, &bits, sizeof f);
    if (f > 1.4) {
        f /= 2;
        power++;
    }
    const double s = (f - 1) / (f + 1);
    for (int i = 17; i > 0; i -= 2)
        sum = sum * s * s + 1.0 / i;
    return 2 * s * sum + (double)power * 0x1.62e42fefa39efp-1;
}

/* --- one row --------------------------------------------------------------------------------- */

typedef struct {
    float most;    /* the largest y */
    double total;  /* the sum of exp(y - most) */
    double logits; /* the sum of y */
} statistics;

/* Take in a block of y, padded to whole vectors by what adds nothing. */
LANE void take_block(statistics *s, const float *y, int64_t vectors, vf tops)
{
    const float top = largest_of(tops);
    if (top > s->most) {
        if (s->most > -INFINITE)
            s->total *= (double)first_of(vf_exp(vf_set1(s->most - top)));
        s->most = top;
    }
    const vf less = vf_set1(s->most > -INFINITE ? -s->most : 0.0f);
    vf even = vf_set1(0.0f), odd = vf_set1(0.0f);
    for (int64_t i = 0; i < vectors; i += 2) {
        even = vf_add(even, vf_exp(vf_add(vf_load(y + i * LANES), less)));
        if (i + 1 < vectors)
            odd = vf_add(odd, vf_exp(vf_add(vf_load(y + (i + 1) * LANES), less)));
    }
    s->total += (double)vf_sum(vf_add(even, odd));
}

LANE statistics read_row(const job *j, const uint8_t *row, int dtype, int capped)
{
    statistics s = {.most = -INFINITE};
    const int64_t size = bytes_of(dtype);
    for (int64_t begin = 0; begin < j->columns; begin += BLOCK) {
        const int64_t count = j->columns - begin < BLOCK ? j->columns - begin : BLOCK;
        float y[BLOCK];
        vf tops = vf_set1(-INFINITE), sum = vf_set1(0.0f), slope;
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            const vf a = judged(j, floats_read(row + (begin + i) * size, dtype), capped, &slope);
            vf_store(y + i, a);
            tops = larger(a, tops);
            sum = vf_add(sum, a);
        }
        s.logits += (double)vf_sum(sum);
        if (i < count) {
            const vf z = floats_read_some(row + (begin + i) * size, dtype, count - i);
            vf_store(y + i, judged(j, z, capped, &slope));
            for (int64_t k = i; k < count; k++)
                s.logits += (double)y[k];
            for (int64_t k = count; k < i + LANES; k++)
                y[k] = -INFINITE;
            tops = larger(vf_load(y + i), tops);
            i += LANES;
        }
        take_block(&s, y, i / LANES, tops);
    }
    if (!(s.most > -INFINITE)) /* nothing but -inf, or NaN beside it */
        s.total = __builtin_nan("");
    return s;
}

/* dz of some logits but for the target's 1 - smoothing, which is `less`. */
LANE vf gradient(const job *j, vf z, int capped, const float *norms, float less)
{
    vf slope;
    const vf y = judged(j, z, capped, &slope);
    const vf p = vf_mul(vf_exp(vf_add(y, vf_set1(-norms[0]))), vf_set1(1.0f / norms[1]));
    const vf even = vf_add(p, vf_set1((float)(-j->smoothing / (double)j->classes)));
    return vf_mul(vf_add(even, vf_set1(-less)), slope);
}

LANE void write_row(const job *j, uint8_t *row, int64_t target, const float *norms, int dtype,
                    int capped)
{
    const int64_t size = bytes_of(dtype);
    const int inside = target >= 0 && target < j->columns;
    vf own = vf_set1(0.0f);
    if (inside) { /* before it is overwritten */
        own = floats_read_some(row + target * size, dtype, 1);
        own = gradient(j, own, capped, norms, (float)(1 - j->smoothing));
    }
    int64_t i = 0;
    for (; i + LANES <= j->columns; i += LANES) {
        const vf z = floats_read(row + i * size, dtype);
        floats_write(row + i * size, dtype, gradient(j, z, capped, norms, 0.0f));
    }
    if (i < j->columns) {
        const vf z = floats_read_some(row + i * size, dtype, j->columns - i);
        const vf dz = gradient(j, z, capped, norms, 0.0f);
        floats_write_some(row + i * size, dtype, dz, j->columns - i);
    }
    if (inside)
        floats_write_some(row + target * size, dtype, own, 1);
}

LANE float loss_of(const job *j, const uint8_t *row, int64_t target, const statistics *s,
                   int dtype, int capped)
{
    vf slope;
    if (target < 0 || target >= j->columns)
        return __builtin_nanf("");
    const vf z = floats_read_some(row + target * bytes_of(dtype), dtype, 1);
    const double y = (double)first_of(judged(j, z, capped, &slope)), top = (double)s->most;
    double loss = (top - y) * (1 - j->smoothing) + log_of(s->total);
    if (j->smoothing > 0) /* else a logit of -inf would make 0 times infinity */
        loss += (top - s->logits / (double)j->columns) * j->smoothing;
    return (float)loss;
}

/* --- all of them ----------------------------------------------------------------------------- */

/* An integer that need not be aligned. */
LANE int64_t word_of(const int64_t *p)
{
    int64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

LANE void some_rows(const job *j, int64_t begin, int64_t end, int dtype, int capped)
{
    for (int64_t i = begin; i < end; i++) {
        uint8_t *row = j->logits + i * j->columns * bytes_of(dtype);
        const int64_t target = word_of(j->targets + i) - j->first;
        if (j->losses) {
            const statistics s = read_row(j, row, dtype, capped);
            j->losses[i] = loss_of(j, row, target, &s, dtype, capped);
            j->norms[2 * i] = s.most;
            j->norms[2 * i + 1] = (float)s.total;
        }
        if (j->gradient) {
            float norms[2];
            memcpy(norms, j->norms + 2 * i, sizeof norms);
            write_row(j, row, target, norms, dtype, capped);
        }
    }
}

#define ROWS_OF(name, dtype)                                                                       \
    static void name(void *context, int64_t begin, int64_t end)                                    \
    {                                                                                              \
        const job *j = context;                                                                    \
        if (j->cap > 0)                                                                            \
            some_rows(j, begin, end, dtype, 1);                                                    \
        else                                                                                       \
            some_rows(j, begin, end, dtype, 0);                                                    \
    }

ROWS_OF(rows_float32, LORA_FLOAT32)
ROWS_OF(rows_bfloat16, LORA_BFLOAT16)
ROWS_OF(rows_float16, LORA_FLOAT16)

/* Judge `rows` rows of `columns` logits of `dtype`, words first .. first + columns - 1 of
 * `classes`.
 *
 * targets   a word a row; outside the columns none is taken off, and the loss is NaN
 * losses    one a row, written, and norms with them; or NULL: norms are read
 * norms     two a row: m, the largest y, and the sum of exp(y - m)
 * scale     a factor on the logits
 * cap       c of c tanh(· / c), 0 for none
 * smoothing of the targets
 * gradient  not 0: the logits are overwritten by the gradient of the sum of the losses
 *
 * What is only read need not be aligned. Returns 0.
 */
LORA_EXPORT int lora_cross_entropy(int threads, int dtype, void *logits, int64_t rows,
                                   int64_t columns, int64_t first, int64_t classes,
                                   const int64_t *targets, float *losses, float *norms,
                                   float scale, float cap, double smoothing, int gradient)
{
    static task *const run[] = {[LORA_FLOAT32] = rows_float32,
                                [LORA_BFLOAT16] = rows_bfloat16,
                                [LORA_FLOAT16] = rows_float16};
    job j = {.logits = logits,
             .columns = columns,
             .first = first,
             .classes = classes,
             .targets = targets,
             .losses = losses,
             .norms = norms,
             .scale = scale,
             .cap = cap,
             .smoothing = smoothing,
             .gradient = gradient};
    const int64_t grain = 1 + PIECE_LOGITS / (columns + 1);
    return parallel_for(threads, rows, grain, run[dtype], &j);
}
