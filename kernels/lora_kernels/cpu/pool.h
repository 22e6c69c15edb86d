/* A parallel loop for the operators, on threads of our own.
 *
 *     parallel_for(threads, rows, 256, expand_rows, &job);
 *
 * calls expand_rows(&job, 0, 256), expand_rows(&job, 256, 512), … on up to `threads` threads, the
 * caller's among them, and returns when all of them are done.
 *
 * Why not OpenMP, which would be one line. PyTorch brings an OpenMP runtime of its own (libgomp
 * under a private name, libomp, Intel's), and the system's compiler would link a second one. Two
 * runtimes do not know of each other: each keeps a thread a core, and for milliseconds after a
 * loop those threads spin, in the way of whichever runtime works next. libgomp also hangs in a
 * process that was forked after its first parallel loop, which is what a data loader does. So: a
 * few threads of our own that sleep when there is nothing to do and start afresh after fork.
 *
 * What the loop promises
 * - Pieces are claimed one at a time, by whoever is free. A core that is slow, or busy with
 *   someone else's work (PyTorch's spinning threads among them), takes fewer pieces and holds up
 *   the loop by at most one. The caller works too, and never waits for a worker that has not
 *   woken up: if none comes it does everything itself.
 * - The pieces are the same whatever `threads` is, and which thread ran one cannot be seen. An
 *   operator whose pieces write to separate places gives the same bits on any number of threads.
 * - No thread uses the processor after the call. Workers sleep on a condition variable: waking
 *   one takes tens of microseconds, so a loop should be worth a hundred of them.
 * - One loop has the workers at a time. A second caller, or a task that calls parallel_for, runs
 *   its loop alone, at once: it would find the cores taken anyway, and nothing can deadlock.
 *
 * The library that holds this must not be unloaded (ctypes never does): its workers sleep in it.
 */
#ifndef LORA_POOL_H
#define LORA_POOL_H

#include <stdint.h>

/* Runs indices begin to end - 1. It has 1 MiB of stack, and must not fork. */
typedef void task(void *context, int64_t begin, int64_t end);

/* Runs `run` over [0, count) in pieces of `grain` indices, of which the last may be shorter.
 *
 * threads  how many may work on it, the caller included; 1 or less: the caller alone
 * count    indices; 0: nothing is run
 * grain    indices a piece, at least 1
 *
 * Returns 0 when every index has been run once, and everything that the tasks wrote can be read;
 * EINVAL for a negative count or a grain below 1, and then nothing was run.
 */
__attribute__((visibility("hidden"))) int parallel_for(int threads, int64_t count, int64_t grain,
                                                       task *run, void *context);

#endif
