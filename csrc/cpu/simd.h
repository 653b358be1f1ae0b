// Vectors of float32 for the instruction set this file is compiled for (macro ISA), by GCC/Clang vector extensions.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace prefix_kernels::ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16, BLOCK = 8;  // BLOCK × 2 accumulators stay in registers
#elif defined(__AVX2__)
constexpr int LANES = 8, BLOCK = 4;
#else
constexpr int LANES = 4, BLOCK = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));
using bfloat16 = uint16_t;  // its bits

constexpr float INF = __builtin_inff();
constexpr double LOG2E = 1.4426950408889634;

template <typename To, typename From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof value);
  return result;
}

inline Vec splat(float x) { return x - Vec{}; }
inline IntVec splat(int32_t x) { return x - IntVec{}; }

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vec load(const bfloat16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  return bits<Vec>(__builtin_convertvector(half, BitVec) << 16);
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return bits<float>(uint32_t(x) << 16); }

inline IntVec load(const int32_t* from) {
  IntVec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// Rounds to nearest even; NaN stays NaN.
inline void store(bfloat16* to, Vec v) {
  BitVec u = bits<BitVec>(v);
  u = v == v ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : (u >> 16) | 0x40;
  const HalfVec half = __builtin_convertvector(u, HalfVec);
  std::memcpy(to, &half, sizeof half);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Whether a comparison holds in every lane.
inline bool all(IntVec comparison) {
  int32_t both = -1;
  for (int i = 0; i < LANES; ++i) both &= comparison[i];
  return both;
}

// Of all lanes; in double, because what it is used for is often a small difference of large sums.
inline double sum(Vec v) {
  double total = 0.0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

// 2^x for x ≤ 127: exactly 0 below −126 (−inf included), NaN for NaN. Relative error below 2e-7.
inline Vec exp2(Vec x) {
  const Vec shifted = x + 12582912.0f;  // 1.5 · 2^23: the nearest integer is in the low bits
  const Vec r = x - (shifted - 12582912.0f);
  Vec p = splat(1.535336188319500e-4f);
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  const Vec power = bits<Vec>((bits<BitVec>(shifted) << 23) + 0x3f800000u);
  return x < -126.0f ? Vec{} : p * power;
}

inline Vec tanh(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec clipped = size > 10.0f ? splat(10.0f) : size;  // NaN stays
  const Vec large = 1.0f - 2.0f / (exp2(clipped * float(2 * LOG2E)) + 1.0f);
  const Vec z = x * x;
  Vec small = splat(-5.70498872745e-3f);
  small = small * z + 2.06390887954e-2f;
  small = small * z - 5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z - 3.33332819422e-1f;
  small = small * z * x + x;
  return size < 0.625f ? small : (x < 0.0f ? -large : large);
}

// Exchanges the blocks off the diagonal of every 2 · STEP × 2 · STEP square.
template <int STEP, int... LANE>
inline void transpose_step(Vec (&m)[LANES], std::integer_sequence<int, LANE...>) {
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Vec a = m[i], b = m[i + STEP];
    m[i] = __builtin_shufflevector(a, b, (LANE & STEP ? LANE - STEP + LANES : LANE)...);
    m[i + STEP] = __builtin_shufflevector(a, b, (LANE & STEP ? LANE + LANES : LANE + STEP)...);
  }
}

// m[i][j] becomes m[j][i].
inline void transpose(Vec (&m)[LANES]) {
  constexpr std::make_integer_sequence<int, LANES> lanes;
  transpose_step<1>(m, lanes);
  transpose_step<2>(m, lanes);
  if constexpr (LANES > 4) transpose_step<4>(m, lanes);
  if constexpr (LANES > 8) transpose_step<8>(m, lanes);
}

}  // namespace prefix_kernels::ISA
