/* What the emulator has to notice: see test_native_emulator.py. */
#include <stdint.h>
#include <stdlib.h>

int read_at(const char *p, int64_t i);
int write_at(char *p, int64_t i);
int sum_of(int32_t a, float x, int64_t b, int c, int d, int e, int f, int g, int h, float y, int i);
int keep_memory(void);
int use_freed(void);
int run_past_memory(int64_t i);
int tell_address(char *p);
int dot_product(void);
int half_sum(void);
int atomic_sum(int32_t *p);

int read_at(const char *p, int64_t i)
{
    *(const volatile char *)(p + i);
    return 0;
}

int write_at(char *p, int64_t i)
{
    p[i] = 1;
    return 0;
}

/* More arguments than there are registers for. */
int sum_of(int32_t a, float x, int64_t b, int c, int d, int e, int f, int g, int h, float y, int i)
{
    return a + 2 * (int)b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + (int)(x / y);
}

int keep_memory(void)
{
    volatile char *p = malloc(8);
    *p = 1;
    return 0;
}

int use_freed(void)
{
    volatile char *p = malloc(8);
    free((void *)(uintptr_t)p);
    *p = 1;
    return 0;
}

int run_past_memory(int64_t i)
{
    volatile char *p = aligned_alloc(64, 128);
    p[i] = 1;
    free((void *)(uintptr_t)p);
    return 0;
}

int tell_address(char *p)
{
    *p = (char)((uintptr_t)p >> 4);
    return 0;
}

/* What ARMv8.0 lacks: sdot v0.4s, v1.16b, v2.16b; fadd v0.8h, v1.8h, v2.8h; ldadd w1, w2, [x0] */
int dot_product(void)
{
    __asm__ volatile(".inst 0x4e829420" ::: "v0");
    return 0;
}

int half_sum(void)
{
    __asm__ volatile(".inst 0x4e421420" ::: "v0");
    return 0;
}

int atomic_sum(int32_t *p)
{
    register int32_t *x0 __asm__("x0") = p;
    __asm__ volatile(".inst 0xb8210002" : "+r"(x0) : : "x2", "memory");
    return 0;
}
