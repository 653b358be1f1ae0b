// The sizes of a thread block's work, by head_dim alone. Plain C++.
#pragma once

#include <cstdint>

namespace prefix_kernels::cuda {

constexpr int LANES = 32, WARPS = 4, THREADS = WARPS * LANES;
constexpr int WARP_QUERIES = 16;                   // rows of one tensor-core product
constexpr int MAX_SLOTS = WARPS * WARP_QUERIES;    // queries of one thread block
constexpr int CHUNK = 16;                          // keys that a warp meets at a time
constexpr int VECTOR = 8;                          // 16-bit elements in 16 bytes

// Of a block; 64 keys of 256 would not fit the shared memory of a GPU for desktops (99 KiB).
constexpr int keys_of_block(int64_t dim) { return dim <= 128 ? 64 : 32; }

// Sizes for one head_dim.
template <int DIM>
struct TileSizes {
  static_assert(DIM % 16 == 0 && DIM <= 256, "a product takes 16 dimensions at a time");
  static constexpr int KEYS = keys_of_block(DIM);
  static constexpr int PITCH = DIM + VECTOR;           // an odd number of vectors: ldmatrix meets no bank twice
  static constexpr int SUM_PITCH = DIM + 8;            // floats; rows 8 banks apart
  static constexpr int VECTORS = DIM / VECTOR;         // of a token
  static constexpr int COPIERS = VECTORS <= 8 ? 8 : VECTORS <= 16 ? 16 : 32;  // threads that copy a token, a vector each
  static constexpr int STAGES = 2;                     // blocks in shared memory: one is met, the others are under way
};

// Of the kernel for rows with few queries (few_kernel.h).
constexpr int FEW_QUERIES = 8;  // of a row and a kv head: the columns of one product
constexpr int FEW_WARPS = 11;   // of a thread block at most
constexpr int FEW_BLOCKS = 3;   // of THREADS threads on a multiprocessor that registers are kept for
constexpr int FEW_CLUSTER = 8;  // thread blocks that merge what they have in shared memory, on every GPU that has clusters
constexpr int LARGE_CLUSTER = 16;  // where a GPU has that many multiprocessors side by side
constexpr int keys_of_few_chunk(int64_t dim) { return int(CHUNK * 128 / dim); }  // 4 KiB of keys
constexpr bool serves_few(int64_t dim) { return dim == 64 || dim == 128; }

// Thread blocks of a multiprocessor that registers are kept for. Measured: with three at 128 it reads a row's own keys 8 % slower.
constexpr int blocks_on_multiprocessor(int64_t dim) { return dim <= 96 ? 3 : 2; }

// Every warp of the key groups meets a chunk at least, so warps stand side by side along the queries.
constexpr int least_query_warps(int keys) { return WARPS * CHUNK / keys; }

}  // namespace prefix_kernels::cuda
