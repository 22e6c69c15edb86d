/* A parallel loop on sleeping threads: see pool.h for what it promises and why it exists.
 *
 * There is one pool. `taken` says that a caller has it; that caller owns the loop, which lies on
 * its stack. The lock guards the door, not the work: pieces are claimed by one atomic addition.
 *
 *     caller                                worker
 *     take the pool                         sleep until the door is open
 *     open the door, wake two               join: a seat less, one more inside   (under the lock)
 *     claim and run pieces                  wake two more, if seats are left
 *     close the door                        claim and run pieces
 *     wait until nobody is inside           close the door, leave; the last one wakes the caller
 *
 * Why a loop may lie on a stack: a worker finds it only through the door and under the lock, where
 * it is counted as inside in the same breath; the caller returns only after it has closed the door
 * and then seen nobody inside. A worker that wakes late finds the door closed, or open for a later
 * loop, and never hears of the one it was woken for. For the same reason no two loops can be
 * mistaken for each other when one lies where another did: while a worker is inside, its loop has
 * not ended.
 *
 * Why no wake-up is lost: whatever someone sleeps on (`door`, `inside`) is changed under the lock,
 * and looked at under the lock before sleeping.
 *
 * Why the caller sees what the workers wrote: leaving is a release of `inside`, and the caller
 * acquires it, with the lock or without. What the caller wrote before, workers see through the
 * lock that they join under. The counter of pieces therefore needs no order of its own.
 */
#define _GNU_SOURCE /* for affinities */
#include "pool.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

enum {
    STACK_BYTES = 1 << 20, /* address space; only what is touched becomes memory */
    SPINS = 256,           /* pauses before sleeping: 3 to 12 µs on x86, less on ARM */
    MOST_WORKERS = 1023,   /* more threads than that do without the rest */
    WOKEN_BY_EACH = 2      /* a tree of wake-ups: no one, the caller least, wakes all the others */
};

typedef struct {
    task *run;
    void *context;
    int64_t count, grain, pieces;
    _Atomic int64_t next; /* the first piece that nobody has claimed */
} loop;

typedef struct {
    atomic_flag taken;
    int workers; /* threads that exist; whoever has the pool may read and change these */
    pthread_t threads[MOST_WORKERS];
#ifdef __linux__
    int placed;          /* workers that were told where to run, */
    cpu_set_t elsewhere; /* and where */
#endif
    pthread_mutex_t lock;
    pthread_cond_t opened; /* workers sleep on it */
    pthread_cond_t left;   /* the caller sleeps on it */
    loop *door;            /* the loop that workers may join; NULL: closed */
    int seats;             /* how many more may join it */
    atomic_int inside;     /* workers that have joined and not left */
} pool_state;

#define EMPTY_POOL                                                                                 \
    {                                                                                              \
        .taken = ATOMIC_FLAG_INIT, .lock = PTHREAD_MUTEX_INITIALIZER,                              \
        .opened = PTHREAD_COND_INITIALIZER, .left = PTHREAD_COND_INITIALIZER                       \
    }

static pool_state pool = EMPTY_POOL;

/* A forked child has none of the workers, and the lock in whatever state another thread had it. */
static void start_afresh(void)
{
    pool = (pool_state)EMPTY_POOL;
}

__attribute__((constructor)) static void watch_for_forks(void)
{
    pthread_atfork(NULL, NULL, start_afresh);
}

static void run_pieces(loop *l)
{
    for (;;) {
        int64_t piece = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
        if (piece >= l->pieces)
            return;
        int64_t begin = piece * l->grain;
        int64_t end = l->count - begin < l->grain ? l->count : begin + l->grain;
        l->run(l->context, begin, end);
    }
}

static void wake(int seats)
{
    for (int i = 0; i < seats && i < WOKEN_BY_EACH; i++)
        pthread_cond_signal(&pool.opened);
}

