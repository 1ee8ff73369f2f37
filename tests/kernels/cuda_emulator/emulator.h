// Runs the CUDA kernels of csrc/cuda on the CPU, one block after another, so that their indexing, their barriers and
// their reductions are tested where no GPU is. Every thread of a block is a fiber (ucontext); barriers, shuffles and
// warp matrix instructions yield until the threads they join have arrived. It proves what a kernel computes, not how fast.
//
// It is strict where hardware is lenient: shared memory starts as NaN, asynchronous copies land only when waited for,
// the order in which threads run between barriers is chosen by EMULATOR_ORDER (0 ascending, 1 descending, 2 shuffled,
// 3 each warp as far as it gets before the next), and a barrier that some thread never reaches aborts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#undef __shared__
#define __shared__ static
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#undef __global__
#define __global__
#undef __forceinline__
#define __forceinline__ inline

extern "C" {
extern int64_t emulator_launches;  // of kernels and of the library's products, since the program started
extern int64_t emulator_dry;       // nothing is executed: launches are only written down
extern int64_t emulator_log[256];  // of each: the kernel, blocks, threads, dynamic bytes; of a product: 0 and its three sizes
extern int64_t emulator_logged;    // launches written down
}

namespace emulator {

// Writes a launch down where nothing is to be executed.
inline bool dry(const void* kernel, int64_t a, int64_t b, int64_t c) {
  if (!emulator_dry) return false;
  const int64_t words[] = {reinterpret_cast<int64_t>(kernel), a, b, c};
  if (emulator_logged < 64) std::memcpy(emulator_log + 4 * emulator_logged++, words, sizeof words);
  return true;
}

struct Copy { void* to; const void* from; int bytes; };

struct Thread {
  ucontext_t context;  // where the fiber starts
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  unsigned index = 0;
  bool done = true, started = false;
  uint64_t block_barriers = 0, warp_calls = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

struct Warp {
  uint32_t slots[2][32][8];
  uint64_t arrived = 0;  // over all calls
};

constexpr size_t kStack = 256 * 1024, kShared = 228 * 1024;

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  unsigned size = 0, grid = 0, index = 0;
  uint64_t arrived = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  bool progress = false;
};

inline Block block;
inline Thread* current = nullptr;
alignas(128) inline unsigned char shared[kShared];

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, block.index, current ? current->index : 0);
  std::abort();
}

// _setjmp and _longjmp switch fibers without the system call that swapcontext makes.
inline void yield() {
  if (!_setjmp(current->resume)) _longjmp(block.scheduler, 1);
}

__attribute__((noinline)) inline void resume(Thread& t) {
  if (_setjmp(block.scheduler)) return;
  if (t.started) _longjmp(t.resume, 1);
  t.started = true;
  setcontext(&t.context);
}

inline void block_barrier() {
  const uint64_t target = ++current->block_barriers * block.size;
  ++block.arrived;
  block.progress = true;
  while (block.arrived < target) yield();
}

// Each lane of a warp offers `words`; returns the 32 offers once all lanes have made theirs.
inline const uint32_t (*exchange(const void* words, size_t bytes))[8] {
  Warp& warp = block.warps[current->index / 32];
  const uint64_t call = current->warp_calls++;
  std::memcpy(warp.slots[call & 1][current->index % 32], words, bytes);
  ++warp.arrived;
  block.progress = true;
  while (warp.arrived < (call + 1) * 32) yield();
  return warp.slots[call & 1];
}

inline void entry() {
  block.body();
  current->done = true;
  block.progress = true;
  yield();
}

inline int order() {
  const char* text = std::getenv("EMULATOR_ORDER");
  return text ? std::atoi(text) : 0;
}

