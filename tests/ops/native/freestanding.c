/* What the operators need of a C library and of pool.c, for a processor without either.
 *
 * Linked with them it makes a program that an emulator calls into; linking fails where an operator
 * needs more than this. Memory comes from outside, by a supervisor call whose number is in x8:
 *
 *     1   x0 bytes, at a multiple of x1: gives their address in x0
 *     2   x0, an address of call 1 or NULL: given back
 */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#include "pool.h"

void *memcpy(void *restrict to, const void *restrict from, size_t bytes);
void *memmove(void *to, const void *from, size_t bytes);
void *memset(void *to, int byte, size_t bytes);
int memcmp(const void *a, const void *b, size_t bytes);
void *malloc(size_t bytes);
void *calloc(size_t count, size_t bytes);
void *aligned_alloc(size_t alignment, size_t bytes);
int posix_memalign(void **pointer, size_t alignment, size_t bytes);
void free(void *pointer);

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        ((char *)to)[i] = ((const char *)from)[i];
    return to;
}

void *memmove(void *to, const void *from, size_t bytes)
{
    if ((uintptr_t)to <= (uintptr_t)from)
        return memcpy(to, from, bytes);
    for (size_t i = bytes; i > 0; i--)
        ((char *)to)[i - 1] = ((const char *)from)[i - 1];
    return to;
}

void *memset(void *to, int byte, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        ((char *)to)[i] = (char)byte;
    return to;
}

int memcmp(const void *a, const void *b, size_t bytes)
{
    const unsigned char *left = a, *right = b;
    for (size_t i = 0; i < bytes; i++)
        if (left[i] != right[i])
            return left[i] - right[i];
    return 0;
}

static uint64_t supervisor(uint64_t call, uint64_t first, uint64_t second)
{
    register uint64_t x8 __asm__("x8") = call, x0 __asm__("x0") = first, x1 __asm__("x1") = second;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1) : "memory");
    return x0;
}

void *malloc(size_t bytes) { return aligned_alloc(16, bytes); }

void *aligned_alloc(size_t alignment, size_t bytes)
{
    return (void *)(uintptr_t)supervisor(1, bytes, alignment);
}

void *calloc(size_t count, size_t bytes) { return memset(malloc(count * bytes), 0, count * bytes); }

int posix_memalign(void **pointer, size_t alignment, size_t bytes)
{
    *pointer = aligned_alloc(alignment, bytes);
    return 0;
}

void free(void *pointer) { supervisor(2, (uintptr_t)pointer, 0); }

/* The last piece first: an operator may not depend on their order. */
int parallel_for(int threads, int64_t count, int64_t grain, task *run, void *context)
{
    (void)threads;
    if (count < 0 || grain < 1)
        return EINVAL;
    for (int64_t begin = (count - 1) / grain * grain; count > 0 && begin >= 0; begin -= grain)
        run(context, begin, begin + grain < count ? begin + grain : count);
    return 0;
}
