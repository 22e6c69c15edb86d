/* How fast this machine reads memory: what no product with a weight can beat.
 *
 * Adds up all 64-bit words of a buffer, modulo 2^64, so that nothing can be left out: the caller
 * knows the sum. Four vectors of 64 bytes are added to four sums, a fraction of what a core can
 * add in the time in which the memory delivers them, on any instruction set.
 *
 * The hardware prefetches what is read in order, but only within a page of 4 KiB, and each core
 * keeps as many lines under way as it likes. Asking for a line `ahead` bytes early in software
 * crosses pages and is worth up to a third on virtual machines. Which distance is best, and how
 * large the pieces had better be, depends on the machine: stream.py tries several and keeps the
 * best. The loop runs on the operators' own threads (pool.h), so that what waking them costs is
 * on both sides of the comparison.
 *
 * Against STREAM (McCalpin), whose kernels copy and scale: those count the bytes that are written
 * as well, and a weight is only read.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>

#include "pool.h"

enum { STEP = 256 }; /* bytes: four vectors, four cache lines */

typedef uint64_t words8 __attribute__((vector_size(64), aligned(1), may_alias));

typedef struct {
    const char *bytes;
    int64_t ahead;
    _Atomic uint64_t sum;
} reading;

/* By pointer: how a vector of 64 bytes would be passed depends on the instruction set. */
static inline uint64_t across(const words8 *v)
{
    uint64_t sum = 0;
    for (int i = 0; i < 8; i++)
        sum += (*v)[i];
    return sum;
}

/* The sum of steps `begin` to `end` - 1; inlined, so that without `ahead` there is no prefetch. */
static inline __attribute__((always_inline)) uint64_t add_up(const char *bytes, int64_t begin,
                                                             int64_t end, int64_t ahead)
{
    words8 sums[4] = {{0}, {0}, {0}, {0}};
    for (int64_t i = begin; i < end; i++) {
        const char *step = bytes + i * STEP;
        for (int j = 0; j < 4; j++) {
            if (ahead)
                __builtin_prefetch(step + ahead + 64 * j);
            sums[j] += *(const words8 *)(step + 64 * j);
        }
    }
    sums[0] += sums[1] + sums[2] + sums[3];
    return across(&sums[0]);
}

static void read_plainly(void *context, int64_t begin, int64_t end)
{
    reading *job = context;
    atomic_fetch_add(&job->sum, add_up(job->bytes, begin, end, 0));
}

static void read_ahead(void *context, int64_t begin, int64_t end)
{
    reading *job = context;
    atomic_fetch_add(&job->sum, add_up(job->bytes, begin, end, job->ahead));
}

/* Reads `count` bytes, a multiple of 256, in pieces of `piece` bytes, likewise.
 *
 * ahead  how many bytes early a line is asked for; 0: not at all
 * sum    gets the sum of the 64-bit words
 *
 * Returns 0, or EINVAL for sizes that are no multiples.
 */
__attribute__((visibility("default"))) int lora_stream(int threads, const void *bytes, int64_t count,
                                                       int64_t piece, int64_t ahead, uint64_t *sum)
{
    if (count % STEP || piece % STEP)
        return EINVAL;
    reading job = {.bytes = bytes, .ahead = ahead, .sum = 0};
    int failed = parallel_for(threads, count / STEP, piece / STEP,
                              ahead ? read_ahead : read_plainly, &job);
    *sum = atomic_load(&job.sum);
    return failed;
}
