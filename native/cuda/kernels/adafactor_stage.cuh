// A warp's lines on their way from memory to registers, for the fast paths of Adafactor: each lane copies its own eight
// elements of the next lines to shared memory while it works, so that many bytes are in flight and no register waits.
// Of the lanes that share a block of codes one copies its header for all: copies of the same four bytes by sixteen of
// them are served one after the other (docs/decisions/0024).
#pragma once

#include "adafactor_fast.cuh"

// Each warp has an arena of its own (A8_ARENA_BYTES): neighbours may work on other types, in other layouts. Lines in
// flight, at most: without moments, and with one or two; more of the latter take 1% or 2% longer (docs/decisions/0024).
#define A8_MOST_STAGES 8
#define A8_STATE_STAGES 3

// What is staged of one line: eight values of kGrad and, with kParamBytes, of the parameter; codes of the moments, and
// for each block in the line its header. float32 moments are not staged.
template <int kParamBytes, uint32_t kGrad, bool kMomentum, bool kFull>
struct a8_stages {
  static const int kGradBytes = kGrad == A8_F32 ? 4 : 2;
  static const int kParamAt = kGradBytes * 8 * 32;
  static const int kFirstAt = kParamAt + kParamBytes * 8 * 32;
  static const int kSecondAt = kFirstAt + (kMomentum ? 8 * 32 : 0);
  static const int kScaleAt = kSecondAt + (kFull ? 8 * 32 : 0);
  static const int kHeaderAt = kScaleAt + (kMomentum ? 16 : 0);
  static const int kBytes = kHeaderAt + (kFull ? A8_LINE / A8_MIN_BLOCK * 4 : 0);
  static const bool kShares = kMomentum || kFull;  // headers, so that the warp's lanes stay together
  static const int kRoom = A8_ARENA_BYTES / kBytes, kMost = kShares ? A8_STATE_STAGES : A8_MOST_STAGES;
  static const int kCount = kRoom < kMost ? kRoom : kMost;
  static_assert(kCount >= 2, "two lines in flight");

  uint32_t arena;  // the warp's, an address in shared memory: left to itself the compiler makes it anew for every line
  uint32_t at;     // of the stage whose turn it is

  A8_MEMBER explicit a8_stages(const char* room) : arena(a8_shared_address(room)), at(0) { a8_settle(&arena); }

  A8_MEMBER void turn() {
    at += kBytes;
    at = min(at, at - kCount * kBytes);  // the difference wraps when it is below zero
  }

  A8_MEMBER char* in_stage(uint32_t bytes) const {
    return static_cast<char*>(__cvta_shared_to_generic(arena + at + bytes));
  }
  A8_MEMBER char* of_lane(int row, int bytes) const { return in_stage(row + bytes * a8_lane()); }

  // Codes of the first moment. Those of nf4 are half as many; only where the format is known their place is too.
  A8_MEMBER char* first_codes(uint32_t format) const { return of_lane(kFirstAt, !kFull && format == A8_NF4 ? 4 : 8); }

  // The headers of the lane's blocks, and whether the lane copies them for the others.
  A8_MEMBER char* scale() const { return in_stage(kScaleAt + a8_lane() / (A8_USUAL_BLOCK / 8) * 4); }
  A8_MEMBER static bool leads_first() { return a8_lane() % (A8_USUAL_BLOCK / 8) == 0; }
  A8_MEMBER char* header(const a8_lane_place<kFull>& place) const {
    return in_stage(kHeaderAt + (8 * a8_lane() >> place.second_shift) * 4);
  }
  A8_MEMBER static bool leads_second(const a8_lane_place<kFull>& place) {
    return (8 * a8_lane() & ((1u << place.second_shift) - 1u)) == 0;
  }

  template <int kValueBytes>
  A8_MEMBER void load_values(int row, const char* from, bool exists) {
#pragma unroll
    for (int i = 0; i < kValueBytes / 2; ++i)
      a8_copy_or_zero<16, kValueBytes == 4>(of_lane(row + i * 16 * 32, 16), from + 16 * i, exists);
  }

  // Waits until the stage whose turn it is has arrived, for all lanes of the warp.
  A8_MEMBER void wait() const {
    a8_copies_wait<kCount - 1>();
    if (kShares) __syncwarp();
  }

  // Starts the copies of the lane's eight in the line that is kAhead after `line`; beyond its end they read as zeros.
  template <int kAhead>
  A8_MEMBER void load(const a8_lane_place<kFull>& place, uint32_t line) {
    const uint64_t kStep = a8_lane_place<kFull>::kStep;
    uint32_t ahead = line + kAhead;
    bool exists = ahead < place.lines;
    if (kShares) __syncwarp();  // all lanes have read what lay there
    load_values<kGradBytes>(0, place.grad + ahead * (kStep * kGradBytes), exists);
    if (kParamBytes) load_values<kParamBytes>(kParamAt, place.param + ahead * (kStep * kParamBytes), exists);
    if (kMomentum && place.first_format != A8_STATE_F32) {
      if (place.first_format == A8_INT8)
        a8_copy_or_zero<8>(first_codes(A8_INT8), place.first + ahead * kStep, exists);
      else
        a8_copy_or_zero<4>(first_codes(A8_NF4), place.first + ahead * (kStep / 2), exists);
      if (leads_first()) a8_copy_or_zero<4>(scale(), place.first_block + ahead * (kStep / A8_USUAL_BLOCK * 4), exists);
    }
    if (kFull && place.log8) {
      a8_copy_or_zero<8>(of_lane(kSecondAt, 8), place.second + ahead * kStep, exists);
      if (leads_second(place)) a8_copy_or_zero<4>(header(place), a8_second_block(place, ahead), exists);
    }
    a8_copies_commit();
  }

  // Starts the copies of the first lines, one a stage.
  A8_MEMBER void begin(const a8_lane_place<kFull>& place) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      load<0>(place, i);
      turn();
    }
  }

  template <uint32_t kDtype>
  A8_MEMBER void read_values(int row, a8_eight<kDtype>* x) const {
#pragma unroll
    for (int i = 0; i < a8_eight<kDtype>::kWords; i += 4) {
      uint4 y = *reinterpret_cast<const uint4*>(of_lane(row + i * 4 * 32, 16));
      x->w[i] = y.x, x->w[i + 1] = y.y, x->w[i + 2] = y.z, x->w[i + 3] = y.w;
    }
  }

  // Codes and header of the first moment, unless it is float32. active: whether the lane has an eight in the line;
  // else its zeros have no scale either.
  A8_MEMBER a8_first_eight read_first(uint32_t format, bool active) const {
    a8_first_eight first = {{0u, 0u}, 0.0f};
    if (format == A8_STATE_F32) return first;
    const char* codes = first_codes(format);
    first.codes[0] = *reinterpret_cast<const uint32_t*>(codes);
    if (format == A8_INT8) {
      uint2 x = *reinterpret_cast<const uint2*>(codes);
      first.codes[0] = x.x, first.codes[1] = x.y;
    }
    float shared = *reinterpret_cast<const float*>(scale());
    first.scale = active ? shared : 0.0f;
    return first;
  }

  // Of the second moment. What is not staged is left over from before.
  A8_MEMBER uint32_t read_second(const a8_lane_place<kFull>& place, uint32_t* codes) const {
    uint2 x = *reinterpret_cast<const uint2*>(of_lane(kSecondAt, 8));
    codes[0] = x.x, codes[1] = x.y;
    return *reinterpret_cast<const uint32_t*>(header(place));
  }
};
