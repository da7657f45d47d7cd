// A warp's lines on their way from memory to registers, for the fast paths of Adafactor: each lane copies its own eight
// elements of the next lines to shared memory while it works, so that many bytes are in flight and no register waits.
#pragma once

#include "adafactor_fast.cuh"

// Each warp has an arena of its own (A8_ARENA_BYTES): neighbours may work on other types, in other layouts.
#define A8_MOST_STAGES 8

// What is staged of one line: eight values of kGrad and, with kParamBytes, of the parameter; codes and headers of the
// moments. float32 moments are not staged.
template <int kParamBytes, uint32_t kGrad, bool kMomentum, bool kFull>
struct a8_stages {
  static const int kGradBytes = kGrad == A8_F32 ? 4 : 2;
  static const int kParamAt = kGradBytes * 8 * 32;
  static const int kFirstAt = kParamAt + kParamBytes * 8 * 32;
  static const int kScaleAt = kFirstAt + (kMomentum ? 8 * 32 : 0);
  static const int kSecondAt = kScaleAt + (kMomentum ? 4 * 32 : 0);
  static const int kHeaderAt = kSecondAt + (kFull ? 8 * 32 : 0);
  static const int kBytes = kHeaderAt + (kFull ? 4 * 32 : 0);
  static const int kCount = A8_ARENA_BYTES / kBytes < A8_MOST_STAGES ? A8_ARENA_BYTES / kBytes : A8_MOST_STAGES;
  static_assert(kCount >= 2, "two lines in flight");

  char* arena;  // of the warp
  uint32_t at;  // of the stage whose turn it is

  A8_MEMBER void turn() {
    at += kBytes;
    at = at == kCount * kBytes ? 0u : at;
  }

  template <int kValueBytes>
  A8_MEMBER void load_values(int row, const char* from, bool exists) {
#pragma unroll
    for (int i = 0; i < kValueBytes / 2; ++i)
      a8_copy_or_zero<16, kValueBytes == 4>(arena + at + row + i * 16 * 32 + 16 * a8_lane(), from + 16 * i, exists);
  }

  // Starts the copies of the lane's eight at element e of the chunk; beyond its end they read as zeros. of_param: all of
  // them; else the gradient and the second moment alone. of_header: the second moment's too.
  A8_MEMBER void load(const a8_lane_place& place, uint32_t e, bool of_param, bool of_header = true) {
    bool exists = e < place.count;
    load_values<kGradBytes>(0, place.grad + (uint64_t)e * kGradBytes, exists);
    if (kParamBytes && of_param) load_values<kParamBytes>(kParamAt, place.param + (uint64_t)e * kParamBytes, exists);
    if (kMomentum && of_param && place.first_format != A8_STATE_F32) {
      if (place.first_format == A8_INT8)
        a8_copy_or_zero<8>(arena + at + kFirstAt + 8 * a8_lane(), place.first + e, exists);
      else
        a8_copy_or_zero<4>(arena + at + kFirstAt + 8 * a8_lane(), place.first + e / 2, exists);
      a8_copy_or_zero<4>(arena + at + kScaleAt + 4 * a8_lane(), place.first_block + e / A8_USUAL_BLOCK * 4, exists);
    }
    if (kFull && place.log8) {
      a8_copy_or_zero<8>(arena + at + kSecondAt + 8 * a8_lane(), place.second + e, exists);
      if (of_header)
        a8_copy_or_zero<4>(arena + at + kHeaderAt + 4 * a8_lane(), place.second_block + (e >> place.second_shift) * 4,
                           exists);
    }
    a8_copies_commit();
  }

  template <uint32_t kDtype>
  A8_MEMBER void read_values(int row, a8_eight<kDtype>* x) const {
#pragma unroll
    for (int i = 0; i < a8_eight<kDtype>::kWords; i += 4) {
      uint4 y = *reinterpret_cast<const uint4*>(arena + at + row + i * 4 * 32 + 16 * a8_lane());
      x->w[i] = y.x, x->w[i + 1] = y.y, x->w[i + 2] = y.z, x->w[i + 3] = y.w;
    }
  }

  A8_MEMBER void read_first(a8_first_eight* x) const {
    uint2 codes = *reinterpret_cast<const uint2*>(arena + at + kFirstAt + 8 * a8_lane());
    x->codes[0] = codes.x, x->codes[1] = codes.y;
    x->scale = *reinterpret_cast<const float*>(arena + at + kScaleAt + 4 * a8_lane());
  }

  A8_MEMBER void read_second(uint32_t* codes) const {
    uint2 x = *reinterpret_cast<const uint2*>(arena + at + kSecondAt + 8 * a8_lane());
    codes[0] = x.x, codes[1] = x.y;
  }

  A8_MEMBER a8_log8_header read_header() const {
    return a8_log8_unpack(*reinterpret_cast<const uint32_t*>(arena + at + kHeaderAt + 4 * a8_lane()));
  }
};
