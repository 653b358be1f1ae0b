// The kernels for the host, without torch: a library of its own, so that a mutation of them is compiled quickly.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "emulated_device.h"

#include "cuda/few_kernel.h"

namespace prefix_kernels::cuda {

// All thread blocks of a kernel, or its clusters of them, one after the other. body: what a thread does with its block's shared
// memory, which begins as NaN. bytes: how much of it a block has. in_turn: blocks start one after the other, as on a GPU.
template <typename Shared, typename Body>
static const char* run_grid(int64_t count, int cluster, int threads, unsigned order, const Body& body,
                            int64_t bytes = sizeof(Shared), bool in_turn = false) {
  static Shared shared[LARGE_CLUSTER];
  std::vector<int> clusters(count / cluster);
  std::iota(clusters.begin(), clusters.end(), 0);
  if (order % 3 == 1 && !in_turn) std::reverse(clusters.begin(), clusters.end());
  if (order % 3 == 2 && !in_turn) std::shuffle(clusters.begin(), clusters.end(), std::mt19937(order));
  for (const int number : clusters) {
    std::memset(static_cast<void*>(&shared), 0xff, cluster * sizeof(Shared));
    const auto thread = [&] { body(shared[block_in_cluster()]); };
    const int first = number * cluster;
    if (const char* failed = emulator::run_cluster(first, cluster, threads, sizeof(Shared), order + unsigned(first), thread))
      return failed;
    for (int block = 0; block < cluster; ++block) {
      const auto* memory = reinterpret_cast<const unsigned char*>(&shared[block]);
      if (std::any_of(memory + bytes, memory + sizeof(Shared), [](unsigned char byte) { return byte != 0xff; }))
        return "shared memory is written that the thread block does not have";
    }
  }
  return nullptr;
}

template <typename Element, int DIM>
static const char* run(const DecodeCall& call, bool clusters, unsigned order) {
  const Schedule& s = call.schedule;
  const bool few = has_few_queries(call), clustered = clusters && merges_in_clusters(call);
  if (call.parts) std::memset(call.parts, 0xff, sizeof(float) * part_values(s, DIM));  // NaN: nobody has written there
  const auto decode = [&](SharedMemory<DIM>& shared) { decode_item<Element>(call, shared); };
  const char* failed = "the kernel for few queries does not serve this head_dim";
  if (!few) {
    failed = run_grid<SharedMemory<DIM>>(s.items(), 1, THREADS, order, decode);
  } else if constexpr (serves_few(DIM)) {
    const auto rows = [&](FewShared<DIM>& shared) {
      if (has_shares(call))
        decode_share<Element>(call, shared);
      else
        decode_few<Element>(call, shared, clustered);
    };
    failed = run_grid<FewShared<DIM>>(s.row_blocks(), clustered ? s.splits : 1, s.few_warps * LANES, order, rows,
                                      FewShared<DIM>::bytes(s.few_warps), has_shares(call));
  }
  if (failed) return failed;
  if (has_shares(call)) {
    const uint64_t* seals = parts_of<DIM>(call).seals;
    return std::count(seals, seals + s.seals(), call.seal) ? "a seal is left" : nullptr;
  }
  const auto merge = [&](char&) { merge_item<Element, DIM>(call); };
  const int64_t merged = s.merges() && !clustered ? ceil_div(s.merged_queries(), WARPS) : 0;
  return run_grid<char>(merged, 1, THREADS, order, merge);
}

template <typename Element>
static const char* run(const DecodeCall& call, int head_dim, bool clusters, unsigned order) {
  switch (head_dim) {
#define HEAD_DIM(dim) case dim: return run<Element, dim>(call, clusters, order);
    HEAD_DIMS
#undef HEAD_DIM
  }
  return "no such head_dim";
}

}  // namespace prefix_kernels::cuda

// What went wrong, or null. clusters: whether the GPU has them. order: in which thread blocks and warps run.
extern "C" __attribute__((visibility("default"))) const char* emulated_decode(
    const prefix_kernels::cuda::DecodeCall* call, bool bfloat16, int head_dim, bool clusters, unsigned order) {
  using namespace prefix_kernels::cuda;
  return bfloat16 ? run<struct bfloat16>(*call, head_dim, clusters, order) : run<float16>(*call, head_dim, clusters, order);
}
