// csrc/cuda/device.h for the host: the threads of a block are fibers on one thread of the processor.
//
// Fragments are laid out as the PTX ISA says ("Matrix fragments for mma.m16n8k16", "ldmatrix"). What the hardware leaves open is
// made as bad as it may be: a warp runs on alone until a barrier stops it, in any order; an asynchronous copy leaves NaN where it
// goes until it is waited for; shared memory begins as NaN. Threads of a warp that meet different instructions are an error.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <vector>

#define DEVICE inline

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

namespace prefix_kernels::cuda {

struct bfloat16 {};
struct float16 {};

namespace emulator {

constexpr int WARP = 32;

struct Copy {
  void* to;
  const void* from;
  bool exists;
};

struct Fiber {
  jmp_buf place;
  ucontext_t first;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool done = true;
  std::vector<Copy> copies;                 // not yet committed
  std::deque<std::vector<Copy>> groups;     // committed, not yet waited for
};

// One instruction that the threads of a warp execute together.
struct Together {
  const void* kind = nullptr;
  void* threads[WARP];
  int arrived = 0;
  unsigned passed = 0;
};

struct Barrier {
  int waiting = 0;
  unsigned passed = 0;
};

struct Machine {
  std::deque<Fiber> fibers;  // of all blocks of a cluster
  std::vector<Together> warps;
  std::vector<Barrier> blocks;
  Barrier cluster;
  std::function<void()> body;
  jmp_buf scheduler;
  int thread = 0, block = 0, threads = 0, finished = 0;  // block: the first one; threads: of a block
  size_t shared_bytes = 0;  // from what a block has in shared memory to what the next one has
  unsigned barriers = 0;
  const char* failed = nullptr;
};

inline Machine machine;

// Gives up the block.
[[noreturn]] inline void fail(const char* what) {
  machine.failed = what;
  _longjmp(machine.scheduler, 1);
}

inline void yield() {
  if (_setjmp(machine.fibers[machine.thread].place) == 0) _longjmp(machine.scheduler, 1);
}

inline void begin_fiber() {
  yield();
  machine.body();
  Fiber& fiber = machine.fibers[machine.thread];
  for (const auto& group : fiber.groups)
    if (!group.empty()) fail("a thread ends before its copies have arrived");
  if (!fiber.copies.empty()) fail("a thread ends before it commits its copies");
  fiber.done = true;
  _longjmp(machine.scheduler, 1);
}

inline void meet(Barrier& barrier, int threads) {
  if (++barrier.waiting == threads) {
    barrier.waiting = 0, ++barrier.passed, ++machine.barriers;
  } else {
    for (const unsigned now = barrier.passed; barrier.passed == now;) yield();
  }
}

inline void resume(int thread) {
  machine.thread = thread;
  if (_setjmp(machine.scheduler) == 0) _longjmp(machine.fibers[thread].place, 1);
}

// Runs all threads of a cluster of `blocks` blocks; `order` says how the warps take turns. What went wrong, or null.
inline const char* run_cluster(int block, int blocks, int threads_of_block, size_t shared_bytes, unsigned order,
                               const std::function<void()>& body) {
  const int threads = blocks * threads_of_block;
  machine.body = body, machine.block = block, machine.threads = threads_of_block, machine.shared_bytes = shared_bytes;
  machine.blocks.assign(blocks, Barrier()), machine.cluster = Barrier();
  machine.failed = nullptr;
  machine.warps.assign(threads / WARP, Together());
  while (int(machine.fibers.size()) < threads) machine.fibers.emplace_back();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.done = false, fiber.copies.clear(), fiber.groups.clear();
    machine.thread = i;
    // Entered once, to stop before its first step: from then on jumps are enough, which cost no system call.
    ucontext_t here;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.data(), fiber.first.uc_stack.ss_size = fiber.stack.size();
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, begin_fiber, 0);
    if (_setjmp(machine.scheduler) == 0) swapcontext(&here, &fiber.first);
  }
  const int warps = threads / WARP;
  int idle = 0;  // rounds in which nothing went on
  for (bool left = true; left; ++order) {
    left = false;
    const unsigned barriers = machine.barriers;
    int done = 0;
    for (int i = 0; i < warps; ++i) {
      const int warp = (i * (order % 2 ? 1 : warps - 1) + order / 2) % warps;  // forwards or backwards, from any
      // On, alone, until its threads stand at a barrier of the block or have ended.
      for (unsigned passed = ~machine.warps[warp].passed; passed != machine.warps[warp].passed;) {
        passed = machine.warps[warp].passed;
        for (int lane = 0; lane < WARP; ++lane)
          if (!machine.fibers[warp * WARP + lane].done) {
            left = true;
            resume(warp * WARP + lane);
            if (machine.failed) return machine.failed;
          }
      }
    }
    for (int i = 0; i < threads; ++i) done += machine.fibers[i].done;
    idle = machine.barriers == barriers && done == machine.finished ? idle + 1 : 0;
    machine.finished = done;
    if (idle > 2) return "threads wait at a barrier that others do not reach";
  }
  return nullptr;
}

