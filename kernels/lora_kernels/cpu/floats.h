/* Elements of a tensor as LANES floats, and back: whole vectors, and what is left at the end.
 *
 * `dtype` should be a constant where these are called in a loop: they are inlined, and the choice
 * is then made by the compiler. The pointers need not be aligned. No float64.
 */
#ifndef LORA_FLOATS_H
#define LORA_FLOATS_H

#include "lanes.h"
#include "weight4.h"

LANE vf floats_read(const void *p, int dtype)
{
    if (dtype == LORA_BFLOAT16)
        return vf_load_bf16(p);
    if (dtype == LORA_FLOAT16)
        return vf_load_f16(p);
    return vf_load(p);
}

LANE void floats_write(void *p, int dtype, vf a)
{
    if (dtype == LORA_BFLOAT16)
        vf_store_bf16(p, a);
    else if (dtype == LORA_FLOAT16)
        vf_store_f16(p, a);
    else
        vf_store(p, a);
}

/* The first `count` lanes, at most LANES; the others are 0. */
LANE vf floats_read_some(const void *p, int dtype, int64_t count)
{
    if (count >= LANES)
        return floats_read(p, dtype);
    float whole[LANES] = {0};
    memcpy(whole, p, (size_t)(count * bytes_of(dtype)));
    return floats_read(whole, dtype);
}

LANE void floats_write_some(void *p, int dtype, vf a, int64_t count)
{
    if (count >= LANES) {
        floats_write(p, dtype, a);
        return;
    }
    float whole[LANES];
    floats_write(whole, dtype, a);
    memcpy(p, whole, (size_t)(count * bytes_of(dtype)));
}

/* a, as it is after rounding to the dtype. */
LANE vf floats_round(vf a, int dtype)
{
    if (dtype == LORA_FLOAT32)
        return a;
    float rounded[LANES];
    floats_write(rounded, dtype, a);
    return floats_read(rounded, dtype);
}

#endif
