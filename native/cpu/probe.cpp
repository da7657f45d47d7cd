// The processor probe. This file is compiled without instruction-set flags: built with them, the compiler could use the
// very instructions it asks about, and the process would end in SIGILL before it had an answer.
#include "probe.h"

#if defined(__x86_64__) || defined(_M_X64)

#if defined(_MSC_VER)
#include <intrin.h>
static void cpuid(unsigned leaf, unsigned sub, unsigned out[4]) { __cpuidex((int*)out, (int)leaf, (int)sub); }
static uint64_t xgetbv() { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(unsigned leaf, unsigned sub, unsigned out[4]) {
  if (!__get_cpuid_count(leaf, sub, out, out + 1, out + 2, out + 3)) out[0] = out[1] = out[2] = out[3] = 0;
}
static uint64_t xgetbv() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}
#endif

static bool all(unsigned word, unsigned mask) { return (word & mask) == mask; }

static uint32_t detect() {
  uint32_t usable = 1u << A8_ISA_BASELINE;
  unsigned basic[4], extended[4];
  cpuid(1, 0, basic);
  cpuid(7, 0, extended);
  const unsigned osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
  if (!all(basic[2], osxsave | avx | f16c)) return usable;
  uint64_t saved = xgetbv();
  if ((saved & 0x6) != 0x6) return usable;  // XMM and YMM
  const unsigned bmi1 = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8;
  if (!all(extended[1], bmi1 | avx2 | bmi2)) return usable;
  unsigned amd[4];
  cpuid(0x80000001u, 0, amd);
  const unsigned lzcnt = 1u << 5, movbe = 1u << 22, fma = 1u << 12;
  if (!all(amd[2], lzcnt) || !all(basic[2], movbe | fma)) return usable;  // the rest of x86-64-v3
  usable |= 1u << A8_ISA_AVX2;
  if ((saved & 0xe6) != 0xe6) return usable;  // opmask, upper ZMM
  const unsigned f = 1u << 16, dq = 1u << 17, cd = 1u << 28, bw = 1u << 30, vl = 1u << 31;
  if (all(extended[1], f | dq | cd | bw | vl)) usable |= 1u << A8_ISA_AVX512;
  return usable;
}

uint32_t a8_isa_built() { return 1u << A8_ISA_BASELINE | 1u << A8_ISA_AVX2 | 1u << A8_ISA_AVX512; }

#elif defined(__aarch64__) || defined(_M_ARM64)

static uint32_t detect() { return 1u << A8_ISA_NEON; }  // Advanced SIMD is part of the architecture
uint32_t a8_isa_built() { return 1u << A8_ISA_NEON; }

#else

static uint32_t detect() { return 1u << A8_ISA_BASELINE; }
uint32_t a8_isa_built() { return 1u << A8_ISA_BASELINE; }

#endif

uint32_t a8_isa_usable() {
  static const uint32_t usable = detect();
  return usable;
}

uint32_t a8_isa_best() {
  uint32_t best = A8_ISA_AUTO;
  for (uint32_t isa = A8_ISA_BASELINE; isa <= A8_ISA_NEON; ++isa)
    if (a8_isa_usable() >> isa & 1u) best = isa;
  return best;
}