// Waits until all threads of the warp are here with the same `kind`; the last one runs `act` on what each has brought.
template <typename Brought, typename Act>
void together(const void* kind, Brought& brought, const Act& act) {
  Together& warp = machine.warps[machine.thread / WARP];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("the threads of a warp are at different instructions");
  warp.threads[machine.thread % WARP] = &brought;
  if (++warp.arrived == WARP) {
    act([&](int lane) -> Brought& { return *static_cast<Brought*>(warp.threads[lane]); });
    warp.arrived = 0, ++warp.passed;
  } else {
    for (const unsigned now = warp.passed; warp.passed == now;) yield();
  }
}

template <typename Value>
Value exchange(const void* kind, Value value, int source) {
  struct Brought { Value value; int source; Value result; } brought{value, source, value};
  together(kind, brought, [](auto at) {
    for (int lane = 0; lane < WARP; ++lane) {
      const int from = at(lane).source;
      at(lane).result = from >= 0 && from < WARP ? at(from).value : at(lane).value;
    }
  });
  return brought.result;
}

inline float widened(bfloat16, uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}
inline float widened(float16, uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return float(half);
}
inline uint16_t rounded(bfloat16, float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline uint16_t rounded(float16, float value) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
template <typename Element>
float half_of(uint32_t word, int which) {
  return widened(Element{}, uint16_t(word >> 16 * which));
}

inline void load(uint32_t (&to)[4], const void* row, bool transposed) {
  struct Brought { uint32_t* to; const uint16_t* row; bool transposed; } brought{to, static_cast<const uint16_t*>(row), transposed};
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: a row is not aligned");
  static const char kind = 0;
  together(&kind, brought, [](auto at) {
    uint16_t loaded[4][8][8];
    for (int lane = 0; lane < WARP; ++lane) std::memcpy(loaded[lane / 8][lane % 8], at(lane).row, 16);
    for (int lane = 0; lane < WARP; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int major = lane / 4, minor = lane % 4 * 2;
        const auto& m = loaded[matrix];
        at(lane).to[matrix] = at(lane).transposed ? m[minor][major] | uint32_t(m[minor + 1][major]) << 16
                                                  : m[major][minor] | uint32_t(m[major][minor + 1]) << 16;
      }
  });
}

}  // namespace emulator

inline int block_in_cluster() { return emulator::machine.thread / emulator::machine.threads; }
inline int thread_index() { return emulator::machine.thread % emulator::machine.threads; }
inline int block_index() { return emulator::machine.block + block_in_cluster(); }
inline int threads_of_block() { return emulator::machine.threads; }

inline void sync_threads() { emulator::meet(emulator::machine.blocks[block_in_cluster()], emulator::machine.threads); }
inline float shuffle_xor(float value, int mask) {
  static const char kind = 0;
  return emulator::exchange(&kind, value, thread_index() % emulator::WARP ^ mask);
}
inline int shuffle_xor(int value, int mask) {
  static const char kind = 0;
  return emulator::exchange(&kind, value, thread_index() % emulator::WARP ^ mask);
}
inline int shuffle_up(int value, int distance) {
  static const char kind = 0;
  return emulator::exchange(&kind, value, thread_index() % emulator::WARP - distance);
}
template <typename T>
T shuffle(T value, int lane) {
  static const char kind = 0;
  return emulator::exchange(&kind, value, lane);
}
inline unsigned ballot(bool value) {
  struct Brought { bool value; unsigned result; } brought{value, 0};
  static const char kind = 0;
  emulator::together(&kind, brought, [](auto at) {
    unsigned bits = 0;
    for (int lane = 0; lane < emulator::WARP; ++lane) bits |= unsigned(at(lane).value) << lane;
    for (int lane = 0; lane < emulator::WARP; ++lane) at(lane).result = bits;
  });
  return brought.result;
}
inline bool any(bool value) { return ballot(value) != 0; }
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }

