// The kernels of one dtype, and their launch. Included by the file that compiles that dtype.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "device.h"

#include "few_kernel.h"

namespace prefix_kernels::cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

template <typename Element, int DIM>
__global__ void __launch_bounds__(THREADS, blocks_on_multiprocessor(DIM))
    decode_kernel(const __grid_constant__ DecodeCall call) {
  decode_item<Element>(call, *reinterpret_cast<SharedMemory<DIM>*>(dynamic_shared));
}

// As many registers as FEW_BLOCKS blocks of THREADS leave each other, with more threads in a block too; code for sm_100 needs more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int FEW_THREADS = FEW_WARPS * LANES;
#else
constexpr int FEW_THREADS = FEW_BLOCKS * THREADS;
#endif
template <typename Element, int DIM>
__global__ void __launch_bounds__(FEW_THREADS, 1) few_kernel(const __grid_constant__ DecodeCall call, bool clustered) {
  static_assert(sizeof(FewShared<DIM>) <= 48 * 1024, "more would have to be asked for");
  decode_few<Element>(call, *reinterpret_cast<FewShared<DIM>*>(dynamic_shared), clustered);
}

template <typename Element, int DIM>
__global__ void __launch_bounds__(FEW_THREADS, 1) share_kernel(const __grid_constant__ DecodeCall call) {
  decode_share<Element>(call, *reinterpret_cast<FewShared<DIM>*>(dynamic_shared));
}

template <typename Element, int DIM>
__global__ void __launch_bounds__(THREADS, 4) merge_kernel(const __grid_constant__ DecodeCall call) {
  merge_item<Element, DIM>(call);
}

// What a device does with this code. early: it may start before the kernel before it ends. large: it has clusters of LARGE_CLUSTER.
struct Abilities {
  bool early, large;
};

// Whether there are clusters of LARGE_CLUSTER, which have to be asked for; that this fails is no error.
template <typename Element, int DIM>
bool has_large_clusters() {
  if constexpr (serves_few(DIM)) {
    const auto kernel = few_kernel<Element, DIM>;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension, cluster.val.clusterDim = {LARGE_CLUSTER, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = LARGE_CLUSTER, config.blockDim = FEW_WARPS * LANES, config.attrs = &cluster, config.numAttrs = 1;
    config.dynamicSmemBytes = sizeof(FewShared<DIM>);
    int clusters = 0;
    const bool asked = !cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) &&
                       !cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (!asked) (void)cudaGetLastError();
    return asked && clusters > 0;
  }
  return false;
}

// Once on each device: dynamic shared memory beyond 48 KiB has to be asked for, and as much of it as there is, so that several
// thread blocks are on a multiprocessor.
template <typename Element, int DIM>
int prepare(Abilities& found) {
  static std::atomic<uint64_t> prepared{0}, waiting{0}, clustering{0};
  int device;
  if (const int error = cudaGetDevice(&device)) return error;
  const uint64_t bit = uint64_t(1) << device % 64;
  if (device < 64 && prepared & bit) {
    found = {bool(waiting & bit), bool(clustering & bit)};
    return cudaSuccess;
  }
  const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const int error = cudaFuncSetAttribute(decode_kernel<Element, DIM>, limit, int(sizeof(SharedMemory<DIM>)))) return error;
  const auto carveout = cudaFuncAttributePreferredSharedMemoryCarveout;
  if (const int error = cudaFuncSetAttribute(decode_kernel<Element, DIM>, carveout, cudaSharedmemCarveoutMaxShared)) return error;
  cudaFuncAttributes code;
  if (const int error = cudaFuncGetAttributes(&code, merge_kernel<Element, DIM>)) return error;
  found = {code.ptxVersion >= 90, false};  // as in wait_for_kernel_before
  if (found.early) {
    waiting |= bit;
    found.large = has_large_clusters<Element, DIM>();
    if (found.large) clustering |= bit;
  }
  prepared |= bit;
  return cudaSuccess;
}

template <typename Element, int DIM>
int launch(const DecodeCall& call, void* stream) {
  Abilities able;
  if (const int error = prepare<Element, DIM>(able)) return error;
  const Schedule& s = call.schedule;
  bool first = true;
  const auto start = [&](auto* kernel, int64_t blocks, int threads, size_t shared, int cluster, auto... arguments) {
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};
    config.gridDim = unsigned(blocks), config.blockDim = unsigned(threads);
    config.dynamicSmemBytes = shared, config.stream = static_cast<cudaStream_t>(stream), config.attrs = attributes;
    if (able.early && !first) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {unsigned(cluster), 1, 1};
    }
    first = false;
    return int(cudaLaunchKernelEx(&config, kernel, call, arguments...));
  };
  const bool clustered = able.early && merges_in_clusters(call) && (s.splits <= FEW_CLUSTER || able.large);
  int error = cudaErrorInvalidValue;
  if (!has_few_queries(call))
    error = start(decode_kernel<Element, DIM>, s.items(), THREADS, sizeof(SharedMemory<DIM>), 1);
  else if constexpr (serves_few(DIM)) {
    const size_t bytes = FewShared<DIM>::bytes(s.few_warps);
    if (has_shares(call)) return start(share_kernel<Element, DIM>, s.row_blocks(), s.few_warps * LANES, bytes, 1);
    error = start(few_kernel<Element, DIM>, s.row_blocks(), s.few_warps * LANES, bytes, clustered ? s.splits : 1, clustered);
  }
  if (error) return error;
  return s.merges() && !clustered ? start(merge_kernel<Element, DIM>, ceil_div(s.merged_queries(), WARPS), THREADS, 0, 1) : 0;
}

template <typename Element, int DIM>
int describe(KernelInfo* info) {
  cudaFuncAttributes found;
  if (const int error = cudaFuncGetAttributes(&found, decode_kernel<Element, DIM>)) return error;
  *info = {found.numRegs, int(found.localSizeBytes), int(sizeof(SharedMemory<DIM>)), found.binaryVersion, found.ptxVersion};
  return cudaSuccess;
}

template <typename Element>
int launch(const DecodeCall& call, int head_dim, void* stream) {
  switch (head_dim) {
    case 64: return launch<Element, 64>(call, stream);
    case 80: return launch<Element, 80>(call, stream);
    case 96: return launch<Element, 96>(call, stream);
    case 128: return launch<Element, 128>(call, stream);
    case 256: return launch<Element, 256>(call, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename Element>
int describe(int head_dim, KernelInfo* info) {
  switch (head_dim) {
    case 64: return describe<Element, 64>(info);
    case 80: return describe<Element, 80>(info);
    case 96: return describe<Element, 96>(info);
    case 128: return describe<Element, 128>(info);
    case 256: return describe<Element, 256>(info);
  }
  return cudaErrorInvalidValue;
}

}  // namespace prefix_kernels::cuda
