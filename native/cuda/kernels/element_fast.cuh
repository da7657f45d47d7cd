// What the fast paths of the element-wise rules share: a stretch of chunks of a tensor whose moments are int8 first
// and, for Adam, log8 second in blocks of 128, aligned.
//
// Half a warp a block, eight elements a lane, one pass. Memory wants many bytes in flight, so each warp copies its next
// units to shared memory while it works.
#pragma once

#include "element_general.cuh"
#include "lanes.cuh"

// --- Eight elements a lane. Of 16-bit types one run of 8; with a float32 two runs of 4, half a block apart. ---

template <uint32_t kDtype, int kRuns>
A8_FN void a8_store_eight(char* out, const uint32_t* w) {
  const int half_block = A8_USUAL_BLOCK / 2 * (kDtype == A8_F32 ? 4 : 2);
  if (kDtype == A8_F32 || kRuns == 1) {
#pragma unroll
    for (int i = 0; i < (kDtype == A8_F32 ? 2 : 1); ++i)
      __stcs(reinterpret_cast<uint4*>(out + i * half_block),
             make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      __stcs(reinterpret_cast<uint2*>(out + i * half_block), make_uint2(w[2 * i], w[2 * i + 1]));
  }
}

template <int kRuns>
A8_FN void a8_store_eight_codes(char* out, const uint32_t* w) {
  if (kRuns == 1) {
    __stcs(reinterpret_cast<uint2*>(out), make_uint2(w[0], w[1]));
  } else {
    __stcs(reinterpret_cast<uint32_t*>(out), w[0]);
    __stcs(reinterpret_cast<uint32_t*>(out + A8_USUAL_BLOCK / 2), w[1]);
  }
}

// --- One lane's part of two blocks. ---

// What the warps have loaded, or are loading, of one unit each. A thread touches its own column of every row, in pieces
// of 16 bytes where it can: a row is free of bank conflicts and one address serves several.
template <int kParamBytes, int kGradBytes, bool kSecond>
struct a8_fast_stage {
  uint4 param[kParamBytes / 2][A8_THREADS];
  uint4 grad[kGradBytes / 2][A8_THREADS];
  uint2 codes[kSecond ? 2 * A8_THREADS : A8_THREADS];  // of a thread: first moment, then second
  float scale[A8_THREADS];                             // of the first
  uint32_t header[kSecond ? A8_THREADS : 1];           // of the second
};

// Shared memory for the units that the warps load ahead: at least two of any types. Enough bytes in flight keep the
// memory busy; where there is no second moment, little else is to do while they come.
template <bool kSecond>
struct a8_fast_room {
  alignas(16) char bytes[kSecond ? 2 * sizeof(a8_fast_stage<4, 4, true>) : 4 * sizeof(a8_fast_stage<2, 2, false>)];
};

// Where a lane reads and writes, in bytes.
typedef struct a8_fast_place {
  char *param, *first, *second, *first_block, *second_block;
  const char* grad;
} a8_fast_place;

template <uint32_t kParam, uint32_t kGrad, bool kSecondMoment>
struct a8_fast_lanes {
  static const bool kSecond = kSecondMoment;
  static const int kRuns = kParam == A8_F32 || kGrad == A8_F32 ? 2 : 1;
  static const int kParamBytes = kParam == A8_F32 ? 4 : 2, kGradBytes = kGrad == A8_F32 ? 4 : 2;
  static const uint32_t kWarps = A8_THREADS / 32;
  static const int kStride = kWarps * A8_UNIT;  // elements from a unit of a warp to its next
  typedef a8_fast_stage<kParamBytes, kGradBytes, kSecond> Stage;
  static const int kStages = sizeof(a8_fast_room<kSecond>) / sizeof(Stage);

  // One lane's eight values of kBytes each.
  template <int kBytes>
  static __device__ __forceinline__ void load_values(const char* from, uint4 (*row)[A8_THREADS]) {
    const int kPiece = 8 * kBytes / kRuns > 16 ? 16 : 8 * kBytes / kRuns;
#pragma unroll
    for (int run = 0; run < 8 * kBytes / kPiece; ++run)
      a8_copy<kPiece>(reinterpret_cast<char*>(&row[run * kPiece / 16][threadIdx.x]) + run * kPiece % 16,
                      from + run * (A8_USUAL_BLOCK / 2 * kBytes));
  }

  static __device__ __forceinline__ void load(const a8_fast_place& at, Stage* stage) {
    load_values<kGradBytes>(at.grad, stage->grad);
    load_values<kParamBytes>(at.param, stage->param);
    char* codes = reinterpret_cast<char*>(&stage->codes[(kSecond ? 2 : 1) * threadIdx.x]);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      a8_copy<8 / kRuns>(codes + 4 * run, at.first + run * (A8_USUAL_BLOCK / 2));
      if (kSecond) a8_copy<8 / kRuns>(codes + 8 + 4 * run, at.second + run * (A8_USUAL_BLOCK / 2));
    }
    if (kSecond) a8_copy<4>(&stage->header[threadIdx.x], at.second_block);
    a8_copy<4>(&stage->scale[threadIdx.x], at.first_block);
  }

  template <int kBytes>
  static __device__ __forceinline__ void read_values(const uint4 (*row)[A8_THREADS], uint32_t* w) {
#pragma unroll
    for (int i = 0; i < kBytes / 2; ++i) {
      uint4 x = row[i][threadIdx.x];
      w[4 * i] = x.x, w[4 * i + 1] = x.y, w[4 * i + 2] = x.z, w[4 * i + 3] = x.w;
    }
  }

  // Moves on by `strides`.
  static __device__ __forceinline__ void advance(a8_fast_place* at, int strides) {
    at->param += strides * kStride * kParamBytes;
    at->grad += strides * kStride * kGradBytes;
    at->first += strides * kStride;
    at->first_block += strides * kStride / A8_USUAL_BLOCK * 4;
    if (!kSecond) return;
    at->second += strides * kStride;
    at->second_block += strides * kStride / A8_USUAL_BLOCK * 4;
  }

  // The noise word of elements (i, i + 1). pair: the lane's first pair in the stretch.
  static __device__ __forceinline__ uint32_t noise(a8_noise key, uint32_t pair, int i) {
    return a8_noise_word(key, pair + (kRuns == 1 ? i / 2 : i / 4 * (A8_USUAL_BLOCK / 4) + i / 2 % 2));
  }

  static __device__ __forceinline__ void store_param(const a8_element_job& job, const a8_fast_place& at, uint32_t pair,
                                                     const float* p) {
    uint32_t out[kParam == A8_F32 ? 8 : 4];
    if (kParam != A8_F32 && (job.rule.flags & A8_STOCHASTIC_WRITE)) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 8; i += 2) words[i / 2] = noise(job.write, pair, i);
      a8_pack_eight_stochastic<kParam>(p, words, out);
    } else {
      a8_pack_eight<kParam>(p, out);
    }
    a8_store_eight<kParam, kRuns>(at.param, out);
  }

  // pair: the lane's first pair in the stretch.
  template <int KIND>
  static __device__ __forceinline__ void store_first(const a8_element_job& job, const a8_fast_place& at, uint32_t pair,
                                                     const float* m, float inverse) {
    uint32_t packed[2];
    if (a8_rule_phases_first(KIND) && (job.rule.flags & A8_STOCHASTIC_STATE))
      a8_int8_eight(m, inverse, a8_phase_at(job.phase, 2 * pair), kRuns == 1 ? 4 : A8_USUAL_BLOCK / 2, packed);
    else
      a8_int8_eight(m, inverse, packed);
    a8_store_eight_codes<kRuns>(at.first, packed);
  }
};

