// The rest of Hopper for emulator.h: csrc/cuda/tma.cuh without a GPU.
//
// A copy by the engine makes its destination NaN when it is issued and lands late: when no thread gets on, or at random
// (EMULATOR_ORDER=2); the last issued lands first where threads run in descending order. A wait at an mbarrier that has to
// wait makes no progress, so a deadlock is found. A store reads what products see when it is issued, so what was written
// without a fence does not show, and its source must not have changed when it is waited for.
#pragma once

#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace emulator {

inline Barrier& barrier_at(unsigned rank, unsigned at, bool remote) {
  const auto found = block.barriers.find({rank, at});
  if (found == block.barriers.end()) fail("a barrier that was not initialized");
  if (remote && !found->second.visible) fail("a barrier that was not made visible");
  return found->second;
}

inline void end_phase(Barrier& b) {
  block.progress = true;
  if (b.pending < 0) fail("more arrivals at a barrier than it expects");
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.expected;
  ++b.phase;
}

inline void arrive(Barrier& b) {
  --b.pending;
  end_phase(b);
}

inline bool ended(unsigned rank) { return block.threads[rank * block.size]->done; }

// Where a box's element lies: rows of 128 bytes, 16-byte chunks permuted by address bits 7-9.
inline unsigned swizzled(unsigned at, int row, int column) {
  const unsigned linear = at + static_cast<unsigned>(row * 128 + column * 2);
  return linear ^ (linear >> 7 & 7) << 4;
}

inline bool land() {
  if (block.landings.empty()) return false;
  static std::mt19937 random(11);
  const int chosen = order();
  const size_t n = chosen == 1 ? block.landings.size() - 1 : chosen == 2 ? random() % block.landings.size() : 0;
  const Landing copy = block.landings[n];
  block.landings.erase(block.landings.begin() + static_cast<ptrdiff_t>(n));
  const Matrix& m = copy.from;
  for (unsigned rank = 0; rank < block.cluster; ++rank) {
    if (!(copy.blocks >> rank & 1)) continue;
    if (ended(rank)) fail("a copy into a block that has ended");
    for (int r = 0; r < m.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const int64_t row = int64_t{copy.row} + r, column = int64_t{copy.column} + c;
        uint16_t v = 0;
        if (row >= 0 && row < m.rows && column >= 0 && column < m.columns)
          std::memcpy(&v, m.data + 2 * (row * m.stride + column), sizeof v);
        const unsigned to = swizzled(copy.at, r, c);
        std::memcpy(shared[rank] + to, &v, sizeof v);
        std::memcpy(seen_by_products[rank] + to, &v, sizeof v);
      }
    Barrier& b = barrier_at(rank, copy.barrier, true);
    b.bytes -= m.box_rows * 128;
    end_phase(b);
  }
  return true;
}

inline std::vector<uint16_t> box_of(const Store& store) {
  std::vector<uint16_t> values(static_cast<size_t>(store.to.box_rows) * 64);
  for (int r = 0; r < store.to.box_rows; ++r)
    for (int c = 0; c < 64; ++c)
      std::memcpy(&values[r * 64 + c], seen_by_products[current->rank] + swizzled(store.at, r, c), 2);
  return values;
}

inline void wait_stores(size_t most) {
  for (auto& groups = current->committed_stores; groups.size() > most; groups.pop_front())
    for (const Store& store : groups.front()) {
      if (box_of(store) != store.values) fail("a store's source changed under it");
      for (int r = 0; r < store.to.box_rows; ++r)
        for (int c = 0; c < 64; ++c) {
          const int64_t row = int64_t{store.row} + r, column = int64_t{store.column} + c;
          if (row < 0 || row >= store.to.rows || column < 0 || column >= store.to.columns) continue;
          std::memcpy(const_cast<unsigned char*>(store.to.data) + 2 * (row * store.to.stride + column), &store.values[r * 64 + c], 2);
        }
    }
}

}  // namespace emulator

