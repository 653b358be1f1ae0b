// The unit that multiplies: the matrix unit where these kernels are compiled for one and the queries are bfloat16.
#pragma once

#include <memory>

#include "vector_unit.h"
#if defined(__AMX_BF16__)
#include "matrix_unit.h"
#endif

namespace prefix_kernels::ISA {

// What a kernel needs for its tiles, uninitialized, and kept by each thread: a thread's stack may be too small for it.
template <typename T>
inline T& scratch() {
  thread_local const std::unique_ptr<T> memory(new T);
  return *memory;
}

template <typename Run>
inline void with_unit([[maybe_unused]] const Problem& p, const Run& run) {
#if defined(__AMX_BF16__)
  if (p.q.element == Element::bfloat16) return run.template operator()<MatrixUnit>();
#endif
  run.template operator()<VectorUnit>();
}

}  // namespace prefix_kernels::ISA