// A rule on one unit: a8_fast_lanes with a function `step`, and `suits`, whether it takes a job.
template <int KIND, uint32_t kParam, uint32_t kGrad>
struct a8_fast_rule;

// All units of the stretch, but what is left to a8_element_general in `left`: those that are not ordinary, and a last
// one that is not whole.
template <int KIND, uint32_t kParam, uint32_t kGrad>
A8_FN void a8_fast_run(const a8_element_job& job, char* room, unsigned long long* left) {
  typedef a8_fast_rule<KIND, kParam, kGrad> Rule;
  typedef typename Rule::Stage Stage;
  const int kParamBytes = Rule::kParamBytes, kGradBytes = Rule::kGradBytes, kRuns = Rule::kRuns;
  const int kStride = Rule::kStride;
  const uint32_t kWarps = Rule::kWarps;
  const a8_tensor* t = job.tensor;
  uint32_t lane = threadIdx.x & 31u, warp = threadIdx.x / 32, units = job.count / A8_UNIT;
  if (threadIdx.x == 0 && job.count % A8_UNIT != 0) a8_leave_unit(left, units);
  if (warp >= units) return;
  uint32_t at_element = warp * A8_UNIT + lane / 16 * A8_USUAL_BLOCK + lane % 16 * (8 / kRuns);
  int64_t e = job.from + at_element, block = e / A8_USUAL_BLOCK;
  a8_fast_place at;
  at.param = static_cast<char*>(t->param) + e * kParamBytes;
  at.grad = static_cast<const char*>(t->grad) + e * kGradBytes;
  at.first = static_cast<char*>(t->first) + e;
  at.first_block = static_cast<char*>(t->first_block) + block * 4;
  if (Rule::kSecond) {
    at.second = static_cast<char*>(t->second) + e;
    at.second_block = static_cast<char*>(t->second_block) + block * 4;
  }
  Stage* stages = reinterpret_cast<Stage*>(room);
#pragma unroll
  for (int i = 0; i < Rule::kStages; ++i) {
    if (warp + i * kWarps < units) Rule::load(at, &stages[i]);
    a8_copies_commit();
    Rule::advance(&at, 1);
  }
  uint32_t number = 0;
#pragma unroll 1
  for (uint32_t unit = warp; unit < units; unit += kWarps) {
    a8_copies_wait<Rule::kStages - 1>();
    Rule::step(job, at, at_element / 2, unit, unit + Rule::kStages * kWarps < units, &stages[number], left);
    a8_copies_commit();
    number = number + 1 == Rule::kStages ? 0 : number + 1;
    Rule::advance(&at, 1);
    at_element += kStride;
  }
}

