// The norm and apply phases of Adafactor with an element-wise second moment, by a block of threads on a run: chunks of
// one tensor that follow each other. Its warps take the run's lines in turns, a round at a time, so that what they read
// and write lies together: with a chunk each, the apply phase took an eighth longer (docs/decisions/0021). Of every
// chunk a warp then has the lines of one of the A8_DEALT sums that make up the chunk's (a8/geometry.h).
#pragma once

#include "adafactor_apply.cuh"
#include "adafactor_norm.cuh"

static_assert(A8_DEALT == A8_WARPS && A8_CHUNK % A8_ROUND == 0, "a warp a sum");

// The extremes of a log8 block's new values: a8_log8_low_key, and bits.
typedef struct a8_log8_extremes {
  uint32_t low, high;
} a8_log8_extremes;

// Shared memory of a run: [chunk][sum], and what its warps tell each other.
typedef struct a8_run_room {
  uint32_t chunks;
  float param_squares[A8_WARPS][A8_DEALT], update_squares[A8_WARPS][A8_DEALT];
  uint32_t unknown;                        // bit c: chunk c's sum of p^2 is to be made
  a8_log8_extremes extremes[2][A8_WARPS];  // of the lines of a round and of the next
} a8_run_room;

// --- Runs. ---

// Chunks that share the high half of a pair's number (a8_noise_at).
#define A8_NOISE_CHUNKS (1u << 19)
static_assert((int64_t)A8_NOISE_CHUNKS * A8_CHUNK == 2ll << 32, "2^32 pairs");

// Chunks of the run that begins with chunk number `at` and ends before number `end`, at most 31 on. By whole warps.
A8_FN uint32_t a8_run_length(const a8_batch& batch, uint32_t at, uint32_t end) {
  const uint32_t lane = a8_lane(), tensor = batch.chunks[at].tensor;
  bool ends = at + lane >= end;
  if (!ends) {
    a8_chunk unit = batch.chunks[at + lane];
    ends = unit.tensor != tensor || (lane != 0 && unit.part % A8_NOISE_CHUNKS == 0);
  }
  return (uint32_t)__ffs((int)__ballot_sync(A8_LANE_MASK, ends)) - 1u;
}

// The job of that run, and in *chunks its chunks. The last one is left out where it does not end with an eight: a run
// alone, it goes the general way.
A8_FN a8_factor_job a8_run_job_of(const a8_batch& batch, float* scratch, uint32_t at, uint32_t end, uint32_t* chunks) {
  *chunks = a8_run_length(batch, at, end);
  a8_factor_job job = a8_factor_job_of(batch, scratch, at);
  int64_t left = job.tensor->numel - job.from;
  if (left % 8 != 0 && *chunks > 1 && left < (int64_t)*chunks * A8_CHUNK) --*chunks;
  job.count = (uint32_t)min((long long)left, (long long)*chunks * A8_CHUNK);
  return job;
}

// After a round: at the end of a chunk or of the run leaves the warp's sum of it, and begins anew.
A8_FN void a8_deal_squares(uint32_t round, uint32_t rounds, float* accumulators, float (*sums)[A8_DEALT]) {
  const uint32_t kEach = A8_CHUNK / A8_ROUND;
  if ((round + 1) % kEach != 0 && round + 1 != rounds) return;
  float sum = a8_fold_warp(accumulators);
  if (a8_lane() == 0) sums[round / kEach][threadIdx.x / 32] = sum;
#pragma unroll
  for (int i = 0; i < 8; ++i) accumulators[i] = 0.0f;
}

// --- The norm phase. ---

