// Who runs the tasks. Where torch has loaded GNU OpenMP, its threads: they spin for milliseconds after each of torch's
// own loops, and a second pool would fight them for the cores. Else a pool of our own, one per process, made at the
// first parallel call and never destroyed (its threads sleep until the process ends); a caller that finds it busy runs
// its tasks itself: always correct, and no caller ever waits for another's step.
#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <cstring>
#endif

namespace {

// Flushes subnormals for the current thread while it lives: the same results on every backend (GPUs flush too), and no
// slow path for the tiny values that decaying moments pass through.
class FlushSubnormals {
 public:
#if defined(__SSE2__) || defined(_M_X64)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80u | 0x8040u); }  // masked, to nearest, FTZ + DAZ
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t(1) << 24));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

struct Work {
  a8_task task;
  const a8_job* job;
  uint32_t first, count;
  std::atomic<uint32_t> next{0};

  void run() {
    FlushSubnormals flush;
    for (uint32_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(job, first + i);
  }
};

void pause_briefly() {
#if defined(__SSE2__) || defined(_M_X64)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  // False when the pool is busy: nothing was run.
  bool try_run(uint32_t threads, Work* work) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    grow(threads - 1);
    uint32_t helpers = threads - 1 < workers_ ? threads - 1 : workers_;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      wanted_ = helpers;
      running_.store(helpers, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work->run();
    // The last tasks are short: spinning costs less than being woken.
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins)
      spins < 4096 ? pause_briefly() : std::this_thread::yield();
    return true;
  }

 private:
  void grow(uint32_t wanted) {
    while (workers_ < wanted) {
      try {
        std::thread(&Pool::serve, this, workers_, generation_.load()).detach();
      } catch (const std::system_error&) {
        return;  // fewer threads, the same result
      }
      ++workers_;
    }
  }

  void serve(uint32_t rank, uint32_t seen) {
    for (;;) {
      // Phases of one step follow each other within microseconds: spin a little before sleeping.
      for (int spins = 0; spins < 2000 && generation_.load(std::memory_order_acquire) == seen; ++spins) pause_briefly();
      Work* work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (rank >= wanted_) continue;
        work = work_;
      }
      work->run();
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint32_t> generation_{0}, running_{0};
  Work* work_ = nullptr;
  uint32_t wanted_ = 0, workers_ = 0;
};

std::atomic<Pool*> pool{nullptr};
std::mutex* pool_mutex = new std::mutex;

// GOMP_parallel of the GNU OpenMP that this process has loaded already, or null. Found, not linked: this library must
// load without it, and the copy that torch brings may have another file name than the system's.
typedef void (*OpenMp)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<OpenMp> openmp{nullptr};
std::atomic<bool> forked{false};  // GNU OpenMP hangs in a child of a process that used it

#if defined(__linux__)
struct LoadedLibrary {
  unsigned skip;  // so many of those that match
  char path[4096];
};

// Copies the path and no more: this runs with the linker's list of libraries locked, and what dlopen locks comes before
// that. A thread that opens a library takes the two in their order, and both would wait for ever.
int copy_openmp_path(dl_phdr_info* info, size_t, void* data) {
  LoadedLibrary* found = static_cast<LoadedLibrary*>(data);
  if (!info->dlpi_name || !strstr(info->dlpi_name, "libgomp")) return 0;
  if (strlen(info->dlpi_name) >= sizeof(found->path) || found->skip-- != 0) return 0;
  strcpy(found->path, info->dlpi_name);
  return 1;
}

// The first whose name is like it need not be it: a path or another library may hold the word too.
bool find_openmp() {
  for (unsigned seen = 0;; ++seen) {
    LoadedLibrary found = {seen, ""};
    if (!dl_iterate_phdr(copy_openmp_path, &found)) return false;
    void* library = dlopen(found.path, RTLD_NOLOAD | RTLD_NOW | RTLD_LOCAL);
    if (!library) continue;
    openmp.store(reinterpret_cast<OpenMp>(dlsym(library, "GOMP_parallel")));
    if (openmp.load()) return true;
  }
}
#endif

OpenMp openmp_of_this_process() {
  if (forked.load(std::memory_order_relaxed)) return nullptr;
#if defined(__linux__)
  // Looked for once: torch is loaded before the first step.
  static const bool searched = find_openmp();
  (void)searched;
#endif
  return openmp.load(std::memory_order_relaxed);
}

#if !defined(_WIN32)
// A forked child has none of the parent's threads and maybe its locks held: it starts anew and leaks the old pool.
// Watched from the moment this library is opened: torch may have used GNU OpenMP before we do.
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true);
  pool.store(nullptr);
  pool_mutex = new std::mutex;
});
#endif

Pool* pool_of_this_process() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return found;
  std::lock_guard<std::mutex> lock(*pool_mutex);
  found = pool.load(std::memory_order_relaxed);
  if (!found) {
    found = new Pool;
    pool.store(found, std::memory_order_release);
  }
  return found;
}

}  // namespace

void a8_parallel(uint32_t threads, uint32_t first, uint32_t count, a8_task task, const a8_job* job) {
  Work work;
  work.task = task;
  work.job = job;
  work.first = first;
  work.count = count;
  uint32_t useful = threads < count ? threads : count;
  if (useful < 2) return work.run();
  if (OpenMp run = openmp_of_this_process())
    run([](void* data) { static_cast<Work*>(data)->run(); }, &work, useful, 0);
  else if (!pool_of_this_process()->try_run(useful, &work))
    work.run();
}
