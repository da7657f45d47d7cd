// APOLLO's random matrix (docs/decisions/0013-projection.md): nearly normal integers from -8 to 8, exact in every type.
#pragma once

#include "math.h"

// Numbers 2 * pair and 2 * pair + 1: of the 16 bits of noise that each has, how many are ones, less 8.
A8_FN void a8_draw_pair(a8_noise key, uint32_t pair, float* even, float* odd) {
  uint32_t x = a8_noise_word(key, pair);
  x -= x >> 1 & 0x55555555u;
  x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0fu;
  x += x >> 8;
  *even = (float)(int32_t)(x & 31u) - 8.0f;
  *odd = (float)(int32_t)(x >> 16 & 31u) - 8.0f;
}
