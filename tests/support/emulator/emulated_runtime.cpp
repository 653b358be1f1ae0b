// csrc/cuda/runtime.cu for the host: what the operators call. The kernels come from another library.
#include "cuda/runtime.h"

#include "cuda/decode.h"

namespace prefix_kernels::cuda {

static struct {
  const char* (*decode)(const DecodeCall*, bool, int, bool, unsigned) = nullptr;
  unsigned order = 0;
  int multiprocessors = 132;
  bool clusters = true;
  const char* failed = nullptr;
} settings;

int multiprocessors() { return settings.multiprocessors; }
int largest_cluster() { return settings.clusters ? LARGE_CLUSTER : FEW_CLUSTER; }

int launch_decode(const DecodeCall& call, bool bfloat16, int head_dim, void*) {
  settings.failed = settings.decode(&call, bfloat16, head_dim, settings.clusters, settings.order);
  return settings.failed != nullptr;
}

int describe_decode(bool, int, KernelInfo*) { return 1; }
const char* error_name(int) { return settings.failed ? settings.failed : "not on the emulated GPU"; }

}  // namespace prefix_kernels::cuda

using prefix_kernels::cuda::settings;
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulator_use(decltype(settings.decode) decode) { settings.decode = decode; }
EXPORTED void emulator_set(unsigned order, int multiprocessors, bool clusters) {
  settings.order = order, settings.multiprocessors = multiprocessors, settings.clusters = clusters;
}