// kMomentum: with a first moment that averages gradients. meanwhile(): is called while the first lines are coming.
template <uint32_t kGrad, bool kMomentum, a8_second_kind kSecond, typename Meanwhile>
A8_FN void a8_full_squares(const a8_factor_job& job, char* arena, const a8_nf4_table* table, a8_run_room* room,
                           Meanwhile meanwhile) {
  typedef a8_stages<0, kGrad, kMomentum, true> Stages;
  Stages stages(arena);
  a8_lane_place<true> place = a8_lane_place_of<true>(job);
  place.expect(kSecond);
  const float bound = job.bound * job.bound;
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  stages.begin(place);
  meanwhile();
#pragma unroll 1
  for (uint32_t line = 0; line < place.all_lines; ++line) {
    a8_settle(&line);  // an address each from its number costs less than one that moves on
    bool active = line < place.lines;
    a8_eight<kGrad> grad;
    a8_first_eight first;
    uint32_t codes[2];
    float g[8], v[8], reciprocal[8], m[8];
    stages.wait();
    stages.read_values(0, &grad);
    if (kMomentum) first = stages.read_first(place.first_format, active);
    const a8_log8_header before = a8_log8_unpack(stages.read_second(place, codes));
    stages.template load<Stages::kCount>(place, line);
    stages.turn();
    a8_values<kGrad>(grad, g);
#pragma unroll
    for (int i = 0; i < 8; ++i) a8_settle(g + i);  // else they are unpacked anew for each use
    a8_new_second_of(place.log8, codes, before, place.second + (uint64_t)line * (place.kStep * 4), active, g, job.hyper,
                     v);
    a8_reciprocals(v, bound, a8_are_ordinary(v), reciprocal);
    if (kMomentum)
      a8_decode_first(first, place.first_format, place.first + (uint64_t)line * (place.kStep * 4), active, table, m);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float x = kMomentum ? a8_new_first(job, m[i], g[i]) : g[i];
      if (active) accumulators[i] += x * reciprocal[i] * x;  // a8_update_square
    }
    a8_deal_squares(line, place.all_lines, accumulators, room->update_squares);
  }
}

template <uint32_t kGrad, bool kMomentum, typename Meanwhile>
A8_FN void a8_full_squares_of(const a8_factor_job& job, char* arena, const a8_nf4_table* table, a8_run_room* room,
                              Meanwhile meanwhile) {
  switch (a8_second_kind_of(job.tensor)) {
    case A8_USUAL_LOG8:
      return a8_full_squares<kGrad, kMomentum, A8_USUAL_LOG8>(job, arena, table, room, meanwhile);
    case A8_ANY_LOG8:
      return a8_full_squares<kGrad, kMomentum, A8_ANY_LOG8>(job, arena, table, room, meanwhile);
    default:
      return a8_full_squares<kGrad, kMomentum, A8_FLOATS>(job, arena, table, room, meanwhile);
  }
}

template <uint32_t kGrad, typename Meanwhile>
A8_FN void a8_full_squares_of(const a8_factor_job& job, char* arena, const a8_nf4_table* table, a8_run_room* room,
                              Meanwhile meanwhile) {
  if (job.tensor->first_format != A8_NONE && !a8_averages_update(job))
    a8_full_squares_of<kGrad, true>(job, arena, table, room, meanwhile);
  else
    a8_full_squares_of<kGrad, false>(job, arena, table, room, meanwhile);
}

// Sums of u^2 of a run, and which of its chunks need one of p^2. at: the number of the first. By every thread of the
// block.
A8_FN void a8_norm_run(const a8_batch& batch, float* scratch, uint32_t at, const a8_factor_job& job, char* arena,
                       const a8_nf4_table* table, a8_run_room* room) {
  auto mark_unknown = [&batch, scratch, at, room] {
    if (threadIdx.x >= 32) return;
    bool unknown = false;
    if (threadIdx.x < room->chunks) {
      const a8_factor_job mine = a8_factor_job_of(batch, scratch, at + threadIdx.x);
      unknown = a8_scales(mine) && !a8_squares_are_known(mine);
    }
    uint32_t bits = __ballot_sync(A8_LANE_MASK, unknown);
    if (threadIdx.x == 0) room->unknown = bits;
  };
  if (!a8_needs_squares(job))
    mark_unknown();
  else if (job.tensor->grad_dtype == A8_BF16)
    a8_full_squares_of<A8_BF16>(job, arena, table, room, mark_unknown);
  else if (job.tensor->grad_dtype == A8_F32)
    a8_full_squares_of<A8_F32>(job, arena, table, room, mark_unknown);
  else
    a8_full_squares_of<A8_F16>(job, arena, table, room, mark_unknown);
}

