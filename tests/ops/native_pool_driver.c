/* Loops that a test can look into: test_native_pool.py builds this with pool.c, as a library that
 * Python calls and as a program for the sanitizers.
 *
 * Nothing in the tasks is atomic unless it has to be: two threads that run one index, or a result
 * that the caller does not see, are then data races, which ThreadSanitizer reports.
 */
#define _GNU_SOURCE /* for affinities */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pool.h"

int visit(int threads, int64_t count, int64_t grain, int32_t *visits);
int64_t sum(int threads, int64_t count, int64_t grain);
int nested(int threads, int64_t count, int32_t *visits);
int meet(int threads, int count, int patience);
int pieces(int threads, int64_t count, int64_t grain, int64_t *ends);
int fail_after(int made);
int place(int processor, uint64_t processors);
int workers_told(void);
uint64_t told_to_run_on(void);

/* visits[i] counts how often index i was run. */
static void visit_task(void *context, int64_t begin, int64_t end)
{
    int32_t *visits = context;
    for (int64_t i = begin; i < end; i++)
        visits[i]++;
}

int visit(int threads, int64_t count, int64_t grain, int32_t *visits)
{
    return parallel_for(threads, count, grain, visit_task, visits);
}

/* The sum of i * i % 1000 over [0, count), from one slot a piece that the caller adds up. */
typedef struct {
    int64_t grain, *partial;
} sum_job;

static void sum_task(void *context, int64_t begin, int64_t end)
{
    sum_job *job = context;
    int64_t total = 0;
    for (int64_t i = begin; i < end; i++)
        total += i * i % 1000;
    job->partial[begin / job->grain] = total;
}

int64_t sum(int threads, int64_t count, int64_t grain)
{
    int64_t slots = (count + grain - 1) / grain, total = 0;
    sum_job job = {grain, malloc((size_t)slots * sizeof(int64_t) + 1)};
    if (job.partial == NULL || parallel_for(threads, count, grain, sum_task, &job) != 0)
        total = -1;
    for (int64_t i = 0; total >= 0 && i < slots; i++)
        total += job.partial[i];
    free(job.partial);
    return total;
}

/* A loop in a loop: row r of visits, count entries, is run by an inner loop. */
typedef struct {
    int threads;
    int64_t count;
    int32_t *visits;
} nested_job;

static void nested_task(void *context, int64_t begin, int64_t end)
{
    nested_job *job = context;
    for (int64_t row = begin; row < end; row++)
        parallel_for(job->threads, job->count, 3, visit_task, job->visits + row * job->count);
}

int nested(int threads, int64_t count, int32_t *visits)
{
    nested_job job = {threads, count, visits};
    return parallel_for(threads, count, 1, nested_task, &job);
}

/* Every piece waits until `wanted` run at once, or for `patience` milliseconds. */
typedef struct {
    int wanted, patience;
    atomic_int running, most;
} meeting;

static void meet_task(void *context, int64_t begin, int64_t end)
{
    (void)begin;
    (void)end;
    meeting *job = context;
    int running = atomic_fetch_add(&job->running, 1) + 1, most = atomic_load(&job->most);
    while (running > most && !atomic_compare_exchange_weak(&job->most, &most, running)) {
    }
    for (int i = 0; i < job->patience && atomic_load(&job->most) < job->wanted; i++)
        usleep(1000);
    atomic_fetch_sub(&job->running, 1);
}

/* The most of `count` pieces that ran at once. */
int meet(int threads, int count, int patience)
{
    meeting job = {.wanted = count, .patience = patience};
    parallel_for(threads, count, 1, meet_task, &job);
    return atomic_load(&job.most);
}

/* ends[b] is where the piece that began at b ended; 0 where none began. */
static void pieces_task(void *context, int64_t begin, int64_t end)
{
    ((int64_t *)context)[begin] = end;
}

int pieces(int threads, int64_t count, int64_t grain, int64_t *ends)
{
    return parallel_for(threads, count, grain, pieces_task, ends);
}

#ifdef FAILING_THREADS
/* pool.c is built with -Dpthread_create=try_to_create: only so many threads can be had. */
#undef pthread_create
int pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
static int remaining = 1 << 30;

int fail_after(int made)
{
    remaining = made;
    return 0;
}

int try_to_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                  void *argument)
{
    return remaining-- > 0 ? pthread_create(thread, attributes, run, argument) : 11;
}
#endif

#ifdef PLACES
/* pool.c is built with its three calls about processors under other names: these. */
static int here, told;
static uint64_t allowed, elsewhere;

/* Where the caller is and may be, as bits (none: nobody knows); forgets what workers were told. */
int place(int processor, uint64_t processors)
{
    here = processor;
    allowed = processors;
    told = 0;
    return 0;
}

int workers_told(void) { return told; }
uint64_t told_to_run_on(void) { return elsewhere; }
int sched_getcpu(void) { return here; }

int sched_getaffinity(pid_t process, size_t size, cpu_set_t *set)
{
    (void)process;
    memset(set, 0, size);
    memcpy(set, &allowed, sizeof allowed);
    return allowed ? 0 : -1;
}

int pthread_setaffinity_np(pthread_t thread, size_t size, const cpu_set_t *set)
{
    (void)thread;
    (void)size;
    memcpy(&elsewhere, set, sizeof elsewhere);
    told++;
    return 0;
}
#endif

#ifdef PROGRAM
/* For the sanitizers. First one caller, whose loops last long enough for workers to join and end
 * at all distances from their last pieces; then everything at once: callers that compete, loops so
 * short that workers come too late for them, nested loops, more threads and fewer, and forks. */
enum { LONG_ROUNDS = 300, LONG = 1 << 15, CALLERS = 3, ROUNDS = 400, WIDTH = 61 };

static int rounds_of_one_caller(void)
{
    static int32_t visits[LONG];
    for (int round = 0; round < LONG_ROUNDS; round++) {
        visit(2 + round % 3, LONG, 256 + round, visits);
        for (int64_t i = 0; i < LONG; i++) {
            if (visits[i] != round + 1)
                return 1;
        }
    }
    return 0;
}

static int forked_child_counts(int threads)
{
    pid_t child = fork();
    if (child == 0)
        _exit(sum(threads, 1000, 7) != sum(1, 1000, 7));
    int status = -1;
    return waitpid(child, &status, 0) == child && status == 0;
}

static void *one_of_many_callers(void *seed)
{
    int32_t visits[WIDTH * WIDTH];
    for (int round = 0; round < ROUNDS; round++) {
        int threads = 1 + (round + *(int *)seed) % 5;
        int64_t count = 2 + round % (WIDTH - 2);
        memset(visits, 0, sizeof visits);
        visit(threads, count, 1 + round % 4, visits);
        for (int64_t i = 0; i < count; i++) {
            if (visits[i] != 1)
                return seed;
        }
        if (round % 50 == 0) {
            nested(threads, WIDTH, visits);
            if (sum(threads, 1000, 7) != sum(1, 1000, 7))
                return seed;
        }
        if (FORKS && round % 100 == 99 && !forked_child_counts(threads))
            return seed;
    }
    return NULL;
}

int main(void)
{
    pthread_t callers[CALLERS];
    int seeds[CALLERS], failed = rounds_of_one_caller();
    for (int i = 0; i < CALLERS; i++) {
        seeds[i] = i;
        pthread_create(&callers[i], NULL, one_of_many_callers, &seeds[i]);
    }
    for (int i = 0; i < CALLERS; i++) {
        void *wrong = NULL;
        pthread_join(callers[i], &wrong);
        failed |= wrong != NULL;
    }
    return failed;
}
#endif
