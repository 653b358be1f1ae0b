#include "runtime.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "counters.h"
#include "decode.h"

namespace prefix_kernels::cuda {

constexpr int64_t COUNTERS = int64_t(1) << 20;  // 4 MiB on each device
__device__ unsigned counters[COUNTERS];         // zeros from the start

int multiprocessors() {
  int device, count;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return 0;
  return count;
}

unsigned* take_counters(int64_t count, void* stream) {
  struct Device {
    void* first = nullptr;
    CounterRanges ranges{COUNTERS};
  };
  static std::mutex mutex;
  static std::map<int, Device> devices;
  int number;
  cudaStreamCaptureStatus status;
  if (cudaGetDevice(&number) || cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status)) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = devices[number];
  if (!device.first && cudaGetSymbolAddress(&device.first, counters)) return nullptr;
  const int64_t first = device.ranges.take(stream, status != cudaStreamCaptureStatusNone, count);
  return first < 0 ? nullptr : static_cast<unsigned*>(device.first) + first;
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
