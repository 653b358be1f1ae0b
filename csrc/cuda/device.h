// The instructions that the kernels use, each behind a function. The tests have a header of the same functions for the host.
// Layouts of fragments: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include <cstdint>

#define DEVICE __device__ __forceinline__

namespace prefix_kernels::cuda {

struct bfloat16 {};
struct float16 {};

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int threads_of_block() { return blockDim.x; }
DEVICE void sync_threads() { __syncthreads(); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE int shuffle_up(int value, int distance) { return __shfl_up_sync(~0u, value, distance); }
template <typename T>
DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
DEVICE bool any(bool value) { return __any_sync(~0u, value); }
DEVICE unsigned ballot(bool value) { return __ballot_sync(~0u, value); }
DEVICE int count_bits(unsigned bits) { return __popc(bits); }

DEVICE uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// 16 bytes from global to shared memory, zeros where nothing exists; complete after wait_for_copies.
DEVICE void copy_async(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(shared_address(shared)), "l"(global), "r"(exists ? 16 : 0) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last `pending` groups of this thread have arrived.
template <int pending>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 × 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
}

// 16 bytes that are read once, past the L1 cache.
DEVICE void load_once(uint32_t (&to)[4], const void* from) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
// Of an 8 × 8 matrix of 16-bit elements of which lane l has row l / 4, columns l % 4 · 2 and the next: the same of its transpose.
DEVICE uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}
// The lower, or the upper, halves of two words; that of the first one in the lower half.
DEVICE uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
DEVICE uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// sums [16, 8] += a [16, 16] · b [16, 8]
template <typename Element>
DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DEVICE void multiply_add<bfloat16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void multiply_add<float16>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to 16 bit, `low` in the lower half.
template <typename Element>
DEVICE uint32_t packed(float low, float high);
template <>
DEVICE uint32_t packed<bfloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
DEVICE uint32_t packed<float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

DEVICE float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
DEVICE float reciprocal_of(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
DEVICE float log2_of(float x) { return log2f(x); }
// NaN if either is: a NaN that a query sees must show.
DEVICE float max_of(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// What another kernel, or thread block, wrote while this one was already there: past the L1 cache.
DEVICE float4 load_written(const float4* from) { return __ldcg(from); }
DEVICE float2 load_written(const float2* from) { return __ldcg(from); }
// Between two thread blocks of one kernel: what one of them wrote, all of whose threads have been at a barrier since, is there for
// the threads of the other one after their next barrier. One thread of each. The seal is gone then: the next kernel starts anew.
DEVICE void put_seal(uint64_t* at, uint64_t seal) {
  asm volatile("fence.acq_rel.gpu;\n\tst.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(seal) : "memory");
}
DEVICE void take_seal(uint64_t* at, uint64_t seal) {
  uint64_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(at) : "memory");
  } while (found != seal);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(uint64_t(0)) : "memory");
}
DEVICE void add_one_shared(int* counter) { atomicAdd(counter, 1); }

// Between two kernels of which the second may start while the first still runs (sm_90 and newer; else it starts after its end):
// once every thread block has said that it needs little more, and it waits for what the first one wrote.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Of a cluster of thread blocks (sm_90 and newer): all its threads, and what another one of its blocks has in shared memory.
DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}
DEVICE uint32_t address_in_cluster(const void* shared, int block) {
  uint32_t result = shared_address(shared);
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(result), "r"(block));
#endif
  return result;
}
DEVICE float4 load_in_cluster(const float4* shared, int block) {
  float4 result{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(result.x), "=f"(result.y), "=f"(result.z), "=f"(result.w) : "r"(address_in_cluster(shared, block)));
#endif
  return result;
}
DEVICE float2 load_in_cluster(const float2* shared, int block) {
  float2 result{};
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(result.x), "=f"(result.y) : "r"(address_in_cluster(shared, block)));
#endif
  return result;
}

}  // namespace prefix_kernels::cuda
