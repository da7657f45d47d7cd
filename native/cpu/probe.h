// Which instruction-set variants this process may run.
#pragma once

#include "a8/abi.h"

// Bit (1 << isa) for every a8_isa that was compiled in.
uint32_t a8_isa_built();
// Those of them that the processor implements and whose registers the operating system saves.
uint32_t a8_isa_usable();
// The best usable one.
uint32_t a8_isa_best();
