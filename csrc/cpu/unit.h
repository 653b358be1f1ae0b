// The unit that multiplies: the matrix unit where these kernels are compiled for one and the queries are bfloat16.
#pragma once

#include "vector_unit.h"
#if defined(__AMX_BF16__)
#include "matrix_unit.h"
#endif

namespace prefix_kernels::ISA {

template <typename Run>
inline void with_unit([[maybe_unused]] const Problem& p, const Run& run) {
#if defined(__AMX_BF16__)
  if (p.q.element == Element::bfloat16) return run.template operator()<MatrixUnit>();
#endif
  run.template operator()<VectorUnit>();
}

}  // namespace prefix_kernels::ISA
