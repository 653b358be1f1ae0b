// The online softmax of one warp: 16 queries meet the keys of a chunk on the tensor cores.
//
//     scores = scale · q · keysᵀ → softcap, in units of log 2        largest = max scores
//     total  = Σ 2^(scores − largest)                                sums    = Σ 2^(scores − largest) · values
//
// A thread holds numbers of two queries, rows lane / 4 and lane / 4 + 8 of the warp's 16.
#pragma once

#include "visibility.h"

namespace prefix_kernels::cuda {

constexpr float INFINITE = __builtin_huge_valf();
constexpr float LN_2 = 0.6931471805599453f;
constexpr int EVERY_KEY = (1 << CHUNK) - 1;

// To 1e-7 relative: a polynomial near 0, where 1 − 2 / (e²ˣ + 1) cancels.
DEVICE float tanh_of(float x) {
  const float square = x * x;
  const float small = x * (1 + square * (-0.33333334f + square * (0.13333334f - 0.053968254f * square)));
  return x < 0.15f && x > -0.15f ? small : 1 - 2 * reciprocal_of(exp2_of(x * (2 * LOG2_E)) + 1);
}

template <int DIM>
struct WarpState {
  uint32_t queries[DIM / 16][4];
  float sums[DIM / 8][4];
  float largest[2], total[2];

  DEVICE void start() {
#pragma unroll
    for (int i = 0; i < DIM / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = -INFINITE, total[i] = 0;
  }

  // scores [16 queries, CHUNK keys], as two products of 8 keys; keys: the first row of the chunk in shared memory
  template <typename Element>
  DEVICE void multiply_keys(float (&scores)[2][4], const uint16_t* keys, int lane) const {
    // Even and odd steps apart, shorter chains of dependent products, where there are registers for them.
    constexpr bool APART = DIM <= 128;
    float odd[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] = odd[i][j] = 0;
    const uint16_t* row = keys + (lane / 16 * 8 + lane % 8) * TileSizes<DIM>::PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < DIM / 16; ++step) {
      uint32_t b[4];
      load_matrices(b, row + step * 16);
      multiply_add<Element>(APART && step % 2 ? odd[0] : scores[0], queries[step], b[0], b[1]);
      multiply_add<Element>(APART && step % 2 ? odd[1] : scores[1], queries[step], b[2], b[3]);
    }
    if constexpr (APART) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] += odd[i][j];
    }
  }

  // sums [16 queries, DIM] += weights [16, CHUNK] · values [CHUNK, DIM]
  template <typename Element>
  DEVICE void add_values(const uint32_t (&weights)[4], const uint16_t* values, int lane) {
    const uint16_t* row = values + (lane % 16) * TileSizes<DIM>::PITCH + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < DIM / 16; ++step) {
      uint32_t b[4];
      load_matrices_transposed(b, row + step * 16);
      multiply_add<Element>(sums[2 * step], weights, b[0], b[1]);
      multiply_add<Element>(sums[2 * step + 1], weights, b[2], b[3]);
    }
  }

  // Goes on with the chunk that begins at column `column`; of its keys `shown` names those that the key mask leaves.
  template <typename Element>
  DEVICE void attend(const uint16_t* keys, const uint16_t* values, int column, const Range (&seen)[2], int shown,
                     const DecodeCall& call, int lane) {
    float scores[2][4];
    multiply_keys<Element>(scores, keys, lane);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i][j] *= call.scale;
    if (call.softcap > 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] = tanh_of(scores[i][j]) * call.softcap;
    }
    bool edge = shown != EVERY_KEY;
#pragma unroll
    for (int r = 0; r < 2; ++r) edge = edge || seen[r].first > column || seen[r].stop < column + CHUNK;
    if (any(edge)) hide(scores, column, seen, shown, lane);

    float correction[2];
    bool changes = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = max_of(max_of(scores[0][2 * r], scores[0][2 * r + 1]), max_of(scores[1][2 * r], scores[1][2 * r + 1]));
      now = max_of(now, shuffle_xor(now, 1));
      now = max_of(largest[r], max_of(now, shuffle_xor(now, 2)));
      const float base = now == -INFINITE ? 0.0f : now;
      correction[r] = exp2_of(largest[r] - base);
      changes = changes || largest[r] != now;
      largest[r] = now;
      float added = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 2 * r; j < 2 * r + 2; ++j) {
          scores[i][j] = exp2_of(scores[i][j] - base);
          added += scores[i][j];
        }
      total[r] = total[r] * correction[r] + added;
    }
    if (any(changes)) {
#pragma unroll
      for (int i = 0; i < DIM / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] *= correction[j / 2];
    }
    const uint32_t weights[4] = {packed<Element>(scores[0][0], scores[0][1]), packed<Element>(scores[0][2], scores[0][3]),
                                 packed<Element>(scores[1][0], scores[1][1]), packed<Element>(scores[1][2], scores[1][3])};
    add_values<Element>(weights, values, lane);
  }

  // Each query's total over the four threads that hold its numbers.
  DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += shuffle_xor(total[r], 1);
      total[r] += shuffle_xor(total[r], 2);
    }
  }

 private:
  DEVICE static void hide(float (&scores)[2][4], int column, const Range (&seen)[2], int shown, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = i * 8 + lane % 4 * 2 + j % 2, at = column + key;
        const Range& range = seen[j / 2];
        if (at < range.first || at >= range.stop || !(shown >> key & 1)) scores[i][j] = -INFINITE;
      }
  }
};

}  // namespace prefix_kernels::cuda
