// Products of bfloat16 with bfloat16, float32 sums, where the processor multiplies two steps of a lane at once (AVX512_BF16).
// One row alone: a matrix unit would be nearly empty, and widening takes longer than multiplying.
#pragma once

#if defined(__AVX512BF16__)
#include "tile.h"

namespace prefix_kernels::ISA {

inline __m512i load_pairs(const bfloat16* from, int64_t count) {
  const auto wanted = count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  return _mm512_maskz_loadu_epi16(wanted, from);
}

inline Vec add_pairs(Vec to, __m512i a, __m512i b) {
  return bits<Vec>(_mm512_dpbf16_ps(bits<__m512>(to), bits<__m512bh>(a), bits<__m512bh>(b)));
}

// row · key for LANES keys, a key in each lane; 0 past `count`. `dim` numbers of each are read.
template <typename Count>
inline Vec dot_pairs(const bfloat16* keys, int64_t stride, Count count, const bfloat16* row, int64_t dim) {
  Vec parts[LANES] = {};
  for (int64_t d = 0; d < dim; d += 2 * LANES) {
    const __m512i q = load_pairs(row + d, dim - d);
    for (int64_t i = 0; i < count; ++i) parts[i] = add_pairs(parts[i], load_pairs(keys + i * stride + d, dim - d), q);
  }
  return fold(parts);
}

// sums[dim, filled up to 2 · LANES] += Σ_n weights[n] · values[n][dim]; weights are rounded to bfloat16.
inline void add_value_pairs(const bfloat16* values, int64_t stride, int64_t dim, int64_t count, const float* weights, float* sums) {
  alignas(64) uint32_t pairs[KEYS / 2];  // of the weights of keys 2 · n and 2 · n + 1, the earlier one in the low half
  for (int64_t n = 0; n < count; n += 2 * LANES) {
    const Vec low = load(weights + n, count - n), high = load(weights + n + LANES, count - n - LANES);
    _mm512_store_si512(pairs + n / 2, bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(high), bits<__m512>(low))));
  }
  for (int64_t d = 0; d < dim; d += 2 * LANES) {
    Vec low[2] = {}, high[2] = {};  // of dimensions d + 0 … 3, 8 … 11, … and d + 4 … 7, 12 … 15, …
    const auto add = [&](int64_t n, __m512i odd) {
      const __m512i even = load_pairs(values + n * stride + d, dim - d), weight = _mm512_set1_epi32(pairs[n / 2]);
      const int64_t chain = n / 2 % 2;
      low[chain] = add_pairs(low[chain], _mm512_unpacklo_epi16(even, odd), weight);
      high[chain] = add_pairs(high[chain], _mm512_unpackhi_epi16(even, odd), weight);
    };
    int64_t n = 0;
    for (; n + 1 < count; n += 2) add(n, load_pairs(values + (n + 1) * stride + d, dim - d));
    if (n < count) add(n, __m512i{});
    const Vec a = low[0] + low[1], b = high[0] + high[1];
    const Vec first = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const Vec second = __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    store(sums + d, load(sums + d) + first);
    store(sums + d + LANES, load(sums + d + LANES) + second);
  }
}

}  // namespace prefix_kernels::ISA
#endif