inline void copy_async(void* shared, const void* global, bool exists) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulator::fail("cp.async: an address is not aligned");
  std::memset(shared, 0xff, 16);
  emulator::machine.fibers[emulator::machine.thread].copies.push_back({shared, global, exists});
}
inline void commit_copies() {
  auto& fiber = emulator::machine.fibers[emulator::machine.thread];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
template <int pending>
void wait_for_copies() {
  auto& groups = emulator::machine.fibers[emulator::machine.thread].groups;
  for (; int(groups.size()) > pending; groups.pop_front())
    for (const emulator::Copy& copy : groups.front())
      if (copy.exists) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
}

inline void load_once(uint32_t (&to)[4], const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("an address of 16 bytes is not aligned");
  std::memcpy(to, from, 16);
}
inline uint32_t transposed(uint32_t pair) {
  struct Brought { uint32_t pair, result; } brought{pair, 0};
  static const char kind = 0;
  emulator::together(&kind, brought, [](auto at) {
    const auto element = [&](int row, int column) { return at(row * 4 + column / 2).pair >> column % 2 * 16 & 0xffff; };
    for (int lane = 0; lane < emulator::WARP; ++lane)
      at(lane).result = element(lane % 4 * 2, lane / 4) | element(lane % 4 * 2 + 1, lane / 4) << 16;
  });
  return brought.result;
}
inline uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

inline void load_matrices(uint32_t (&to)[4], const void* row) { emulator::load(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { emulator::load(to, row, true); }

template <typename Element>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Brought { float* sums; const uint32_t* a; uint32_t b[2]; } brought{sums, a, {b0, b1}};
  static const char kind = 0;
  emulator::together(&kind, brought, [](auto at) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < emulator::WARP; ++lane) {
      const int group = lane / 4, in_group = lane % 4;
      for (int i = 0; i < 8; ++i)  // a0 … a7: rows group and group + 8 in turn by pairs, columns + 8 from a4 on
        left[i / 2 % 2 ? group + 8 : group][in_group * 2 + i % 2 + (i < 4 ? 0 : 8)] =
            emulator::half_of<Element>(at(lane).a[i / 2], i % 2);
      for (int i = 0; i < 4; ++i)  // b0 … b3: rows + 8 from b2 on
        right[in_group * 2 + i % 2 + (i < 2 ? 0 : 8)][group] = emulator::half_of<Element>(at(lane).b[i / 2], i % 2);
    }
    for (int lane = 0; lane < emulator::WARP; ++lane)
      for (int i = 0; i < 4; ++i) {  // c0 … c3: row group, then group + 8
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + i % 2;
        double sum = at(lane).sums[i];
        for (int k = 0; k < 16; ++k) sum += double(left[row][k]) * double(right[k][column]);
        at(lane).sums[i] = float(sum);
      }
  });
}

template <typename Element>
uint32_t packed(float low, float high) {
  return emulator::rounded(Element{}, low) | uint32_t(emulator::rounded(Element{}, high)) << 16;
}

inline float exp2_of(float x) { return std::exp2(x); }
inline float reciprocal_of(float x) { return 1 / x; }
inline float log2_of(float x) { return std::log2(x); }
inline float max_of(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }
inline float4 load_written(const float4* from) { return *from; }
inline float2 load_written(const float2* from) { return *from; }
inline void put_seal(uint64_t* at, uint64_t seal) {
  if (*at == seal) emulator::fail("a seal is put where one is already");
  *at = seal;
}
inline void take_seal(uint64_t* at, uint64_t seal) {
  if (*at != seal) emulator::fail("a thread block waits for one that starts later");
  *at = 0;
}
inline void add_one_shared(int* counter) { ++*counter; }
inline void sync_cluster() {
  emulator::meet(emulator::machine.cluster, int(emulator::machine.blocks.size()) * emulator::machine.threads);
}
template <typename T>
T load_in_cluster(const T* shared, int block) {
  const auto distance = (block - block_in_cluster()) * int64_t(emulator::machine.shared_bytes);
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(shared) + distance);
}
inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}

}  // namespace prefix_kernels::cuda
