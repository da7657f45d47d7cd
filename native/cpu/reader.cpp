// What a step looks at of torch's tensors and of the optimizer's dictionaries, in one call: a call of Python's for each
// takes three times as long. The interpreter's functions come as pointers (a8_interpreter), so that one library serves
// every version; the caller holds its lock, and no other code of Python runs in between but torch's getter of `grad`.
#include <cstring>

#include "a8/abi.h"
#include "reader.h"

namespace {

// DLPack 1: https://dmlc.github.io/dlpack, DLTensor.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

using Item = void* (*)(void* list, intptr_t index);               // borrowed
using PutItem = int (*)(void* list, intptr_t index, void* item);  // takes the reference
using Attribute = void* (*)(void* object, void* name);            // a new reference
using NextEntry = int (*)(void* dict, intptr_t* at, void** key, void** value);
using Look = int (*)(void* tensor, DlTensor* found);

template <typename Function>
Function function(const void* address) {
  return reinterpret_cast<Function>(reinterpret_cast<uintptr_t>(address));
}

// Whether a fact is what it was; `learns`: it becomes what it is.
bool holds(int64_t* fact, int64_t now, bool learns) {
  if (learns) *fact = now;
  return *fact == now;
}

// Type, device, shape and strides of a tensor. facts moves on to the next one's; `end`: of them all.
bool holds(int64_t** facts, const int64_t* end, const DlTensor& t, bool learns) {
  int64_t* fact = *facts;
  if (end - fact < 2 + 2 * (int64_t)t.dimensions) return false;
  const int64_t device = (int64_t)t.device_type << 32 | (uint32_t)t.device_id;
  const int64_t type = (int64_t)t.dimensions << 32 | t.type_code << 24 | t.type_bits << 16 | t.type_lanes;
  bool same = holds(fact++, device, learns) && holds(fact++, type, learns);
  for (int32_t i = 0; same && i < t.dimensions; ++i)
    same = holds(fact++, t.shape[i], learns) && holds(fact++, t.strides[i], learns);
  *facts = fact;
  return same;
}

}  // namespace

bool a8_same_tensors(const a8_interpreter* python, void* params, void* grads, uint32_t count, int64_t* facts,
                     uint32_t fact_count, uint64_t* addresses, bool learns) {
  const int64_t* end = facts + fact_count;
  const auto item = function<Item>(python->list_item);
  const auto put_item = function<PutItem>(python->put_item);
  const auto attribute = function<Attribute>(python->attribute);
  const auto look = function<Look>(python->look);
  void* const name = const_cast<void*>(python->grad);
  for (uint32_t i = 0; i < count; ++i) {
    DlTensor found;
    void* param = item(params, i);
    if (!param || look(param, &found) || !holds(&facts, end, found, learns)) return false;
    addresses[i] = (uint64_t)(uintptr_t)found.data + found.byte_offset;
    void* grad = attribute(param, name);
    if (!grad || put_item(grads, i, grad) || grad == python->none) return false;
    if (look(grad, &found) || !holds(&facts, end, found, learns)) return false;
    addresses[count + i] = (uint64_t)(uintptr_t)found.data + found.byte_offset;
  }
  return true;
}

bool a8_same_values(const a8_interpreter* python, void* dicts, void* values, uint32_t count, uint32_t value_count) {
  const auto item = function<Item>(python->list_item);
  const auto next_entry = function<NextEntry>(python->next_entry);
  intptr_t at = 0;
  for (uint32_t i = 0; i < count; ++i) {
    void *dict = item(dicts, i), *key, *value;
    if (!dict) return false;
    for (intptr_t entry = 0; next_entry(dict, &entry, &key, &value); ++at)
      if (item(values, at) != value) return false;
  }
  return at == (intptr_t)value_count;
}
