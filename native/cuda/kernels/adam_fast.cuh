// Adam on a stretch of chunks in the default state: int8 first and log8 second moment in blocks of 128, aligned.
//
// Half a warp a block, eight elements a lane, one pass. Two limits meet here. Memory wants many bytes in flight, so each
// warp copies its next two units to shared memory while it works. And instruction slots: 79 an element last as long as
// its bytes on an H200, so one branch a unit decides that no element needs the compiler's guarded division and square
// root, which branch for each. Where a formula of a8/math.h or a8/format.h is spelt differently, the bits are the same.
#pragma once

#include "adam_general.cuh"
#include "eight.cuh"
#include "exact.cuh"

#define A8_FAST_BLOCK 128

// The ranges of exact.cuh hold for a block whose moments lie in these and a rule that a8_is_ordinary; zeros may mix in.
#define A8_ORDINARY_SECOND_MIN A8_TWO_TO(-100)
#define A8_ORDINARY_SECOND_MAX A8_TWO_TO(40)
#define A8_ORDINARY_FIRST_MIN A8_TWO_TO(-100)
#define A8_ORDINARY_FIRST_MAX A8_TWO_TO(20)

// Small first moments are divided 2^40 times as large, lest remainders be flushed to zero; the step size undoes it.
#define A8_LIFT 40

A8_FN bool a8_is_fraction(float x) { return x >= 0.0f && x <= 1.0f; }

A8_FN bool a8_is_ordinary(const a8_rule& r) {
  bool step = r.step_size == 0.0f || (r.step_size >= A8_TWO_TO(-80) && r.step_size <= 0.5f);
  return step && r.eps >= A8_TWO_TO(-40) && r.eps <= A8_TWO_TO(20) && r.root_bias >= A8_TWO_TO(-10) &&
         r.root_bias <= A8_TWO_TO(10) && a8_is_fraction(r.beta1) && a8_is_fraction(r.one_minus_beta1) &&
         a8_is_fraction(r.beta2) && a8_is_fraction(r.one_minus_beta2);
}

// --- Eight elements a lane. Of 16-bit types one run of 8; with a float32 two runs of 4, half a block apart. ---

template <uint32_t kDtype, int kRuns>
A8_FN void a8_store_eight(char* out, const uint32_t* w) {
  const int half_block = A8_FAST_BLOCK / 2 * (kDtype == A8_F32 ? 4 : 2);
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
    __stcs(reinterpret_cast<uint32_t*>(out + A8_FAST_BLOCK / 2), w[1]);
  }
}

// --- One lane's part of two blocks. ---

// What the warps have loaded, or are loading, of one unit each. A thread touches its own column of every row, in pieces
// of 16 bytes where it can: a row is free of bank conflicts and one address serves several.
template <int kParamBytes, int kGradBytes>
struct a8_fast_stage {
  uint4 param[kParamBytes / 2][A8_THREADS];
  uint4 grad[kGradBytes / 2][A8_THREADS];
  uint4 codes[A8_THREADS];      // first, then second moment
  uint32_t header[A8_THREADS];  // of the second moment
  float scale[A8_THREADS];      // of the first
};

// Units that a warp loads ahead: enough bytes in flight to keep the memory busy.
#define A8_STAGES 2
typedef struct a8_fast_room {
  alignas(16) char bytes[A8_STAGES * sizeof(a8_fast_stage<4, 4>)];
} a8_fast_room;

// Where a lane reads and writes, in bytes.
typedef struct a8_fast_place {
  char *param, *first, *second, *first_block, *second_block;
  const char* grad;
} a8_fast_place;

template <uint32_t kParam, uint32_t kGrad>
struct a8_fast {
  static const int kRuns = kParam == A8_F32 || kGrad == A8_F32 ? 2 : 1;
  static const int kParamBytes = kParam == A8_F32 ? 4 : 2, kGradBytes = kGrad == A8_F32 ? 4 : 2;
  static const uint32_t kWarps = A8_THREADS / 32;
  static const int kStride = kWarps * A8_UNIT;  // elements from a unit of a warp to its next
  typedef a8_fast_stage<kParamBytes, kGradBytes> Stage;

  // One lane's eight values of kBytes each.
  template <int kBytes>
  static __device__ __forceinline__ void load_values(const char* from, uint4 (*row)[A8_THREADS]) {
    const int kPiece = 8 * kBytes / kRuns > 16 ? 16 : 8 * kBytes / kRuns;
#pragma unroll
    for (int run = 0; run < 8 * kBytes / kPiece; ++run)
      a8_copy<kPiece>(reinterpret_cast<char*>(&row[run * kPiece / 16][threadIdx.x]) + run * kPiece % 16,
                      from + run * (A8_FAST_BLOCK / 2 * kBytes));
  }

