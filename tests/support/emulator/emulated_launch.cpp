// csrc/cuda/runtime.cu and the launches for the host, behind the same functions.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "emulated_device.h"

#include "cuda/decode_kernel.h"
#include "cuda/runtime.h"

namespace prefix_kernels::cuda {

static struct {
  unsigned order = 0;        // of thread blocks and warps
  int multiprocessors = 132;
  bool counters = true;      // whether take_counters has any
  std::vector<unsigned> counted = std::vector<unsigned>(1 << 16);
  int64_t launches = 0, blocks = 0;
} settings;

int multiprocessors() { return settings.multiprocessors; }

unsigned* take_counters(int64_t count, void*) {
  return settings.counters && count <= int64_t(settings.counted.size()) ? settings.counted.data() : nullptr;
}

template <typename Element, int DIM>
static int run(const DecodeCall& call) {
  static SharedMemory<DIM> shared;
  std::vector<int> blocks(call.schedule.items());
  std::iota(blocks.begin(), blocks.end(), 0);
  std::mt19937 random(settings.order);
  if (settings.order % 3 == 1) std::reverse(blocks.begin(), blocks.end());
  if (settings.order % 3 == 2) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const int block : blocks) {
    std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
    emulator::run_block(block, THREADS, settings.order + unsigned(block), [&] { decode_item<Element>(call, shared); });
  }
  ++settings.launches, settings.blocks += int64_t(blocks.size());
  return 0;
}

template <typename Element>
static int run(const DecodeCall& call, int head_dim) {
  switch (head_dim) {
    case 64: return run<Element, 64>(call);
    case 80: return run<Element, 80>(call);
    case 96: return run<Element, 96>(call);
    case 128: return run<Element, 128>(call);
    case 256: return run<Element, 256>(call);
  }
  return 1;
}

int launch_decode(const DecodeCall& call, bool is_bfloat16, int head_dim, void*) {
  return is_bfloat16 ? run<bfloat16>(call, head_dim) : run<float16>(call, head_dim);
}

int describe_decode(bool, int, KernelInfo*) { return 1; }
const char* error_name(int) { return "not on the emulated GPU"; }

}  // namespace prefix_kernels::cuda

using prefix_kernels::cuda::settings;

extern "C" __attribute__((visibility("default"))) void emulator_set(unsigned order, int multiprocessors, int counters) {
  settings.order = order, settings.multiprocessors = multiprocessors, settings.counters = counters != 0;
}
extern "C" __attribute__((visibility("default"))) int64_t emulator_launches() { return settings.launches; }
extern "C" __attribute__((visibility("default"))) int64_t emulator_blocks() { return settings.blocks; }
extern "C" __attribute__((visibility("default"))) int emulator_counters_are_zero() {
  return std::all_of(settings.counted.begin(), settings.counted.end(), [](unsigned count) { return count == 0; });
}
