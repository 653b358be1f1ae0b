// The kernels for the host, without torch: a library of its own, so that a mutation of them is compiled quickly.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "emulated_device.h"

#include "cuda/few_kernel.h"

namespace prefix_kernels::cuda {

// All thread blocks of a kernel, one after the other.
static const char* run_grid(int64_t count, int threads, unsigned order, void (*prepare)(), const std::function<void()>& body) {
  std::vector<int> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (order % 3 == 1) std::reverse(blocks.begin(), blocks.end());
  if (order % 3 == 2) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(order));
  for (const int block : blocks) {
    prepare();
    if (const char* failed = emulator::run_block(block, threads, order + unsigned(block), body)) return failed;
  }
  return nullptr;
}

template <typename Element, int DIM>
static const char* run(const DecodeCall& call, unsigned order) {
  static SharedMemory<DIM> shared;
  const Schedule& s = call.schedule;
  const auto decode = [&] { decode_item<Element>(call, shared); };
  const auto clear = [] { std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared)); };
  const bool few = has_few_queries(call);
  if (const char* failed = run_grid(few ? s.shared_items() : s.items(), THREADS, order, clear, decode)) return failed;
  if constexpr (serves_few(DIM)) {
    static FewShared<DIM> few_shared;
    const auto clear_few = [] { std::memset(static_cast<void*>(&few_shared), 0xff, sizeof(few_shared)); };
    const auto few_queries = [&] { decode_few<Element>(call, few_shared); };
    if (few)
      if (const char* failed = run_grid(s.items() - s.shared_items(), s.few_warps * LANES, order, clear_few, few_queries))
        return failed;
  }
  const auto merge = [&] { merge_item<Element, DIM>(call); };
  return s.merges() ? run_grid(ceil_div(s.merged_queries(), WARPS), THREADS, order, [] {}, merge) : nullptr;
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
