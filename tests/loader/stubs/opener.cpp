// Three in one: with STUB_OUTER a library whose initialisation takes its time and then opens another one, as that of
// many real libraries does; with STUB_INNER that other one; else one that opens the first on a thread of its own.
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(STUB_OUTER)
__attribute__((constructor)) static void initialise() {
  if (write(atoi(getenv("STUB_PIPE")), "!", 1) != 1) abort();  // here we are
  usleep(300000);
  if (!dlopen(getenv("STUB_INNER"), RTLD_NOW)) abort();
}
#elif !defined(STUB_INNER)
static pthread_t thread;

static void* open_outer(void*) { return dlopen(getenv("STUB_OUTER"), RTLD_NOW); }

extern "C" int start() { return pthread_create(&thread, nullptr, open_outer, nullptr); }

extern "C" bool join() {
  void* opened = nullptr;
  return pthread_join(thread, &opened) == 0 && opened;
}
#endif
