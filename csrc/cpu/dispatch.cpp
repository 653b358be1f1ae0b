// Chooses the kernels for the processor at run time.
#include <cstring>

#if defined(PREFIX_KERNELS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(PREFIX_KERNELS_AMX)
DECLARE_KERNELS(amx, 16)

// Whether the processor multiplies bfloat16 by matrices, and Linux lets this process keep their registers.
static bool has_amx() {
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AVX512_BF16 = 1u << 5;
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif

// The table of that name, null where the processor lacks the instructions. A null name asks for the best.
static const Kernels* find_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
#if defined(PREFIX_KERNELS_AMX)
  if (has_avx512 && (!name || !std::strcmp(name, "amx")) && has_amx()) return &amx::table;
#endif
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