namespace spectral_ops::cuda {

struct TensorMap {
  emulator::Matrix matrix;
  unsigned char rest[128 - sizeof(emulator::Matrix)];
};

// With what the driver's encoder refuses.
inline cudaError_t tile_map(TensorMap& map, DType dtype, const void* data, int64_t rows, int64_t columns, int64_t row_stride,
                            int box_rows, bool = false) {
  const auto size = [](int64_t n) { return n >= 1 && n <= int64_t{1} << 32; };
  if (dtype != DType::bfloat16 && dtype != DType::float16) return cudaErrorInvalidValue;
  if (!data || reinterpret_cast<uintptr_t>(data) % 16 || !size(rows) || !size(columns)) return cudaErrorInvalidValue;
  if (row_stride < 1 || row_stride * 2 % 16 || row_stride * 2 >= int64_t{1} << 40) return cudaErrorInvalidValue;
  if (box_rows < 1 || box_rows > 256) return cudaErrorInvalidValue;
  map.matrix = {static_cast<const unsigned char*>(data), rows, columns, row_stride, box_rows};
  return cudaSuccess;
}

inline void barrier_init(uint64_t* b, int arrivals) {
  if (reinterpret_cast<uintptr_t>(b) % 8 || arrivals < 1) emulator::fail("no such barrier");
  emulator::block.barriers[{emulator::current->rank, shared_address(b)}] = {arrivals, arrivals};
}
inline void barriers_visible() {
  for (auto& [at, b] : emulator::block.barriers)
    if (at.first == emulator::current->rank) b.visible = true;
}
inline void barrier_expect(uint64_t* b, int bytes) {
  emulator::Barrier& mine = emulator::barrier_at(emulator::current->rank, shared_address(b), false);
  mine.bytes += bytes;
  emulator::arrive(mine);
}
inline void barrier_wait(uint64_t* b, uint32_t parity) {
  const emulator::Barrier& mine = emulator::barrier_at(emulator::current->rank, shared_address(b), false);
  if (parity > 1) emulator::fail("a parity other than 0 and 1");
  while ((mine.phase & 1) == parity) emulator::yield();
}
inline void barrier_arrive(uint64_t* b, int rank) {
  if (rank < 0 || rank >= static_cast<int>(emulator::block.cluster)) emulator::fail("no such block in the cluster");
  if (emulator::ended(static_cast<unsigned>(rank))) emulator::fail("an arrival at a block that has ended");
  emulator::arrive(emulator::barrier_at(static_cast<unsigned>(rank), shared_address(b), true));
}
inline void named_barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32) emulator::fail("no such named barrier");
  auto& [arrived, meet] = emulator::block.named[{emulator::current->rank, id}];
  if (meet == 0) meet = threads;
  if (meet != threads) emulator::fail("threads of a named barrier wait for different numbers");
  const uint64_t target = ++emulator::current->named_barriers[id] * static_cast<uint64_t>(threads);
  ++arrived;
  emulator::block.progress = true;
  while (arrived < target) emulator::yield();
}

inline void tile_multicast(void* to, const TensorMap& map, uint64_t* b, int column, int row, uint16_t mask) {
  const unsigned at = shared_address(to), barrier = shared_address(b);
  if (at % 1024) emulator::fail("a copy that does not start with its swizzle");
  if (mask == 0 || mask >> emulator::block.cluster) emulator::fail("no such blocks in the cluster");
  for (unsigned rank = 0; rank < emulator::block.cluster; ++rank)  // where the bytes may arrive at once
    if (mask >> rank & 1) emulator::barrier_at(rank, barrier, true);
  const size_t bytes = static_cast<size_t>(map.matrix.box_rows) * 128;
  for (unsigned rank = 0; rank < emulator::block.cluster; ++rank)
    if (mask >> rank & 1)
      for (auto* memory : {emulator::shared[rank], emulator::seen_by_products[rank]}) std::memset(memory + at, 0xff, bytes);
  emulator::block.landings.push_back({map.matrix, at, barrier, mask, column, row});
}
inline void tile_load(void* to, const TensorMap& map, uint64_t* b, int column, int row) {
  tile_multicast(to, map, b, column, row, static_cast<uint16_t>(1u << emulator::current->rank));
}
inline void tile_store(const TensorMap& map, const void* from, int column, int row) {
  const unsigned at = shared_address(from);
  if (at % 1024) emulator::fail("a store that does not start with its swizzle");
  emulator::Store store{map.matrix, at, column, row, {}};
  store.values = emulator::box_of(store);
  emulator::current->stores.push_back(std::move(store));
}
inline void tile_stores_commit() {
  emulator::current->committed_stores.push_back(std::move(emulator::current->stores));
  emulator::current->stores.clear();
}
template <int N> void tile_stores_read() { emulator::wait_stores(N); }
template <int N> void tile_stores_done() { emulator::wait_stores(N); }

inline void store_matrices(void* row, const uint32_t (&v)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("unaligned rows of a matrix");
  const auto* all = emulator::exchange(&row, sizeof row);
  const int lane = emulator::current->index % 32;
  for (int m = 0; m < 4; ++m) {
    unsigned char* to;
    std::memcpy(&to, all[8 * m + lane / 4], sizeof to);
    std::memcpy(to + lane % 4 * 4, &v[m], sizeof v[m]);
    emulator::current->unfenced.push_back(to);
  }
  __syncwarp();  // the rows are whole before a lane fences them
}

template <int N> void more_registers() { static_assert(N % 8 == 0 && N >= 24 && N <= 256); }
template <int N> void fewer_registers() { static_assert(N % 8 == 0 && N >= 24 && N <= 256); }

template <class T, int kRowsOfB> void product256_async(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  emulator::issue<T>(d, a, b, false, kRowsOfB != 0, accumulate != 0);
}
inline void products_done(float (&)[128]) {}

}  // namespace spectral_ops::cuda
