// Which moments an element-wise rule has: what abi.cpp checks and the kernels rely on.
#pragma once

#include "a8/abi.h"

// MAY: without it the tensor's format is NONE and the moment counts as zero.
enum Presence : uint8_t { NEVER, MAY, MUST };

struct RuleMoments {
  Presence first, second, third;
};

// By a8_rule_kind.
static constexpr RuleMoments RULE_MOMENTS[] = {
    {MUST, MUST, NEVER},   // Adam
    {MUST, NEVER, NEVER},  // Lion
    {MAY, MUST, MAY},      // RMSprop: momentum, average square, average gradient
    {MAY, NEVER, NEVER},   // SGD
    {NEVER, MUST, NEVER},  // Adagrad
    {MUST, MUST, MUST},    // AdEMAMix
    {MUST, MUST, NEVER},   // LAMB
    {MAY, NEVER, NEVER},   // LARS
};
static constexpr uint32_t RULE_COUNT = sizeof RULE_MOMENTS / sizeof RULE_MOMENTS[0];
static_assert(RULE_COUNT == A8_LARS + 1, "a row for every rule");
