// Runs independent tasks on a pool of threads.
#pragma once

#include "kernels.h"

// Calls task(job, first) ... task(job, first + count - 1) on at most `threads` threads, the caller's among them, each
// with subnormals flushed to zero, and returns when all are done. Safe from several threads at once and after fork().
void a8_parallel(uint32_t threads, uint32_t first, uint32_t count, a8_task task, const a8_job* job);
