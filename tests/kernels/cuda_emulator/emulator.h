// Runs the CUDA kernels of csrc/cuda on the CPU, one block after another, so that their indexing, their barriers and
// their reductions are tested where no GPU is. Every thread of a block is a fiber (ucontext); barriers, shuffles and
// warp matrix instructions yield until the threads they join have arrived. It proves what a kernel computes, not how fast.
//
// It is strict where hardware is lenient: shared memory starts as NaN, asynchronous copies land only when waited for and
// leave NaN until then, and a barrier that some thread never reaches aborts. EMULATOR_ORDER is the order in which threads run
// between barriers: 0 ascending, 1 descending, 2 shuffled, 3 each warp, and each block of a cluster, as far as it gets before
// the next.
//
// Of Hopper: products of a warpgroup read shared memory as a second copy of it shows, which a fence brings up to date. Their
// accumulators are NaN until they have been waited for, and what they read must not change until then.
// Tiles copied by the engine are NaN until they land, at random or when nobody else gets on; a wait at a barrier in shared memory
// is no progress, so a deadlock is found; what is stored by the engine is read from the second copy, as late as it may be.
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
#include <map>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#define cudaFuncSetAttribute emulator::set_attribute
#define cudaGetLastError emulator::last_error
#undef __shared__
#define __shared__ static
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#undef __global__
#define __global__
#undef __grid_constant__
#define __grid_constant__
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

// The dynamic shared memory that kernels may have. A kernel's maximum must not change: another thread could change it back
// before the launch.
struct SharedMemory { int64_t calls, value, refused, pending; };  // refused: the error that the next call meets
inline SharedMemory shared_memory;

inline cudaError_t set_attribute(const void* kernel, cudaFuncAttribute, int value) {
  static std::map<const void*, int> maximum;
  ++shared_memory.calls, shared_memory.value = value;
  const bool changed = maximum.emplace(kernel, value).first->second != value;
  shared_memory.pending = changed ? cudaErrorInvalidValue : shared_memory.refused;
  shared_memory.refused = 0;
  return static_cast<cudaError_t>(shared_memory.pending);
}

inline cudaError_t last_error() {
  const auto error = static_cast<cudaError_t>(shared_memory.pending);
  shared_memory.pending = 0;
  return error;
}

struct Copy { void* to; const void* from; int bytes; };

// What a thread knows of wgmma's accumulators that it has given to one.
struct Accumulators { std::vector<float> values; int under_way = 0; bool fenced = false; };
struct Use { uint64_t product; float* d; int count; bool accumulate; };

struct Thread {
  ucontext_t context;  // where the fiber starts
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  unsigned index = 0, rank = 0;  // in its block, and the block's in its cluster
  bool done = true, started = false;
  uint64_t block_barriers = 0, warp_calls = 0, cluster_arrivals = 0, cluster_waits = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
  std::vector<unsigned char*> unfenced;  // 16 bytes each that products do not see yet
  std::map<float*, Accumulators> accumulators;
  std::vector<Use> products;
  std::deque<std::vector<Use>> committed_products;
  uint64_t issued = 0;
  bool fenced = false;
};

struct Warp {
  uint32_t slots[2][32][8];
  uint64_t arrived = 0;  // over all calls
};

// A product of a warpgroup: its operands as the first thread to issue it found them.
struct Product {
  uint64_t a, b;
  bool a_by_rows, b_by_rows;
  int n;
  std::vector<float> A, B, C;  // [64, 16], [16, n], [64, n]; C once it has been waited for
  int left = 128, issued = 0;
  uint64_t ripe = 0;  // the turn from which it is complete, once somebody waits
};
struct Warpgroup { std::deque<Product> products; uint64_t first = 0; };

constexpr size_t kStack = 256 * 1024, kShared = 228 * 1024;
constexpr unsigned kMaxCluster = 8;

struct Block {  // or a cluster of them, which run together
  std::vector<std::unique_ptr<Thread>> threads;  // of all of them
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  unsigned size = 0, grid = 0, index = 0, cluster = 1;  // index: of the first
  uint64_t arrived[kMaxCluster] = {}, cluster_arrived = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  bool progress = false;
};

inline Block block;
inline Thread* current = nullptr;
alignas(1024) inline unsigned char shared[kMaxCluster][kShared];        // as threads see it
alignas(1024) inline unsigned char seen_by_products[kMaxCluster][kShared];
constexpr int kSharedStart = 16;  // a kernel that wants more alignment than it is promised has to see to it

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, block.index + (current ? current->rank : 0),
               current ? current->index : 0);
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
  ++block.arrived[current->rank];
  block.progress = true;
  while (block.arrived[current->rank] < target) yield();
}

inline size_t warp_of(const Thread& t) { return t.rank * ((block.size + 31) / 32) + t.index / 32; }

// Each lane of a warp offers `words`; returns the 32 offers once all lanes have made theirs.
inline const uint32_t (*exchange(const void* words, size_t bytes))[8] {
  Warp& warp = block.warps[warp_of(*current)];
  const uint64_t call = current->warp_calls++;
  std::memcpy(warp.slots[call & 1][current->index % 32], words, bytes);
  ++warp.arrived;
  block.progress = true;
  while (warp.arrived < (call + 1) * 32) yield();
  return warp.slots[call & 1];
}

void begin_async();           // hopper.h
bool land_async(bool idle);  // whether a copy landed; one has to where nothing else moves
void leave_async();          // a thread ends
void end_async();            // all blocks of a cluster have

