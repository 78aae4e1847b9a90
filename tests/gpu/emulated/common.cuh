// csrc/cuda/common.cuh for a CPU: runs the very kernels, one block after the other, each thread of a block on a stack
// of its own. A thread runs until it waits: at a barrier, in an exchange of its warp. A copy lands when its group is
// waited for, and no earlier, so that a wait that is missing shows.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct dim3 {
  uint32_t x, y, z;
  dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

struct Thread {
  dim3 index;
  jmp_buf state;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool begun = false, done = false;
  std::vector<std::vector<std::function<void()>>> groups{1};  // of copies; the last one is open
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Block {
  std::vector<Thread> threads;
  jmp_buf scheduler;
  std::function<void()> run;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<float> exchange;
};

inline Block block;
inline Thread* current;
inline dim3 block_index, grid_size;

inline void yield() {
  if (!_setjmp(current->state)) _longjmp(block.scheduler, 1);
}

inline void wait_at(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

inline void thread_main() {
  block.run();
  current->done = true;
  _longjmp(block.scheduler, 1);
}

inline void run_block(int threads, const std::function<void()>& kernel) {
  constexpr size_t kStack = 256 << 10;
  block.run = kernel;
  block.all = {};
  block.warps.assign(threads / 32, {});
  block.exchange.assign(threads, 0);
  if (block.threads.size() != size_t(threads)) block.threads = std::vector<Thread>(threads);
  for (int i = 0; i < threads; ++i) {
    Thread& t = block.threads[i];
    t.index = dim3(i, 0, 0);
    t.begun = t.done = false;
    t.groups.assign(1, {});
    if (!t.stack) t.stack.reset(new char[kStack]);
    getcontext(&t.start);
    t.start.uc_stack = {t.stack.get(), 0, kStack};
    makecontext(&t.start, thread_main, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (Thread& t : block.threads) {
      if (t.done) continue;
      running = true;
      current = &t;
      if (_setjmp(block.scheduler)) continue;  // the thread waits or is done
      if (t.begun) _longjmp(t.state, 1);
      t.begun = true;
      setcontext(&t.start);
    }
  }
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::block_index)
#define gridDim (emulated::grid_size)

inline void __syncthreads() { emulated::wait_at(emulated::block.all, int(emulated::block.threads.size())); }

inline float __shfl_xor_sync(uint32_t, float x, int offset) {
  emulated::Barrier& warp = emulated::block.warps[threadIdx.x / 32];
  emulated::block.exchange[threadIdx.x] = x;
  emulated::wait_at(warp, 32);
  const float y = emulated::block.exchange[threadIdx.x ^ offset];
  emulated::wait_at(warp, 32);
  return y;
}

inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

inline float __expf(float x) { return expf(x); }

namespace lmk {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float widen(F16 x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return float(y);
}

inline void narrow(float x, float* y) { *y = x; }
inline void narrow(float x, Bf16* y) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  y->bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, F16* y) {
  const _Float16 half = _Float16(x);
  memcpy(y, &half, 2);
}

template <int kBytes>
inline void copy_async(void* shared, const void* global, bool held) {
  static_assert(kBytes == 4 || kBytes == 16);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % kBytes) abort();
  emulated::current->groups.back().push_back([=] {
    if (held)
      memcpy(shared, global, kBytes);
    else
      memset(shared, 0, kBytes);
  });
}

inline void close_copies() { emulated::current->groups.emplace_back(); }

template <int kOpen>
inline void wait_for_copies() {
  auto& groups = emulated::current->groups;
  while (groups.size() > kOpen + 1) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

template <class Argument>
inline const char* launch(void (*kernel)(Argument), dim3 grid, int threads, void*, const Argument& argument) {
  emulated::grid_size = grid;
  for (uint32_t z = 0; z < grid.z; ++z)
    for (uint32_t y = 0; y < grid.y; ++y)
      for (uint32_t x = 0; x < grid.x; ++x) {
        emulated::block_index = {x, y, z};
        emulated::run_block(threads, [&] { kernel(argument); });
      }
  return nullptr;
}

inline int multiprocessors() { return 8; }

}  // namespace lmk