// --- Which stretches the fast paths take. ---

#define A8_DTYPES(param, grad) ((param) * 4u + (grad))

// Whether there is a fast path for these types, the arrays lie where wide loads need them, and the first moment is as
// it wants it.
A8_FN bool a8_suits_lanes(const a8_tensor* t) {
  bool types = t->param_dtype == t->grad_dtype || (t->param_dtype == A8_BF16 && t->grad_dtype == A8_F32);
  return types && t->first_format == A8_INT8 && t->first_block_size == A8_USUAL_BLOCK && a8_aligned(t->param, 16) &&
         a8_aligned(t->grad, 16) && a8_aligned(t->first, 8);
}

template <int KIND>
A8_FN void a8_fast_typed(const a8_element_job& job, char* room, unsigned long long* left) {
  switch (A8_DTYPES(job.tensor->param_dtype, job.tensor->grad_dtype)) {
    case A8_DTYPES(A8_BF16, A8_BF16):
      return a8_fast_run<KIND, A8_BF16, A8_BF16>(job, room, left);
    case A8_DTYPES(A8_F32, A8_F32):
      return a8_fast_run<KIND, A8_F32, A8_F32>(job, room, left);
    case A8_DTYPES(A8_F16, A8_F16):
      return a8_fast_run<KIND, A8_F16, A8_F16>(job, room, left);
    default:
      return a8_fast_run<KIND, A8_BF16, A8_F32>(job, room, left);
  }
}

// Shared memory of a block of threads.
template <bool kSecond>
struct a8_fast_stretch_room {
  union {
    a8_moment_room general;
    a8_fast_room<kSecond> fast;
  };
  unsigned long long left[A8_MAX_GROUP];  // units of each chunk that are the general path's
  uint32_t index;                         // of the chunk whose turn it is: not in a register, for these are scarce
};
