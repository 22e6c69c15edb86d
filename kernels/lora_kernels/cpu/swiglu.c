/* act(gate) * up and its gradient, in one pass: elementwise, in float32, rounded once.
 *
 * Both activations are gate * sigmoid(z), with z = gate for SiLU and, as (1 + tanh(a)) / 2 is
 * sigmoid(2a), z = 2 sqrt(2/pi) (gate + 0.044715 gate^3) for the tanh form of GELU. So there is one
 * exponential either way, and the slope is s + gate s (1 - s) dz/dgate.
 *
 * Rows may lie apart, as those of a product that gives gate and up side by side do.
 */
#include "exp.h"
#include "floats.h"
#include "pool.h"

enum { SILU = 0, GELU_TANH = 1 };
enum { PIECE = 1 << 13 }; /* elements of a row that a thread claims at once */
enum { FEW = 1 << 15 };   /* elements in all below which threads cost more than they save */

typedef struct {
    const char *gate, *up, *dout; /* dout NULL: forward */
    int64_t columns, pieces;      /* pieces a row */
    int64_t gate_stride, up_stride, dout_stride;
    int activation;
    char *out, *dup; /* of the gradient, `out` is dgate */
} gating;

LANE vf minus(vf a) { return vf_mul(a, vf_set1(-1.0f)); }

/* a where it is not above `most`, which a NaN is not either. */
LANE vf at_most(vf a, float most)
{
    const vu within = vu_add(vu_if_greater(a, vf_set1(most), 1), vu_set1(0xffffffff));
    const vu above = vu_if_greater(a, vf_set1(most), 0xffffffff);
    return vu_floats(vu_or(vu_and(vf_bits(a), within), vu_and(vf_bits(vf_set1(most)), above)));
}

/* act(g), and its derivative. */
LANE vf activate(vf g, int activation, vf *slope)
{
    const vf one = vf_set1(1.0f);
    vf z = g, dz = one;
    if (activation == GELU_TANH) {
        const vf square = vf_mul(g, g), twice = vf_set1(0x1.988454p0f); /* 2 sqrt(2/pi) */
        const vf cubic = vf_set1(0.044715f), slope_cubic = vf_set1(3 * 0.044715f);
        z = vf_mul(vf_mul(twice, g), vf_fma(cubic, square, one));
        dz = vf_mul(twice, vf_fma(slope_cubic, square, one));
    }
    /* 1 - s is e s, without the cancellation; that e stays finite keeps it from being inf 0 */
    const vf e = vf_exp(at_most(minus(z), 87.0f));
    const vf s = vf_div(one, vf_add(one, e)), value = vf_mul(g, s);
    *slope = vf_fma(vf_mul(value, vf_mul(e, s)), dz, s);
    return value;
}

LANE void gate_some(const gating *j, int dtype, int activation, int64_t row, int64_t i, int64_t n)
{
    const int64_t size = bytes_of(dtype), at = (row * j->columns + i) * size;
    const vf gate = floats_read_some(j->gate + (row * j->gate_stride + i) * size, dtype, n);
    const vf up = floats_read_some(j->up + (row * j->up_stride + i) * size, dtype, n);
    vf slope;
    const vf value = activate(gate, activation, &slope);
    if (!j->dout) {
        floats_write_some(j->out + at, dtype, vf_mul(value, up), n);
        return;
    }
    const vf dout = floats_read_some(j->dout + (row * j->dout_stride + i) * size, dtype, n);
    floats_write_some(j->out + at, dtype, vf_mul(vf_mul(dout, up), slope), n);
    floats_write_some(j->dup + at, dtype, vf_mul(dout, value), n);
}

LANE void gate_pieces(const gating *j, int dtype, int activation, int64_t begin, int64_t end)
{
    for (int64_t piece = begin; piece < end; piece++) {
        const int64_t row = piece / j->pieces, first = piece % j->pieces * PIECE;
        const int64_t stop = first + PIECE < j->columns ? first + PIECE : j->columns;
        int64_t i = first;
        for (; i + LANES <= stop; i += LANES)
            gate_some(j, dtype, activation, row, i, LANES);
        if (i < stop)
            gate_some(j, dtype, activation, row, i, stop - i);
    }
}

LANE void gate_either(void *context, int dtype, int64_t begin, int64_t end)
{
    const gating j = *(const gating *)context; /* a copy of our own: no store can change it */
    if (j.activation == SILU)
        gate_pieces(&j, dtype, SILU, begin, end);
    else
        gate_pieces(&j, dtype, GELU_TANH, begin, end);
}

static void gate_float32(void *j, int64_t begin, int64_t end)
{
    gate_either(j, LORA_FLOAT32, begin, end);
}

static void gate_bfloat16(void *j, int64_t begin, int64_t end)
{
    gate_either(j, LORA_BFLOAT16, begin, end);
}

static void gate_float16(void *j, int64_t begin, int64_t end)
{
    gate_either(j, LORA_FLOAT16, begin, end);
}

/* out = act(gate) up; or, with dout, out = dout up act'(gate) and dup = dout act(gate).
 *
 * dtype       of all of them; not float64
 * activation  0 SiLU, 1 GELU's tanh form
 * strides     from row to row, in elements; out and dup have no gaps
 * dout, dup   NULL for the forward pass
 *
 * Returns 0.
 */
LORA_EXPORT int lora_swiglu(int threads, int dtype, int activation, const void *gate,
                            int64_t gate_stride, const void *up, int64_t up_stride,
                            const void *dout, int64_t dout_stride, int64_t rows, int64_t columns,
                            void *out, void *dup)
{
    static task *const run[] = {[LORA_FLOAT32] = gate_float32,
                                [LORA_BFLOAT16] = gate_bfloat16,
                                [LORA_FLOAT16] = gate_float16};
    gating j = {.gate = gate,
                .up = up,
                .dout = dout,
                .columns = columns,
                .pieces = (columns + PIECE - 1) / PIECE,
                .gate_stride = gate_stride,
                .up_stride = up_stride,
                .dout_stride = dout_stride,
                .activation = activation,
                .out = out,
                .dup = dup};
    const int64_t each = columns < PIECE && columns > 0 ? PIECE / columns : 1;
    return parallel_for(rows * columns < FEW ? 1 : threads, rows * j.pieces, each, run[dtype], &j);
}