inline void run_block(unsigned index, size_t dynamic_shared) {
  block.index = index;
  block.arrived = 0;
  block.warps.assign((block.size + 31) / 32, Warp{});
  std::memset(shared, 0xff, dynamic_shared + 64 < kShared ? dynamic_shared + 64 : kShared);
  while (block.threads.size() < block.size) block.threads.emplace_back(new Thread);
  std::vector<unsigned> sequence(block.size);
  std::iota(sequence.begin(), sequence.end(), 0u);
  static std::mt19937 random(7);
  const int chosen = order();
  if (chosen == 1) std::reverse(sequence.begin(), sequence.end());
  for (unsigned i = 0; i < block.size; ++i) {
    Thread& t = *block.threads[i];
    if (!t.stack) t.stack.reset(new char[kStack]);
    t.index = i, t.done = t.started = false, t.block_barriers = t.warp_calls = 0;
    t.open.clear(), t.committed.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, reinterpret_cast<void (*)()>(&entry), 0);
  }
  unsigned left = block.size;
  const auto run = [&](unsigned begin, unsigned end) {  // each of these threads up to its next barrier
    block.progress = false;
    for (unsigned n = begin; n < end; ++n) {
      Thread& t = *block.threads[sequence[n]];
      if (t.done) continue;
      current = &t;
      resume(t);
      if (t.done) --left;
    }
    return block.progress;
  };
  while (left > 0) {
    if (chosen == 2) std::shuffle(sequence.begin(), sequence.end(), random);
    bool progress = false;
    const unsigned group = chosen == 3 ? 32 : block.size;
    for (unsigned begin = 0; begin < block.size; begin += group)
      do progress |= run(begin, begin + group);
      while (group == 32 && block.progress);
    if (!progress) fail("deadlock: threads wait at different barriers");
  }
  for (unsigned i = 0; i < block.size; ++i)
    if (block.threads[i]->block_barriers != block.threads[0]->block_barriers) fail("a thread left before a barrier");
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t grid, int size, int64_t dynamic_shared, const A&... arguments) {
  ++emulator_launches;
  if (dry(reinterpret_cast<const void*>(kernel), grid, size, dynamic_shared)) return cudaSuccess;
  if (grid > INT32_MAX || size > 1024 || size % 32) return cudaErrorInvalidConfiguration;
  if (dynamic_shared > 99 * 1024) return cudaErrorInvalidConfiguration;  // what the smallest GPU of interest has
  block.size = static_cast<unsigned>(size);
  block.grid = static_cast<unsigned>(grid > 0 ? grid : 0);
  block.body = [&] { kernel(arguments...); };
  for (unsigned b = 0; b < block.grid; ++b) run_block(b, static_cast<size_t>(dynamic_shared));
  return cudaSuccess;
}

struct Index { unsigned x; };

template <class T> T shuffled(T v, int source) {
  uint32_t words[8] = {};
  std::memcpy(words, &v, sizeof v);
  const auto* all = exchange(words, sizeof words);
  T result;
  std::memcpy(&result, all[source], sizeof result);
  return result;
}

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::current->index})
#define blockIdx (emulator::Index{emulator::block.index})
#define blockDim (emulator::Index{emulator::block.size})
#define gridDim (emulator::Index{emulator::block.grid})

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { uint32_t none = 0; emulator::exchange(&none, sizeof none); }
template <class T> T __shfl_xor_sync(unsigned, T v, int lanes) {
  return emulator::shuffled(v, static_cast<int>(emulator::current->index % 32) ^ lanes);
}
template <class T> T __shfl_sync(unsigned, T v, int lane) { return emulator::shuffled(v, lane); }
template <class T> T __ldg(const T* p) { return *p; }

namespace spectral_ops::cuda {

inline unsigned char* dynamic_shared() { return emulator::shared; }

template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t words[8] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* all = emulator::exchange(words, sizeof words);
  const int lane = emulator::current->index % 32, i = lane / 4, q = lane % 4;
  auto half = [&](uint32_t bits, int high) {
    const uint16_t h = static_cast<uint16_t>(high ? bits >> 16 : bits);
    T v;
    std::memcpy(&v, &h, sizeof v);
    return static_cast<float>(v);
  };
  for (int slot = 0; slot < 4; ++slot) {
    const int row = i + 8 * (slot / 2), column = 2 * q + slot % 2;
    float sum = c[slot];
    for (int k = 0; k < 16; ++k) {  // element [row, k] of a: lane 4 (row % 8) + (k % 8) / 2, register 2 (k / 8) + row / 8
      const uint32_t* of_a = all[4 * (row % 8) + k % 8 / 2];
      const uint32_t* of_b = all[4 * column + k % 8 / 2];
      sum += half(of_a[2 * (k / 8) + row / 8], k % 2) * half(of_b[4 + k / 8], k % 2);
    }
    c[slot] = sum;
  }
}

inline uint32_t transposed(uint32_t pair) {
  const auto* all = emulator::exchange(&pair, sizeof pair);
  const int lane = emulator::current->index % 32, i = lane / 4, q = lane % 4;
  uint32_t result = 0;
  for (int e = 0; e < 2; ++e) {  // [2q + e, i] of the source
    const uint32_t word = all[4 * (2 * q + e) + i / 2][0];
    result |= (i % 2 ? word >> 16 : word & 0xffff) << (16 * e);
  }
  return result;
}

inline void copy16_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("unaligned copy");
  if (bytes < 0 || bytes > 16) emulator::fail("a copy of more than 16 bytes");
  emulator::current->open.push_back({to, from, bytes});
}
inline void copy_commit() {
  emulator::current->committed.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}
template <int N> void copy_wait() {
  for (auto& groups = emulator::current->committed; groups.size() > N; groups.pop_front())
    for (const emulator::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
}

}  // namespace spectral_ops::cuda
