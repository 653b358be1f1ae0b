// Chooses the kernels for the processor at run time.
#include <cstring>

#include "kernels.h"

namespace prefix_kernels {

#define DECLARE_KERNELS(ISA_NAME, LANES)                                                                        \
  namespace ISA_NAME {                                                                                          \
  void forward(const Problem&, const int64_t*, int64_t, int64_t);                                               \
  void backward(const Problem&, const Gradients&, const Part*, int64_t, int64_t, int64_t);                      \
  void decode_prefix(const Problem&, const DecodePlan&, int64_t, int64_t);                                      \
  void decode_own(const Problem&, const DecodePlan&, int64_t, int64_t);                                         \
  static const Kernels table = {#ISA_NAME, 2 * LANES, LANES, forward, backward, decode_prefix, decode_own};     \
  }

DECLARE_KERNELS(baseline, 4)
#if defined(__x86_64__)
DECLARE_KERNELS(avx2, 8)
DECLARE_KERNELS(avx512, 16)
#endif

// The table of that name, null where the processor lacks the instructions. A null name asks for the best.
static const Kernels* find_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (!name || !std::strcmp(name, "avx512"))) return &avx512::table;
  if (has_avx2 && (!name || !std::strcmp(name, "avx2"))) return &avx2::table;
#endif
  return !name || !std::strcmp(name, "baseline") ? &baseline::table : nullptr;
}

static const Kernels*& in_use() {
  static const Kernels* table = find_kernels(nullptr);
  return table;
}

const Kernels& kernels() { return *in_use(); }

const Kernels* use_kernels(const char* name) {
  const Kernels* table = find_kernels(name);
  if (table) in_use() = table;
  return table;
}

}  // namespace prefix_kernels
