// An element-wise rule with moments in any of the usual formats, for the chunks that element_fast.cuh does not take:
// one pass, a warp a unit, with the formulas of a8/rules.h as they stand.
#pragma once

#include "element_general.cuh"
#include "lanes.cuh"

// Whether a rule has a moment.
#define A8_HAS_FIRST(kind) ((kind) != A8_ADAGRAD)
#define A8_HAS_SECOND(kind) ((kind) != A8_LION && (kind) != A8_SGD && (kind) != A8_LARS)

// Blocks of threads that share a multiprocessor: the compiler then allows itself 128 registers. Before Ampere shared
// memory has room for one.
#define A8_LANES_RESIDENT (A8_AMPERE ? 2 : 1)

#define A8_UNIT_EIGHTS (A8_UNIT / 8)  // a lane each

A8_FN bool a8_suits_moment(const void* values, uint32_t format, uint32_t block_size) {
  return format <= A8_NF4 && a8_suits_eight(values, format, block_size);
}

// Whether a warp's lanes take eights of the tensor.
template <int KIND>
A8_FN bool a8_suits_eights(const a8_tensor* t) {
  bool first =
      A8_HAS_FIRST(KIND) ? a8_suits_moment(t->first, t->first_format, t->first_block_size) : t->first_format == A8_NONE;
  bool second = t->second_format == A8_NONE;
  if (A8_HAS_SECOND(KIND) && (t->second_format == A8_LOG8 || t->second_format == A8_STATE_F32))
    second = a8_suits_eight(t->second, t->second_format, t->second_block_size);
  bool third = !A8_HAS_THIRD(KIND) || a8_suits_moment(t->third, t->third_format, t->third_block_size);
  return first && second && third && a8_aligned(t->param, 16) && a8_aligned(t->grad, 16);
}

A8_FN bool a8_wants_nf4_table(const a8_tensor* t) { return t->first_format == A8_NF4 || t->third_format == A8_NF4; }

// A lane's eight of one unit: the parameter, the gradient as the moments see it, the moments.
typedef struct a8_lane_eight {
  float p[8], g[8], first[8], second[8], third[8];
  a8_log8_header header;  // of a log8 second
} a8_lane_eight;

// The arrays of a rule and a warp's units of them in flight. kMoments: whether they are wanted; kStride: units from one
// of the warp's to its next.
template <int KIND, bool kMoments, uint32_t kStride>
struct a8_lane_stream {
  static const bool kFirst = kMoments && A8_HAS_FIRST(KIND), kSecond = kMoments && A8_HAS_SECOND(KIND),
                    kThird = kMoments && A8_HAS_THIRD(KIND);
  a8_lane_array grad, param, first, second, third;
  char* arena;      // of the warp
  uint32_t bytes;   // of a stage
  uint32_t stages;  // how many, as bytes
  uint32_t at;      // of the stage whose turn it is
  uint32_t unit, units;
  uint32_t k;  // the lane's eight of the unit

  A8_MEMBER void load(uint32_t ahead) {
    uint32_t number = k + ahead * (kStride * A8_UNIT_EIGHTS);
    if (unit + ahead * kStride < units) {
      a8_load_lane(grad, arena + at, number);
      a8_load_lane(param, arena + at, number);
      if (kFirst) a8_load_lane(first, arena + at, number);
      if (kSecond) a8_load_lane(second, arena + at, number);
      if (kThird) a8_load_lane(third, arena + at, number);
    }
    a8_copies_commit();
    at += bytes;
    at = at == stages ? 0u : at;
  }

  // Starts with unit `from` of `count`.
  A8_MEMBER void begin(const a8_element_job& job, char* room, uint32_t from, uint32_t count) {
    const a8_tensor* t = job.tensor;
    arena = room;
    bytes = 0;
    grad = a8_lane_array_of(t->grad, nullptr, a8_lane_type(t->grad_dtype), job.from, &bytes);
    param = a8_lane_array_of(t->param, nullptr, a8_lane_type(t->param_dtype), job.from, &bytes);
    if (kFirst) first = a8_lane_array_of(t->first, t->first_block, t->first_format, job.from, &bytes);
    if (kSecond) second = a8_lane_array_of(t->second, t->second_block, t->second_format, job.from, &bytes);
    if (kThird) third = a8_lane_array_of(t->third, t->third_block, t->third_format, job.from, &bytes);
    stages = bytes * 3 <= A8_ARENA_BYTES ? bytes * 3 : bytes * 2 <= A8_ARENA_BYTES ? bytes * 2 : bytes;
    at = 0;
    unit = from, units = count;
    k = unit * A8_UNIT_EIGHTS + a8_lane();
    load(0);
    if (stages > bytes) load(1);
    if (stages > 2 * bytes) load(2);
  }

