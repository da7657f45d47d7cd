// Chooses the instruction set and orders the phases of a step.
#pragma once

#include "kernels.h"

// The kernels for an a8_isa (A8_ISA_AUTO: the best). Null when it is not built in or the processor lacks it.
const a8_kernels* a8_kernels_for(uint32_t isa);

// The phases (a8_phase bits) of an Adafactor step.
void a8_run_adafactor(const a8_kernels* kernels, uint32_t threads, const a8_job* job, uint32_t phases);