// Then the sums of p^2, and both to where the next phase finds them. Jobs are made anew: kept, their pointers would
// take the registers that a8_norm_run needs.
A8_FN void a8_end_norm_run(const a8_batch& batch, float* scratch, uint32_t at, a8_run_room* room) {
  __syncthreads();
  for (uint32_t chunk = 0; chunk < room->chunks; ++chunk) {
    if (!(room->unknown >> chunk & 1u)) continue;
    float sum = a8_param_squares_of<true>(a8_factor_job_again(batch, scratch, at + chunk));
    if (a8_lane() == 0) room->param_squares[chunk][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  const uint32_t me = threadIdx.x;
  if (me >= room->chunks) return;
  const a8_factor_job job = a8_factor_job_again(batch, scratch, at + me);
  if (!a8_scales(job))
    job.sums[0] = 0.0f;
  else if (room->unknown >> me & 1u)
    job.sums[0] = a8_fold_dealt(room->param_squares[me]);
  job.sums[job.tensor->chunks] = a8_needs_squares(job) ? a8_fold_dealt(room->update_squares[me]) : 0.0f;
}

// --- The apply phase. ---

// The maximum over groups of `lanes` lanes: 4, 8, 16 or 32.
A8_FN uint32_t a8_group_max(uint32_t x, uint32_t lanes) {
  if (lanes == 32) return a8_lanes_max<32>(x);
  if (lanes == 16) return a8_lanes_max<16>(x);
  for (uint32_t bit = lanes / 2; bit > 0; bit /= 2) x = max(x, __shfl_xor_sync(A8_LANE_MASK, x, bit));
  return x;
}

// How a line's part of a log8 block (or several blocks, if they share the line) is encoded anew.
typedef struct a8_log8_plan {
  int32_t origin;
  float inverse_step;
  bool ordinary;  // all new values of the warp are at most A8_ROOT_MAX
} a8_log8_plan;

// From all new values of the lane's block of `size` elements, of which the warps have a line each, at most; none is
// negative or subnormal. before, after: its headers. By every thread of the block where size is greater than a line.
// room: a8_run_room's, of the round.
A8_FN a8_log8_plan a8_plan_log8(const float* v, uint32_t size, a8_log8_header before, a8_log8_extremes* room,
                                a8_log8_header* after) {
  uint32_t low = 0xffffffffu, high = 0u;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    low = min(low, a8_log8_low_key((int32_t)a8_bits(v[i])));
    high = max(high, a8_bits(v[i]));
  }
  const uint32_t lanes = min(size / 8, 32u);
  low = ~a8_group_max(~low, lanes), high = a8_group_max(high, lanes);
  if (size > A8_LINE) {
    const uint32_t warp = a8_warp_number(), warps = size / A8_LINE, first = warp & ~(warps - 1u);
    if (a8_lane() == 0) room[warp].low = low, room[warp].high = high;
    __syncthreads();
    for (uint32_t i = first; i < first + warps; ++i) low = min(low, room[i].low), high = max(high, room[i].high);
  }
  high = min(high, (uint32_t)A8_LOG8_INFINITY);
  if (low != 0xffffffffu) low = min(low, a8_log8_low_key(A8_LOG8_INFINITY));  // a NaN counts as infinity
  a8_log8_plan plan;
  *after = a8_log8_header_of(a8_log8_low(low), (int32_t)high, before);
  plan.origin = a8_log8_origin(after->lo);
  plan.inverse_step = a8_exact_reciprocal((float)after->step);
  plan.ordinary = __all_sync(A8_LANE_MASK, high <= a8_bits(A8_ROOT_MAX));
  return plan;
}

A8_FN void a8_put_second(const a8_factor_job& job, const a8_factor_write& write, const a8_lane_place<true>& place,
                         uint32_t line, const a8_log8_plan& plan, float* v) {
  if (!plan.ordinary) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = a8_float(min(a8_bits(v[i]), (uint32_t)A8_LOG8_INFINITY));
  }
  float position[8];
  uint32_t packed[2];
  a8_log8_positions(v, plan.origin, plan.inverse_step, position);
  if (job.hyper.flags & A8_STOCHASTIC_STATE) {
#pragma unroll
    for (int i = 0; i < 8; ++i) position[i] = position[i] + a8_offset(a8_phase_at(write.phase, line * place.kStep + i));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) position[i] = position[i] + A8_LOG8_NEAREST;
  }
  a8_log8_eight(position, packed);
  __stcs(reinterpret_cast<uint2*>(const_cast<char*>(place.second) + (uint64_t)line * place.kStep),
         make_uint2(packed[0], packed[1]));
}

// Whether the compiler finds registers to empty a stage at once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define A8_SPARE_REGISTERS false
#else
#define A8_SPARE_REGISTERS true
#endif

