#include "runtime.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "decode.h"

namespace prefix_kernels::cuda {

constexpr int64_t COUNTERS = int64_t(1) << 20;  // 4 MiB on each device
__device__ unsigned counters[COUNTERS];         // zeros from the start

int multiprocessors() {
  int device, count;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return 0;
  return count;
}

// One range for all calls of a stream, which run one after the other. A captured call has a range of its own for ever: its graph
// may be replayed on any stream, beside any call.
unsigned* take_counters(int64_t count, void* stream) {
  struct Ranges {
    void* base = nullptr;
    int64_t taken = 0;
    std::map<void*, std::pair<int64_t, int64_t>> of_stream;  // first, count
  };
  static std::mutex mutex;
  static std::map<int, Ranges> of_device;
  int device;
  cudaStreamCaptureStatus status;
  if (cudaGetDevice(&device) || cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status)) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  Ranges& ranges = of_device[device];
  if (!ranges.base && cudaGetSymbolAddress(&ranges.base, counters)) return nullptr;
  unsigned* base = static_cast<unsigned*>(ranges.base);
  const bool captured = status != cudaStreamCaptureStatusNone;
  if (!captured) {
    const auto found = ranges.of_stream.find(stream);
    if (found != ranges.of_stream.end() && found->second.second >= count) return base + found->second.first;
    int64_t rounded = 1024;  // a batch that grows takes a new range now and then alone
    while (rounded < count) rounded *= 2;
    count = rounded;
  }
  if (ranges.taken + count > COUNTERS) return nullptr;
  const int64_t first = ranges.taken;
  ranges.taken += count;
  if (!captured) ranges.of_stream[stream] = {first, count};
  return base + first;
}

// Each in the file that compiles its dtype.
int launch_bfloat16(const DecodeCall&, int head_dim, void* stream);
int launch_float16(const DecodeCall&, int head_dim, void* stream);
int describe_bfloat16(int head_dim, KernelInfo*);
int describe_float16(int head_dim, KernelInfo*);

int launch_decode(const DecodeCall& call, bool bfloat16, int head_dim, void* stream) {
  return bfloat16 ? launch_bfloat16(call, head_dim, stream) : launch_float16(call, head_dim, stream);
}

int describe_decode(bool bfloat16, int head_dim, KernelInfo* info) {
  return bfloat16 ? describe_bfloat16(head_dim, info) : describe_float16(head_dim, info);
}

const char* error_name(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace prefix_kernels::cuda
