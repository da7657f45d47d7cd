// Reads of Python's objects, for abi.cpp: see reader.cpp.
#pragma once

#include "a8/abi.h"

// Whether the tensors of two lists have the type, device, shape and strides that `facts` say. `params`: tensors; their
// gradients are put into `grads`. False: one differs, is missing, or an error of Python's is set.
bool a8_same_tensors(const a8_interpreter* python, void* params, void* grads, uint32_t count, int64_t* facts,
                     uint32_t fact_count, uint64_t* addresses, bool learns);

// Whether the values of the dictionaries, one after the other, are the very objects of a list.
bool a8_same_values(const a8_interpreter* python, void* dicts, void* values, uint32_t count, uint32_t value_count);