// Leaves the sums of the squares of what is stored.
template <uint32_t kParam, uint32_t kGrad, bool kMomentum, a8_second_kind kSecond>
A8_FN void a8_apply_full(const a8_factor_job& job, char* arena, const a8_nf4_table* table, a8_run_room* room) {
  typedef a8_stages<kParam == A8_F32 ? 4 : 2, kGrad, kMomentum, true> Stages;
  const bool kEarly = !kMomentum && A8_SPARE_REGISTERS;
  Stages stages(arena);
  a8_lane_place<true> place = a8_lane_place_of<true>(job);
  place.expect(kSecond);
  const a8_factor_write write = a8_lane_write_of<true>(job);
  float accumulators[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  stages.begin(place);
#pragma unroll 1
  for (uint32_t line = 0; line < place.all_lines; ++line) {
    a8_settle(&line);
    bool active = line < place.lines;
    a8_eight<kGrad> grad;
    a8_eight<kParam> param;
    a8_first_eight first;
    uint32_t codes[2];
    float g[8], v[8], root[8], m[8], u[8];
    stages.wait();
    stages.read_values(0, &grad);
    if (kMomentum) first = stages.read_first(place.first_format, active);
    const a8_log8_header before = a8_log8_unpack(stages.read_second(place, codes));
    if (kEarly) {
      stages.read_values(Stages::kParamAt, &param);
      stages.template load<Stages::kCount>(place, line);
    }
    a8_values<kGrad>(grad, g);
    a8_new_second_of(place.log8, codes, before, place.second + (uint64_t)line * (place.kStep * 4), active, g, job.hyper,
                     v);
    a8_log8_plan plan;
    if (place.log8) {
      a8_log8_header after;
      plan = a8_plan_log8(v, 1u << place.second_shift, before, room->extremes[line % 2], &after);
      if (active && (a8_lane_start<true>() & ((1u << place.second_shift) - 1u)) == 0)
        *reinterpret_cast<uint32_t*>(const_cast<char*>(a8_second_block(place, line))) = a8_log8_pack(after);
    } else {
      plan.ordinary = a8_are_ordinary(v);
    }
    a8_roots(v, job.bound, plan.ordinary, root);
    if (active && place.log8)  // at once: v takes eight registers
      a8_put_second(job, write, place, line, plan, v);
    else if (active)
      a8_put_floats(v, const_cast<char*>(place.second) + (uint64_t)line * (place.kStep * 4), 0);
    if (kMomentum)
      a8_decode_first(first, place.first_format, place.first + (uint64_t)line * (place.kStep * 4), active, table, m);
    if (kMomentum) stages.read_values(0, &grad);  // again: meanwhile its registers were of use
    a8_update_eight<kGrad, kMomentum>(job, grad, root, m, u);
    if (kMomentum) a8_put_first(place, line, active, table, m);
    if (!kEarly) {
      stages.read_values(Stages::kParamAt, &param);
      stages.template load<Stages::kCount>(place, line);
    }
    stages.turn();
    if (active) a8_put_params<kParam>(job, write, place, line, a8_update_sign<kMomentum>(job), param, u, accumulators);
    a8_deal_squares(line, place.all_lines, accumulators, room->param_squares);
  }
}

template <uint32_t kParam, uint32_t kGrad, bool kMomentum>
A8_FN void a8_apply_full_of(const a8_factor_job& job, char* arena, const a8_nf4_table* table, a8_run_room* room) {
  switch (a8_second_kind_of(job.tensor)) {
    case A8_USUAL_LOG8:
      return a8_apply_full<kParam, kGrad, kMomentum, A8_USUAL_LOG8>(job, arena, table, room);
    case A8_ANY_LOG8:
      return a8_apply_full<kParam, kGrad, kMomentum, A8_ANY_LOG8>(job, arena, table, room);
    default:
      return a8_apply_full<kParam, kGrad, kMomentum, A8_FLOATS>(job, arena, table, room);
  }
}

template <uint32_t kParam, uint32_t kGrad>
A8_FN void a8_apply_full_of(const a8_factor_job& job, char* arena, const a8_nf4_table* table, a8_run_room* room) {
  if (job.tensor->first_format != A8_NONE)
    a8_apply_full_of<kParam, kGrad, true>(job, arena, table, room);
  else
    a8_apply_full_of<kParam, kGrad, false>(job, arena, table, room);
}

// By every thread of the block; a type of a8_suits_apply.
A8_FN void a8_apply_run(const a8_factor_job& job, char* arena, const a8_nf4_table* table, a8_run_room* room) {
  switch (A8_TYPES(job.tensor->param_dtype, job.tensor->grad_dtype)) {
    case A8_TYPES(A8_BF16, A8_BF16):
      return a8_apply_full_of<A8_BF16, A8_BF16>(job, arena, table, room);
    case A8_TYPES(A8_F32, A8_F32):
      return a8_apply_full_of<A8_F32, A8_F32>(job, arena, table, room);
    case A8_TYPES(A8_F16, A8_F16):
      return a8_apply_full_of<A8_F16, A8_F16>(job, arena, table, room);
    default:
      return a8_apply_full_of<A8_BF16, A8_F32>(job, arena, table, room);
  }
}