inline void entry() {
  block.body();
  if (!current->products.empty() || !current->committed_products.empty()) fail("a thread left before its products");
  if (current->cluster_arrivals != current->cluster_waits) fail("a thread left between a cluster's arrival and its wait");
  leave_async();
  current->done = true;
  block.progress = true;
  yield();
}

inline int order() {
  const char* text = std::getenv("EMULATOR_ORDER");
  return text ? std::atoi(text) : 0;
}

inline void run_block(unsigned index, size_t dynamic_shared) {
  const unsigned count = block.size * block.cluster;
  block.index = index;
  std::fill_n(block.arrived, kMaxCluster, 0);
  block.cluster_arrived = 0;
  block.warps.assign((block.size + 31) / 32 * block.cluster, Warp{});
  block.warpgroups.assign((block.size + 127) / 128 * block.cluster, Warpgroup{});
  for (unsigned rank = 0; rank < block.cluster; ++rank)
    for (auto* memory : {shared[rank], seen_by_products[rank]}) std::memset(memory, 0xff, std::min(dynamic_shared + 64, kShared));
  while (block.threads.size() < count) block.threads.emplace_back(new Thread);
  std::vector<unsigned> sequence(count);
  std::iota(sequence.begin(), sequence.end(), 0u);
  static std::mt19937 random(7);
  const int chosen = order();
  if (chosen == 1) std::reverse(sequence.begin(), sequence.end());
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *block.threads[i];
    if (!t.stack) t.stack.reset(new char[kStack]);
    t.index = i % block.size, t.rank = i / block.size;
    t.done = t.started = t.fenced = false;
    t.block_barriers = t.warp_calls = t.cluster_arrivals = t.cluster_waits = t.issued = 0;
    t.open.clear(), t.committed.clear(), t.unfenced.clear();
    t.accumulators.clear(), t.products.clear(), t.committed_products.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, reinterpret_cast<void (*)()>(&entry), 0);
  }
  begin_async();
  unsigned left = count;
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
    if (chosen != 3) progress = run(0, count);
    else
      for (unsigned rank = 0; rank < block.cluster; ++rank)
        for (bool moved = true; moved; progress |= moved) {
          moved = false;
          for (unsigned begin = rank * block.size; begin < (rank + 1) * block.size; begin += 32)
            while (run(begin, begin + 32)) moved = true;
        }
    progress |= land_async(!progress);
    if (!progress) fail("deadlock: threads wait at different barriers");
  }
  end_async();
  for (unsigned i = 0; i < count; ++i)
    if (block.threads[i]->block_barriers != block.threads[0]->block_barriers) fail("a thread left before a barrier");
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int64_t grid, int cluster, int size, int64_t dynamic_shared, const A&... arguments) {
  ++emulator_launches;
  if (dry(reinterpret_cast<const void*>(kernel), grid, size, dynamic_shared)) return cudaSuccess;
  if (grid > INT32_MAX || size > 1024 || size % 32) return cudaErrorInvalidConfiguration;
  if (cluster < 1 || cluster > static_cast<int>(kMaxCluster) || grid % cluster) return cudaErrorInvalidConfiguration;
  block.cluster = static_cast<unsigned>(cluster);
  block.size = static_cast<unsigned>(size);
  block.grid = static_cast<unsigned>(grid > 0 ? grid : 0);
  block.body = [&] { kernel(arguments...); };
  for (unsigned b = 0; b < block.grid; b += block.cluster) run_block(b, static_cast<size_t>(dynamic_shared));
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

// Where products see these bytes of shared memory; null for other memory.
inline unsigned char* product_view(void* p) {
  const auto at = static_cast<unsigned char*>(p) - shared[0];
  return at >= 0 && at < static_cast<ptrdiff_t>(sizeof shared) ? seen_by_products[0] + at : nullptr;
}

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::current->index})
#define blockIdx (emulator::Index{emulator::block.index + emulator::current->rank})
#define blockDim (emulator::Index{emulator::block.size})
#define gridDim (emulator::Index{emulator::block.grid})

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { uint32_t none = 0; emulator::exchange(&none, sizeof none); }
template <class T> T __shfl_xor_sync(unsigned, T v, int lanes) {
  return emulator::shuffled(v, static_cast<int>(emulator::current->index % 32) ^ lanes);
}
template <class T> T __shfl_sync(unsigned, T v, int lane, int width = 32) {
  return emulator::shuffled(v, (static_cast<int>(emulator::current->index % 32) & -width) + lane % width);
}
template <class T> T __ldg(const T* p) { return *p; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

namespace spectral_ops::cuda {

inline unsigned char* dynamic_shared() { return emulator::shared[emulator::current->rank] + emulator::kSharedStart; }

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

inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline unsigned block_index() { return blockIdx.x; }

inline void load_transposed(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("unaligned rows of a matrix");
  const auto* all = emulator::exchange(&row, sizeof row);
  const int lane = emulator::current->index % 32, i = lane / 4, q = lane % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {  // [2q + e, i] of matrix m
      const uint16_t* from;
      std::memcpy(&from, all[8 * m + 2 * q + e], sizeof from);
      pair[e] = from[i];
    }
    std::memcpy(&out[m], pair, sizeof pair);
  }
}

inline void copy16_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("unaligned copy");
  if (bytes < 0 || bytes > 16) emulator::fail("a copy of more than 16 bytes");
  std::memset(to, 0xff, 16);  // undefined until it has landed, and it may land at once
  if (unsigned char* seen = emulator::product_view(to)) std::memset(seen, 0xff, 16);
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
      emulator::current->unfenced.push_back(static_cast<unsigned char*>(copy.to));
    }
}

}  // namespace spectral_ops::cuda

#include "hopper.h"