  static __device__ __forceinline__ void load(const a8_fast_place& at, Stage* stage) {
    load_values<kGradBytes>(at.grad, stage->grad);
    load_values<kParamBytes>(at.param, stage->param);
    char* codes = reinterpret_cast<char*>(&stage->codes[threadIdx.x]);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      a8_copy<8 / kRuns>(codes + 4 * run, at.first + run * (A8_FAST_BLOCK / 2));
      a8_copy<8 / kRuns>(codes + 8 + 4 * run, at.second + run * (A8_FAST_BLOCK / 2));
    }
    a8_copy<4>(&stage->header[threadIdx.x], at.second_block);
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
    at->second += strides * kStride;
    at->first_block += strides * kStride / A8_FAST_BLOCK * 4;
    at->second_block += strides * kStride / A8_FAST_BLOCK * 4;
  }

  // The noise word of elements (i, i + 1). pair: the lane's first pair in the stretch.
  static __device__ __forceinline__ uint32_t noise(a8_noise key, uint32_t pair, int i) {
    return a8_noise_word(key, pair + (kRuns == 1 ? i / 2 : i / 4 * (A8_FAST_BLOCK / 4) + i / 2 % 2));
  }

  static __device__ __forceinline__ void store_param(const a8_adam_job& job, const a8_fast_place& at, uint32_t pair,
                                                     const float* p) {
    uint32_t out[kParam == A8_F32 ? 8 : 4];
    if (kParam != A8_F32 && (job.flags & A8_STOCHASTIC_WRITE)) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 8; i += 2) words[i / 2] = noise(job.write, pair, i);
      a8_pack_eight_stochastic<kParam>(p, words, out);
    } else {
      a8_pack_eight<kParam>(p, out);
    }
    a8_store_eight<kParam, kRuns>(at.param, out);
  }

  static __device__ __forceinline__ void store_first(const a8_fast_place& at, const float* m, float inverse) {
    uint32_t packed[2];
    a8_int8_eight(m, inverse, packed);
    a8_store_eight_codes<kRuns>(at.first, packed);
  }

  static __device__ __forceinline__ void store_second(const a8_adam_job& job, const a8_fast_place& at, uint32_t pair,
                                                      const float* v, int32_t origin, float inverse_step) {
    float position[8];
    uint32_t packed[2], phase = a8_phase_at(job.phase, 2 * pair);
    a8_log8_positions(v, origin, inverse_step, position);
    if (job.flags & A8_STOCHASTIC_STATE) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        position[i] =
            position[i] + a8_offset(phase + (kRuns == 1 ? i : i / 4 * (A8_FAST_BLOCK / 2) + i % 4) * A8_PHASE_STRIDE);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) position[i] = position[i] + A8_LOG8_NEAREST;
    }
    a8_log8_eight(position, packed);
    a8_store_eight_codes<kRuns>(at.second, packed);
  }

  // Updates a unit from `stage` and, when there is `more`, loads the stage anew. at: what to load; the unit itself is
  // A8_STAGES strides behind. A unit that is not ordinary is only noted in `left`.
  static __device__ __forceinline__ void step(const a8_adam_job& job, const a8_fast_place& at, uint32_t pair,
                                              uint32_t unit, bool more, Stage* stage, unsigned long long* left) {
    const a8_rule& rule = job.rule;
    float m[8], v[8], p[8];
    uint32_t grad[2 * kGradBytes], param[2 * kParamBytes];
    read_values<kGradBytes>(stage->grad, grad);
    uint4 codes = stage->codes[threadIdx.x];
    a8_log8_header header = a8_log8_unpack(stage->header[threadIdx.x]);
    float scale = stage->scale[threadIdx.x];
    uint32_t first[2] = {codes.x, codes.y}, second[2] = {codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) m[i] = a8_value<kGrad>(grad, i);
    // a8_rule_gradient. Without L2 its sign goes to the factor: g itself is only squared.
    float one_minus_beta1 = a8_signed(rule.one_minus_beta1, rule.sign);
    if (rule.l2 != 0.0f) {
      read_values<kParamBytes>(stage->param, param);
      one_minus_beta1 = rule.one_minus_beta1;
#pragma unroll
      for (int i = 0; i < 8; ++i) m[i] = a8_signed(m[i], rule.sign) + rule.l2 * a8_value<kParam>(param, i);
    }
    float most = 0.0f;
    uint32_t low = 0xffffffffu, high = 0;
    a8_log8_decode_eight(second, header, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float g = m[i];
      m[i] = a8_int8_decode((int32_t)(int8_t)(first[i / 4] >> (8 * (i % 4))), scale);
      m[i] = rule.beta1 * m[i] + one_minus_beta1 * g;
      v[i] = a8_rule_second(&rule, v[i], g);
      // No m is NaN unless the scale or a v is not finite, which is not ordinary.
      most = fmaxf(most, fabsf(m[i]));
      // Without a8_log8_bits: no v is negative or subnormal.
      low = min(low, a8_log8_low_key((int32_t)a8_bits(v[i])));
      high = max(high, a8_bits(v[i]));
    }
    bool ordinary = a8_absmax_finite(a8_bits(scale));

    uint32_t most_bits = a8_lanes_max<16>(a8_bits(most));
    low = a8_lanes_min<16>(low);
    high = a8_lanes_max<16>(high);
    most = a8_float(most_bits);
    ordinary &= low >= a8_bits(A8_ORDINARY_SECOND_MIN) - 1u && high <= a8_bits(A8_ORDINARY_SECOND_MAX);
    ordinary &= most_bits == 0 || most_bits - a8_bits(A8_ORDINARY_FIRST_MIN) <=
                                      a8_bits(A8_ORDINARY_FIRST_MAX) - a8_bits(A8_ORDINARY_FIRST_MIN);
    bool all_ordinary = __all_sync(A8_LANE_MASK, ordinary);
    read_values<kParamBytes>(stage->param, param);
    if (more) load(at, stage);
    if (!all_ordinary) {
      if (threadIdx.x % 32 == 0) leave(left, unit);
      return;
    }

    float lowered_step = rule.step_size * A8_TWO_TO(-A8_LIFT);
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // a8_rule_param
      float root = a8_exact_sqrt(v[i]) * rule.root_bias + rule.eps;
      float ratio = a8_exact_div(__fmul_rn(m[i], A8_TWO_TO(A8_LIFT)), root);
      p[i] = a8_value<kParam>(param, i) * rule.decay - lowered_step * ratio;
    }
    a8_fast_place to = at;
    advance(&to, -A8_STAGES);
    store_param(job, to, pair, p);
    store_first(to, m, most_bits == 0 ? 0.0f : a8_exact_div(A8_INT8_LEVELS, most));
    a8_log8_header after = a8_log8_header_of(a8_log8_low(low), (int32_t)high, header);
    store_second(job, to, pair, v, a8_log8_origin(after.lo), a8_exact_reciprocal((float)after.step));
    if ((threadIdx.x & 15u) == 0) {
      __stcs(reinterpret_cast<float*>(to.first_block), most_bits == 0 ? 0.0f : a8_exact_div_127(most));
      __stcs(reinterpret_cast<uint32_t*>(to.second_block), a8_log8_pack(after));
    }
  }

  // Notes a unit of the stretch for a8_adam_general. By one thread.
  static __device__ __forceinline__ void leave(unsigned long long* left, uint32_t unit) {
    const uint32_t kUnits = A8_CHUNK / A8_UNIT;
    atomicOr(&left[unit / kUnits], 1ull << unit % kUnits);
  }

  // All units of the stretch, but what is left to a8_adam_general in `left`: those that are not ordinary, and a
  // last one that is not whole.
  static __device__ __forceinline__ void run(const a8_adam_job& job, a8_fast_room* room, unsigned long long* left) {
    const a8_tensor* t = job.tensor;
    uint32_t lane = threadIdx.x & 31u, warp = threadIdx.x / 32, units = job.count / A8_UNIT;
    if (threadIdx.x == 0 && job.count % A8_UNIT != 0) leave(left, units);
    if (warp >= units) return;
    uint32_t at_element = warp * A8_UNIT + lane / 16 * A8_FAST_BLOCK + lane % 16 * (8 / kRuns);
    int64_t e = job.from + at_element, block = e / A8_FAST_BLOCK;
    a8_fast_place at;
    at.param = static_cast<char*>(t->param) + e * kParamBytes;
    at.grad = static_cast<const char*>(t->grad) + e * kGradBytes;
    at.first = static_cast<char*>(t->first) + e;
    at.second = static_cast<char*>(t->second) + e;
    at.first_block = static_cast<char*>(t->first_block) + block * 4;
    at.second_block = static_cast<char*>(t->second_block) + block * 4;
    Stage* stages = reinterpret_cast<Stage*>(room->bytes);
#pragma unroll
    for (int i = 0; i < A8_STAGES; ++i) {
      if (warp + i * kWarps < units) load(at, &stages[i]);
      a8_copies_commit();
      advance(&at, 1);
    }
    uint32_t number = 0;
#pragma unroll 1
    for (uint32_t unit = warp; unit < units; unit += kWarps) {
      a8_copies_wait<A8_STAGES - 1>();
      step(job, at, at_element / 2, unit, unit + A8_STAGES * kWarps < units, &stages[number], left);
      a8_copies_commit();
      number ^= 1;
      advance(&at, 1);
      at_element += kStride;
    }
  }
};
