// The kernels of one dtype, and their launch. Included by the file that compiles that dtype.
#pragma once

#include <cuda_runtime.h>

#include "device.h"

#include "decode_kernel.h"

namespace prefix_kernels::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

template <typename Element, int DIM>
__global__ void __launch_bounds__(THREADS, TileSizes<DIM>::BLOCKS_ON_MULTIPROCESSOR)
    decode_kernel(const __grid_constant__ DecodeCall call) {
  decode_item<Element>(call, *reinterpret_cast<SharedMemory<DIM>*>(dynamic_shared));
}

// Gives the kernel of a head_dim and its shared memory to `use`, as f(kernel, bytes).
template <typename Element, typename Use>
int with_kernel(int head_dim, const Use& use) {
  switch (head_dim) {
    case 64: return use(decode_kernel<Element, 64>, sizeof(SharedMemory<64>));
    case 80: return use(decode_kernel<Element, 80>, sizeof(SharedMemory<80>));
    case 96: return use(decode_kernel<Element, 96>, sizeof(SharedMemory<96>));
    case 128: return use(decode_kernel<Element, 128>, sizeof(SharedMemory<128>));
    case 256: return use(decode_kernel<Element, 256>, sizeof(SharedMemory<256>));
  }
  return cudaErrorInvalidValue;
}

template <typename Element>
int launch(const DecodeCall& call, int head_dim, void* stream) {
  return with_kernel<Element>(head_dim, [&](auto kernel, size_t bytes) -> int {
    if (const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes))) return error;
    kernel<<<unsigned(call.schedule.items()), THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(call);
    return cudaGetLastError();
  });
}

template <typename Element>
int describe(int head_dim, KernelInfo* info) {
  return with_kernel<Element>(head_dim, [&](auto kernel, size_t bytes) -> int {
    cudaFuncAttributes found;
    if (const int error = cudaFuncGetAttributes(&found, kernel)) return error;
    *info = {found.numRegs, int(found.localSizeBytes), int(bytes), found.binaryVersion, found.ptxVersion};
    return cudaSuccess;
  });
}

}  // namespace prefix_kernels::cuda
