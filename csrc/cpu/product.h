// The one matrix product that everything is made of. The right factor and the result lie in vectors, the left factor is
// read where it is and broadcast, so that nothing is ever packed. The right factor may be of 16 bit, widened as it is read.
#pragma once

#include "simd.h"

namespace prefix_kernels::ISA {

// How the left factor lies in memory: element (m, step) at a[m · stride + step] or at a[step · stride + m].
enum class Left { rows, columns };

constexpr int64_t CHAIN = 8;  // products added up one by one before they join the sum: shorter chains round less

// A right factor with so many lanes in each step, fewer than a vector has; the others are 0.
template <typename T>
struct FewLanes {
  const T* at;
  int64_t count;
  FewLanes operator+(int64_t offset) const { return {at + offset, count}; }
};

template <typename T>
inline Vec load(const FewLanes<T>& from) {
  return load(from.at, from.count);
}

// c[m][lanes] (+)= Σ_step a(m, step) · b[step][lanes] for M rows m and VECTORS vectors of lanes.
template <int M, int VECTORS, Left LEFT, typename Right>
inline __attribute__((always_inline)) void product_block(const float* a, int64_t a_stride, Right b, int64_t b_stride,
                                                         float* c, int64_t c_stride, int64_t steps, bool add) {
  Vec sums[M][VECTORS];
  for (int m = 0; m < M; ++m)
    for (int u = 0; u < VECTORS; ++u) sums[m][u] = add ? load(c + m * c_stride + u * LANES) : Vec{};
  for (int64_t begin = 0; begin < steps; begin += CHAIN) {
    const int64_t end = begin + CHAIN < steps ? begin + CHAIN : steps;
    Vec part[M][VECTORS] = {};
#pragma GCC unroll 4
    for (int64_t step = begin; step < end; ++step) {
      Vec right[VECTORS];
      for (int u = 0; u < VECTORS; ++u) right[u] = load(b + step * b_stride + u * LANES);
      for (int m = 0; m < M; ++m) {
        const float left = LEFT == Left::rows ? a[m * a_stride + step] : a[step * a_stride + m];
        for (int u = 0; u < VECTORS; ++u) part[m][u] += left * right[u];
      }
    }
    for (int m = 0; m < M; ++m)
      for (int u = 0; u < VECTORS; ++u) sums[m][u] += part[m][u];
  }
  for (int m = 0; m < M; ++m)
    for (int u = 0; u < VECTORS; ++u) store(c + m * c_stride + u * LANES, sums[m][u]);
}

// The same for any number of rows: blocks of M, then of M / 2, …, 1.
template <int VECTORS, Left LEFT, int M = BLOCK, typename Right>
inline void product(int64_t rows, const float* a, int64_t a_stride, Right b, int64_t b_stride, float* c,
                    int64_t c_stride, int64_t steps, bool add) {
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    const float* left = LEFT == Left::rows ? a + m * a_stride : a + m;
    product_block<M, VECTORS, LEFT>(left, a_stride, b, b_stride, c + m * c_stride, c_stride, steps, add);
  }
  if constexpr (M > 1) {
    if (m == rows) return;
    const float* left = LEFT == Left::rows ? a + m * a_stride : a + m;
    product<VECTORS, LEFT, M / 2>(rows - m, left, a_stride, b, b_stride, c + m * c_stride, c_stride, steps, add);
  }
}

// The same where the right factor has `columns` of lanes, and the result as many vectors as these take.
template <Left LEFT, typename Right>
inline void product_columns(int64_t rows, int64_t columns, const float* a, int64_t a_stride, const Right* b,
                            int64_t b_stride, float* c, int64_t c_stride, int64_t steps, bool add) {
  int64_t column = 0;
  for (; column + 2 * LANES <= columns; column += 2 * LANES)
    product<2, LEFT>(rows, a, a_stride, b + column, b_stride, c + column, c_stride, steps, add);
  if (column + LANES <= columns) {
    product<1, LEFT>(rows, a, a_stride, b + column, b_stride, c + column, c_stride, steps, add);
    column += LANES;
  }
  if (column < columns) {
    const FewLanes<Right> rest{b + column, columns - column};
    product<1, LEFT>(rows, a, a_stride, rest, b_stride, c + column, c_stride, steps, add);
  }
}

}  // namespace prefix_kernels::ISA
