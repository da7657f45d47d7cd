// What stands for GNU OpenMP: it counts its calls and runs the work on the caller's thread alone.
extern "C" {
int stub_calls = 0;

#if !defined(STUB_NO_PARALLEL)
void GOMP_parallel(void (*function)(void*), void* data, unsigned, unsigned) {
  ++stub_calls;
  function(data);
}
#endif
}
