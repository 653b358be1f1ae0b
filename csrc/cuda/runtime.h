// What a call needs of the CUDA runtime. No torch here; the tests have the same functions for the host.
#pragma once

#include <cstdint>

namespace prefix_kernels::cuda {

// Of the current device; 0 where it cannot be asked.
int multiprocessors();

// The most thread blocks that a cluster may have where everything else fits.
int largest_cluster();

}  // namespace prefix_kernels::cuda
