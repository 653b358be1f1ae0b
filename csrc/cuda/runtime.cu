#include "runtime.h"

#include <cuda_runtime.h>

#include "decode.h"

namespace prefix_kernels::cuda {

int multiprocessors() {
  int device, count;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return 0;
  return count;
}

int largest_cluster() {
  int device, major;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return FEW_CLUSTER;
  return major == 9 || major == 10 ? LARGE_CLUSTER : FEW_CLUSTER;
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