static void *work(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.door == NULL)
            pthread_cond_wait(&pool.opened, &pool.lock);
        loop *l = pool.door;
        int seats = --pool.seats;
        if (seats == 0)
            pool.door = NULL;
        atomic_fetch_add_explicit(&pool.inside, 1, memory_order_relaxed);
        pthread_mutex_unlock(&pool.lock);

        wake(seats);
        run_pieces(l);

        pthread_mutex_lock(&pool.lock);
        if (pool.door == l) /* no pieces are left: else this thread would join again, and again */
            pool.door = NULL;
        if (atomic_fetch_sub_explicit(&pool.inside, 1, memory_order_release) == 1)
            pthread_cond_signal(&pool.left);
    }
    return NULL;
}

/* Makes workers until there are `wanted`, or no more can be had: then fewer have to do. */
static void grow(int wanted)
{
    pthread_attr_t attributes;
    if (pool.workers >= wanted || pthread_attr_init(&attributes) != 0)
        return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);

    /* Signals are for the program's own threads, and a thread inherits its maker's mask. Faults
     * are the exception: they come to the thread that causes them, and must be reported. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGILL);
    sigdelset(&blocked, SIGFPE);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    while (pool.workers < wanted && pool.workers < MOST_WORKERS &&
           pthread_create(&pool.threads[pool.workers], &attributes, work, NULL) == 0)
        pool.workers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Linux may wake a worker on the processor that the caller keeps busy, above all when the caller
 * has just woken up itself, and leave it waiting there for milliseconds beside idle ones. So
 * workers are told to run on any of the caller's processors but the one it is on. It costs a system
 * call a worker whenever the caller has moved or is another one, with other processors of its own,
 * and one that tells so. A caller that is bound to a single processor changes nothing: workers stay
 * where they are, which is beside it if it is the one that made them. */
static void keep_off_the_callers_processor(void)
{
#ifdef __linux__
    cpu_set_t elsewhere;
    const int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof elsewhere, &elsewhere) != 0)
        return; /* the latter fails on a machine of more than 1024 processors */
    CPU_CLR((size_t)here, &elsewhere);
    if (CPU_COUNT(&elsewhere) == 0 ||
        (pool.placed == pool.workers && CPU_EQUAL(&elsewhere, &pool.elsewhere)))
        return;
    for (int i = 0; i < pool.workers; i++)
        pthread_setaffinity_np(pool.threads[i], sizeof elsewhere, &elsewhere);
    pool.placed = pool.workers;
    pool.elsewhere = elsewhere;
#endif
}

static void open_door(loop *l, int seats)
{
    pthread_mutex_lock(&pool.lock);
    pool.door = l;
    pool.seats = seats;
    pthread_mutex_unlock(&pool.lock);
    wake(seats);
}

static void close_door(void)
{
    pthread_mutex_lock(&pool.lock);
    pool.door = NULL;
    pthread_mutex_unlock(&pool.lock);
}

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The last pieces often end within a few microseconds, sooner than a sleeper is woken. */
static void wait_until_all_have_left(void)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool.inside, memory_order_acquire) == 0)
            return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
    while (atomic_load_explicit(&pool.inside, memory_order_acquire) > 0)
        pthread_cond_wait(&pool.left, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

int parallel_for(int threads, int64_t count, int64_t grain, task *run, void *context)
{
    if (count < 0 || grain < 1)
        return EINVAL;
    int64_t pieces = count / grain + (count % grain != 0);
    loop l = {.run = run, .context = context, .count = count, .grain = grain, .pieces = pieces};
    int64_t helpers = (pieces < threads ? pieces : threads) - 1;
    if (helpers < 1 || atomic_flag_test_and_set_explicit(&pool.taken, memory_order_acquire)) {
        run_pieces(&l);
        return 0;
    }
    grow((int)helpers);
    if (pool.workers > 0) {
        keep_off_the_callers_processor();
        open_door(&l, (int)helpers);
    }
    run_pieces(&l);
    close_door();
    wait_until_all_have_left();
    atomic_flag_clear_explicit(&pool.taken, memory_order_release);
    return 0;
}
