// What a call needs of the CUDA runtime. No torch here; the tests have the same functions for the host.
#pragma once

#include <cstdint>

namespace prefix_kernels::cuda {

// Of the current device; 0 where it cannot be asked.
int multiprocessors();

// `count` counters on the current device that are 0 before each use, if each use leaves them so; no other stream has them, and
// no other call of a graph that is being captured. Null where none are left: then the caller brings zeros of his own.
unsigned* take_counters(int64_t count, void* stream);

}  // namespace prefix_kernels::cuda