  // Reads the unit whose turn it is and starts the copies of the one that takes its place.
  A8_MEMBER void read(const a8_rule& rule, const a8_nf4_table* table, a8_lane_eight* x) {
    uint32_t ahead = 1;
    if (stages > 2 * bytes)
      a8_copies_wait<2>(), ahead = 3;
    else if (stages > bytes)
      a8_copies_wait<1>(), ahead = 2;
    else
      a8_copies_wait<0>();
    const char* stage = arena + at;
    a8_read_lane(grad, stage, x->g);
    a8_read_lane(param, stage, x->p);
    if (kFirst)
      a8_read_lane_moment(first, stage, table, x->first);
    else
      a8_no_eight(x->first);
    if (kSecond)
      a8_read_lane_second(second, stage, &x->header, x->second);
    else
      a8_no_eight(x->second);
    if (kThird)
      a8_read_lane_moment(third, stage, table, x->third);
    else
      a8_no_eight(x->third);
    load(ahead);
#pragma unroll
    for (int i = 0; i < 8; ++i) x->g[i] = a8_signed(x->g[i], rule.sign);
    if (rule.l2 != 0.0f) {  // a8_rule_gradient, with one branch
#pragma unroll
      for (int i = 0; i < 8; ++i) x->g[i] = x->g[i] + rule.l2 * x->p[i];
    }
  }

  A8_MEMBER void next() {
    unit += kStride;
    k += kStride * A8_UNIT_EIGHTS;
  }
};

// The update of element i, its new moments in the place of the old.
template <int KIND>
A8_FN float a8_update_of_eight(const a8_rule& rule, a8_lane_eight* x, int i) {
  a8_moments<float> m = {x->first[i], x->second[i], x->third[i]};
  float u = a8_rule_update<KIND>::of(&rule, x->p[i], x->g[i], &m);
  x->first[i] = m.first, x->second[i] = m.second, x->third[i] = m.third;
  return u;
}

// Stores a unit, or only notes it in `left` when it is not ordinary.
template <int KIND, typename Stream>
A8_FN void a8_store_unit(const a8_element_job& job, const Stream& to, const a8_nf4_table* table, const a8_lane_eight& x,
                         unsigned long long* left) {
  bool log8 = Stream::kSecond && to.second.type == A8_LOG8;
  uint32_t most = Stream::kFirst ? a8_lane_most(to.first, x.first) : 0u;
  uint32_t third_most = Stream::kThird ? a8_lane_most(to.third, x.third) : 0u;
  uint32_t low = 0u, high = 0u;
  if (log8) a8_lane_extremes(x.second, &low, &high);
  bool ordinary = a8_is_ordinary_lane(most) && a8_is_ordinary_lane(third_most) && a8_absmax_finite(high);
  if (!__all_sync(A8_LANE_MASK, ordinary)) {
    if (a8_lane() == 0) a8_leave_unit(left, to.unit);
    return;
  }
  const bool stochastic = job.rule.flags & A8_STOCHASTIC_STATE;
  const uint32_t phase = a8_phase_at(job.phase, 8 * to.k);
  if (log8)
    a8_put_lane_log8(to.second, to.k, x.second, low, high, x.header, stochastic, phase);
  else if (Stream::kSecond && to.second.type == A8_STATE_F32)
    a8_put_lane_values<A8_F32>(a8_eight_of(to.second, to.k), x.second);
  const bool by_phases = a8_rule_phases_first(KIND) && stochastic;
  if (Stream::kFirst) a8_put_lane_moment(to.first, to.k, table, x.first, most, by_phases, phase);
  if (Stream::kThird) a8_put_lane_moment(to.third, to.k, table, x.third, third_most, false, 0);
  a8_put_lane(to.param, to.k, x.p, job.rule.flags & A8_STOCHASTIC_WRITE, job.write);
}

// All units of the stretch, but what is left to a8_element_general in `left`: those that are not ordinary, and a last
// one that is not whole. arena: of the warp.
template <int KIND>
A8_FN void a8_lanes_run(const a8_element_job& job, char* arena, const a8_nf4_table* table, unsigned long long* left) {
  uint32_t units = job.count / A8_UNIT;
  if (threadIdx.x == 0 && job.count % A8_UNIT != 0) a8_leave_unit(left, units);
  a8_lane_stream<KIND, true, A8_WARPS> stream;
  stream.begin(job, arena, a8_warp_number(), units);
#pragma unroll 1
  for (; stream.unit < units; stream.next()) {
    a8_lane_eight x;
    stream.read(job.rule, table, &x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x.p[i] = a8_rule_param(&job.rule, x.p[i], a8_update_of_eight<KIND>(job.rule, &x, i));
    a8_store_unit<KIND>(job, stream, table, x, left);
  }
}

// The sums of p^2 and of a8_rule_measure^2 of a chunk of whole units, by one warp. arena: of the warp.
template <int KIND>
A8_FN float2 a8_measure_lanes(const a8_element_job& job, char* arena, const a8_nf4_table* table) {
  float param_squares[8], measure_squares[8];
  a8_no_eight(param_squares);
  a8_no_eight(measure_squares);
  a8_lane_stream<KIND, KIND != A8_LARS, 1> stream;
  stream.begin(job, arena, 0, job.count / A8_UNIT);
#pragma unroll 1
  for (; stream.unit < stream.units; stream.next()) {
    a8_lane_eight x;
    stream.read(job.rule, table, &x);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      a8_moments<float> m = {x.first[i], x.second[i], x.third[i]};
      float u = a8_rule_measure<KIND>(&job.rule, x.p[i], x.g[i], m);
      param_squares[i] += x.p[i] * x.p[i];
      measure_squares[i] += u * u;
    }
  }
  return make_float2(a8_fold_warp(param_squares), a8_fold_warp(measure_squares));
}
