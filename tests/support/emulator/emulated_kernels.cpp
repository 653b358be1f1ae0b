// The kernels for the host, without torch: a library of its own, so that a mutation of them is compiled quickly.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "emulated_device.h"

#include "cuda/decode_kernel.h"

namespace prefix_kernels::cuda {

// All thread blocks of a kernel, one after the other.
static const char* run_grid(int64_t count, unsigned order, void (*prepare)(), const std::function<void()>& body) {
  std::vector<int> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (order % 3 == 1) std::reverse(blocks.begin(), blocks.end());
  if (order % 3 == 2) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(order));
  for (const int block : blocks) {
    prepare();
    if (const char* failed = emulator::run_block(block, THREADS, order + unsigned(block), body)) return failed;
  }
  return nullptr;
}

template <typename Element, int DIM>
static const char* run(const DecodeCall& call, unsigned order) {
  static SharedMemory<DIM> shared;
  const Schedule& s = call.schedule;
  const auto decode = [&] { decode_item<Element>(call, shared); };
  const auto clear = [] { std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared)); };
  if (const char* failed = run_grid(s.items(), order, clear, decode)) return failed;
  const auto merge = [&] { merge_item<Element, DIM>(call); };
  return s.merges() ? run_grid(ceil_div(s.merged_queries(), WARPS), order, [] {}, merge) : nullptr;
}

template <typename Element>
static const char* run(const DecodeCall& call, int head_dim, unsigned order) {
  switch (head_dim) {
#define HEAD_DIM(dim) case dim: return run<Element, dim>(call, order);
    HEAD_DIMS
#undef HEAD_DIM
  }
  return "no such head_dim";
}

}  // namespace prefix_kernels::cuda

// What went wrong, or null. order: in which thread blocks and warps run.
extern "C" __attribute__((visibility("default"))) const char* emulated_decode(
    const prefix_kernels::cuda::DecodeCall* call, bool bfloat16, int head_dim, unsigned order) {
  using namespace prefix_kernels::cuda;
  return bfloat16 ? run<struct bfloat16>(*call, head_dim, order) : run<float16>(*call, head_dim, order);
}
