// Vectors of float32 for the instruction set this file is compiled for (macro ISA), by GCC/Clang vector extensions.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
typedef float FewVec __attribute__((vector_size(2 * LANES)));
typedef double DoubleVec __attribute__((vector_size(4 * LANES)));
using bfloat16 = uint16_t;  // its bits
struct float16 {
  uint16_t bits;
};

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

// Each number in 32 bit. Compilers take several instructions for __builtin_convertvector.
inline BitVec widen(HalfVec half) {
#if defined(__AVX512F__)
  return bits<BitVec>(_mm512_cvtepu16_epi32(bits<__m256i>(half)));
#elif defined(__AVX2__)
  return bits<BitVec>(_mm256_cvtepu16_epi32(bits<__m128i>(half)));
#else
  return __builtin_convertvector(half, BitVec);
#endif
}

inline HalfVec low_halves(BitVec v) {
#if defined(__AVX512F__)
  return bits<HalfVec>(_mm512_cvtepi32_epi16(bits<__m512i>(v)));
#else
  return __builtin_convertvector(v, HalfVec);
#endif
}

inline Vec load(const bfloat16* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  return bits<Vec>(widen(half) << 16);
}

// Where there is no instruction: the same sign, and a magnitude whose exponent has another bias.
inline Vec load(const float16* from) {
#if defined(__AVX512F__)
  return bits<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return bits<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  const BitVec u = widen(half), magnitude = (u & 0x7fff) << 13;
  const BitVec special = magnitude >= 0x0f800000 ? BitVec{} + 0x7f800000 : BitVec{};  // infinities and NaN
  return bits<Vec>(bits<BitVec>(bits<Vec>(magnitude) * 0x1p112f) | special | (u & 0x8000) << 16);
#endif
}

// The first `count` numbers, none where that is negative, then zeros. What lies behind them is not read.
template <typename T>
inline Vec load(const T* from, int64_t count) {
  T some[LANES] = {};
  if (count > 0) std::memcpy(some, from, (count < LANES ? count : LANES) * sizeof(T));
  return load(some);
}

#if defined(__AVX512F__)
inline uint16_t first_lanes(int64_t count) { return count >= LANES ? 0xffff : count > 0 ? (1 << count) - 1 : 0; }

inline Vec load(const float* from, int64_t count) { return bits<Vec>(_mm512_maskz_loadu_ps(first_lanes(count), from)); }

inline Vec load(const bfloat16* from, int64_t count) {
  const HalfVec half = bits<HalfVec>(_mm256_maskz_loadu_epi16(first_lanes(count), from));
  return bits<Vec>(widen(half) << 16);
}

inline Vec load(const float16* from, int64_t count) {
  return bits<Vec>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from)));
}
#elif defined(__AVX2__)
inline Vec load(const float* from, int64_t count) {
  const IntVec lanes = {0, 1, 2, 3, 4, 5, 6, 7}, first = lanes < splat(int32_t(count));
  return bits<Vec>(_mm256_maskload_ps(from, bits<__m256i>(first)));
}
#endif

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
  const HalfVec half = low_halves(u);
  std::memcpy(to, &half, sizeof half);
}

// Rounds to nearest even, past the largest number to infinity; NaN stays NaN.
inline void store(float16* to, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const BitVec u = bits<BitVec>(v), magnitude = u & 0x7fffffff;
  BitVec normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  normal = normal > 0x7c00 ? BitVec{} + 0x7c00 : normal;
  const BitVec subnormal = bits<BitVec>(bits<Vec>(magnitude) + 0.5f) - 0x3f000000;  // the sum's last bit is 2^-24
  BitVec rounded = magnitude < 0x38800000 ? subnormal : normal;
  rounded = magnitude > 0x7f800000 ? BitVec{} + 0x7e00 : rounded;
  const HalfVec half = low_halves(rounded | ((u >> 16) & 0x8000));
  std::memcpy(to, &half, sizeof half);
#endif
}

template <typename T>
inline void store(T* to, Vec v, int64_t count) {
  T some[LANES];
  store(some, v);
  std::memcpy(to, some, count * sizeof(T));
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Whether a comparison holds in every lane.
inline bool all(IntVec comparison) {
  int32_t both = -1;
  for (int i = 0; i < LANES; ++i) both &= comparison[i];
  return both;
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

constexpr std::make_integer_sequence<int, LANES> EACH_LANE;

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
  transpose_step<1>(m, EACH_LANE);
  transpose_step<2>(m, EACH_LANE);
  if constexpr (LANES > 4) transpose_step<4>(m, EACH_LANE);
  if constexpr (LANES > 8) transpose_step<8>(m, EACH_LANE);
}

// Of m[i] and m[i + STEP]: sums of lanes that are STEP apart, those of m[i] in the lanes without the bit STEP.
template <int STEP, int... LANE>
inline void fold_step(Vec (&m)[LANES], std::integer_sequence<int, LANE...>) {
  for (int i = 0; i < LANES; i += 2 * STEP) {
    const Vec a = m[i], b = m[i + STEP];
    m[i] = __builtin_shufflevector(a, b, (LANE & STEP ? LANE + LANES : LANE)...) +
           __builtin_shufflevector(a, b, (LANE & STEP ? LANE - STEP + LANES : LANE + STEP)...);
  }
}

// The sum of the lanes of m[i] in lane i.
inline Vec fold(Vec (&m)[LANES]) {
  fold_step<1>(m, EACH_LANE);
  fold_step<2>(m, EACH_LANE);
  if constexpr (LANES > 4) fold_step<4>(m, EACH_LANE);
  if constexpr (LANES > 8) fold_step<8>(m, EACH_LANE);
  return m[0];
}

// All lanes combined, those STEP apart, then those STEP / 2 apart, …
template <int STEP, typename Vector, typename Combine, int... LANE>
inline auto across(Vector v, const Combine& combine, std::integer_sequence<int, LANE...> lanes) {
  if constexpr (STEP == 0) return v[0];
  else return across<STEP / 2>(combine(v, __builtin_shufflevector(v, v, (LANE ^ STEP)...)), combine, lanes);
}

inline float largest(Vec v) { return across<LANES / 2>(v, max, EACH_LANE); }

// Of all lanes; in double, because what it is used for is often a small difference of large sums.
inline double sum(Vec v) {
  FewVec low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  const DoubleVec both = __builtin_convertvector(low, DoubleVec) + __builtin_convertvector(high, DoubleVec);
  return across<LANES / 4>(both, [](DoubleVec a, DoubleVec b) { return a + b; }, std::make_integer_sequence<int, LANES / 2>());
}

}  // namespace prefix_kernels::ISA
