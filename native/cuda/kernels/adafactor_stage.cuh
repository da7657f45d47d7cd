// A warp's lines on their way from memory to registers, for the fast paths of Adafactor: each lane copies its own eight
// elements of the next lines to shared memory while it works, so that many bytes are in flight and no register waits.
#pragma once

#include "adafactor_fast.cuh"

// Each warp has an arena of its own (A8_ARENA_BYTES): neighbours may work on other types, in other layouts.
#define A8_MOST_STAGES 8

// What is staged of one line: eight values of kGrad and, with kParamBytes, of the parameter; codes and headers of the
// moments, which share 16 bytes a lane, or 8 where the first is nf4 and there is no other (copies of 4 bytes then hit
// half as many banks twice), but for the second moment's codes when there is a first. float32 moments are not staged.
template <int kParamBytes, uint32_t kGrad, bool kMomentum, bool kFull>
struct a8_stages {
  static const int kGradBytes = kGrad == A8_F32 ? 4 : 2;
  static const int kParamAt = kGradBytes * 8 * 32;
  static const int kStateAt = kParamAt + kParamBytes * 8 * 32;
  static const int kHeaderAt = kStateAt + 12;
  static const int kSecondAt = kStateAt + (kMomentum ? 16 * 32 : 0);
  static const int kSecondBytes = kMomentum ? 8 : 16;  // from lane to lane
  static const int kBytes = (kMomentum || kFull ? kStateAt + 16 * 32 : kStateAt) + (kMomentum && kFull ? 8 * 32 : 0);
  static const int kCount = A8_ARENA_BYTES / kBytes < A8_MOST_STAGES ? A8_ARENA_BYTES / kBytes : A8_MOST_STAGES;
  static_assert(kCount >= 2, "two lines in flight");

  char* arena;  // of the warp
  uint32_t at;  // of the stage whose turn it is

  A8_MEMBER void turn() {
    at += kBytes;
    at = min(at, at - kCount * kBytes);  // the difference wraps when it is below zero
  }

  A8_MEMBER char* of_lane(int row) const { return arena + at + 16 * a8_lane() + row; }

  // Where the lane's codes of the first moment are (bytes: 0) and its block's scale (8). nf4 alone leaves out the bytes
  // between.
  A8_MEMBER static bool narrow(uint32_t first_format) { return kMomentum && !kFull && first_format == A8_NF4; }
  A8_MEMBER char* of_first(uint32_t format, int bytes) const {
    return narrow(format) ? arena + at + kStateAt + 8 * a8_lane() + bytes / 2 : of_lane(kStateAt + bytes);
  }

  template <int kValueBytes>
  A8_MEMBER void load_values(int row, const char* from, bool exists) {
#pragma unroll
    for (int i = 0; i < kValueBytes / 2; ++i)
      a8_copy_or_zero<16, kValueBytes == 4>(of_lane(row + i * 16 * 32), from + 16 * i, exists);
  }

  // Starts the copies of the lane's eight in the line that is kAhead after `line`; beyond its end they read as zeros.
  template <int kAhead>
  A8_MEMBER void load(const a8_lane_place<kFull>& place, uint32_t line) {
    const uint64_t kStep = a8_lane_place<kFull>::kStep;
    uint32_t ahead = line + kAhead;
    bool exists = ahead < place.lines;
    load_values<kGradBytes>(0, place.grad + ahead * (kStep * kGradBytes), exists);
    if (kParamBytes) load_values<kParamBytes>(kParamAt, place.param + ahead * (kStep * kParamBytes), exists);
    if (kMomentum && place.first_format != A8_STATE_F32) {
      if (place.first_format == A8_INT8)
        a8_copy_or_zero<8>(of_lane(kStateAt), place.first + ahead * kStep, exists);
      else
        a8_copy_or_zero<4>(of_first(A8_NF4, 0), place.first + ahead * (kStep / 2), exists);
      a8_copy_or_zero<4>(of_first(place.first_format, 8), place.first_block + ahead * (kStep / A8_USUAL_BLOCK * 4),
                         exists);
    }
    if (kFull && place.log8) {
      a8_copy_or_zero<8>(arena + at + kSecondAt + kSecondBytes * a8_lane(), place.second + ahead * kStep, exists);
      a8_copy_or_zero<4>(of_lane(kHeaderAt), a8_second_block(place, ahead), exists);
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
      uint4 y = *reinterpret_cast<const uint4*>(of_lane(row + i * 4 * 32));
      x->w[i] = y.x, x->w[i + 1] = y.y, x->w[i + 2] = y.z, x->w[i + 3] = y.w;
    }
  }

  // Codes and headers at once: what is not staged is left over from before.
  A8_MEMBER void read_state(uint32_t first_format, a8_first_eight* first, uint32_t* second, uint32_t* header) const {
    if (narrow(first_format)) {
      uint2 x = *reinterpret_cast<const uint2*>(of_first(first_format, 0));
      first->codes[0] = x.x;
      first->scale = a8_float(x.y);
      return;
    }
    uint4 x = *reinterpret_cast<const uint4*>(of_lane(kStateAt));
    first->codes[0] = x.x, first->codes[1] = x.y;
    first->scale = a8_float(x.z);
    second[0] = x.x, second[1] = x.y;
    *header = x.w;
    if (!kMomentum || !kFull) return;
    uint2 y = *reinterpret_cast<const uint2*>(arena + at + kSecondAt + kSecondBytes * a8_lane());
    second[0] = y.x, second[1] = y.y;
  }
};
