// What only Hopper has, for emulator.h: products of a warpgroup, clusters, barriers in shared memory, copies of tiles.
#pragma once

namespace emulator {

// A descriptor's element: row `outer`, 16-bit column `inner` of the stored matrix, in the 128-byte swizzle. `by_rows`: a row
// is along K. A stored row of 128 bytes belongs to a group of 8, 1024-aligned; 16-byte chunks are permuted by address bits 7-9.
inline uint32_t operand_address(uint64_t descriptor, bool by_rows, int mn, int k) {
  if (descriptor >> 62 != 1) fail("only the 128-byte swizzle is known");
  if (descriptor >> 49 & 7) fail("a base offset other than 0");
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (by_rows ? start % 1024 >= 128 : start % 1024 != 0) fail("an operand that does not start with its swizzle");
  const uint32_t linear = by_rows ? start + mn / 8 * stride + mn % 8 * 128 + 2 * k
                                  : start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
  if (linear + 2 > kShared) fail("an operand beyond shared memory");
  return linear ^ (linear >> 7 & 7) << 4;
}

template <class T> void read_operands(Product& p, unsigned rank) {
  const auto at = [&](uint32_t address) {
    T v;
    std::memcpy(&v, seen_by_products[rank] + address, sizeof v);
    return static_cast<float>(v);
  };
  p.A.resize(64 * 16), p.B.resize(16 * p.n);
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k) p.A[m * 16 + k] = at(operand_address(p.a, p.a_by_rows, m, k));
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < p.n; ++n) p.B[k * p.n + n] = at(operand_address(p.b, p.b_by_rows, n, k));
}

inline Warpgroup& warpgroup_of(const Thread& t) { return block.warpgroups[t.rank * ((block.size + 127) / 128) + t.index / 128]; }

inline void (*reread)(Product&, unsigned) = nullptr;

template <class T> void issue(float* d, int count, uint64_t a, uint64_t b, bool a_by_rows, bool b_by_rows, bool accumulate) {
  Thread& t = *current;
  Warpgroup& group = warpgroup_of(t);
  reread = &read_operands<T>;
  const size_t bytes = count * sizeof *d;
  const uint64_t at = t.issued++ - group.first;
  if (at == group.products.size()) {
    group.products.push_back({a, b, a_by_rows, b_by_rows, 2 * count, {}, {}, {}});
    read_operands<T>(group.products.back(), t.rank);
  }
  Product& p = group.products[at];
  ++p.issued;
  if (p.a != a || p.b != b || p.a_by_rows != a_by_rows || p.b_by_rows != b_by_rows || p.n != 2 * count)
    fail("threads of a warpgroup begin different products");
  const bool known = t.accumulators.count(d);
  Accumulators& mine = t.accumulators[d];
  if (mine.under_way == 0) {
    const bool same = known && !std::memcmp(mine.values.data(), d, bytes);
    if (!same && !(known ? mine.fenced : t.fenced)) fail("accumulators written without wgmma.fence before a product");
    mine.values.assign(d, d + count);
    std::memset(d, 0xff, bytes);
  }
  ++mine.under_way;
  t.products.push_back({t.issued - 1, d, count, accumulate});
}

inline void fence_accumulators() {
  current->fenced = true;
  for (auto& [d, mine] : current->accumulators) mine.fenced = true;
}

inline uint64_t turn = 1, ripest = 0;  // of the scheduler; until which some product is under way

// Products take effect when waited for. What they read must not have changed since they were issued.
inline void wait_products(size_t most) {
  Thread& t = *current;
  Warpgroup& group = warpgroup_of(t);
  const int lane = t.index % 32, row = t.index % 128 / 32 * 16 + lane / 4, q = lane % 4;
  for (; t.committed_products.size() > most; t.committed_products.pop_front())
    for (const Use& use : t.committed_products.front()) {
      Product& p = group.products[use.product - group.first];
      // All of the warpgroup have issued it, and some turns pass before it is complete.
      while (p.issued < 128) yield();
      if (!p.ripe) p.ripe = turn + 2, ripest = p.ripe;
      while (turn < p.ripe) yield();
      if (p.C.empty()) {
        Product now{p.a, p.b, p.a_by_rows, p.b_by_rows, p.n, {}, {}, {}};
        reread(now, t.rank);
        const bool same = !std::memcmp(now.A.data(), p.A.data(), p.A.size() * 4) && !std::memcmp(now.B.data(), p.B.data(), p.B.size() * 4);
        if (!same) fail("a product's operands changed under it");
        p.C.assign(64 * p.n, 0.f);
        for (int m = 0; m < 64; ++m)
          for (int k = 0; k < 16; ++k) {
            const float x = p.A[m * 16 + k], *from = p.B.data() + k * p.n;
            float* to = p.C.data() + m * p.n;
            for (int n = 0; n < p.n; ++n) to[n] += x * from[n];
          }
      }
      Accumulators& mine = t.accumulators[use.d];
      for (int n = 0; n < use.count; ++n)
        mine.values[n] = (use.accumulate ? mine.values[n] : 0) + p.C[(row + 8 * (n % 4 / 2)) * p.n + n / 4 * 8 + 2 * q + n % 2];
      if (--mine.under_way == 0) {
        for (int n = 0; n < use.count; ++n) {
          uint32_t bits;
          std::memcpy(&bits, use.d + n, sizeof bits);
          if (bits != 0xffffffffu) fail("accumulators written under a product");
          use.d[n] = mine.values[n];
        }
        mine.fenced = false;
      }
      --p.left;
      while (!group.products.empty() && group.products.front().left == 0) group.products.pop_front(), ++group.first;
    }
  t.fenced = false;
}

inline void cluster_arrive() {
  if (current->cluster_arrivals != current->cluster_waits) fail("a second arrival at a cluster's barrier");
  ++current->cluster_arrivals;
  ++block.cluster_arrived;
  block.progress = true;
}
inline void cluster_wait() {
  const uint64_t target = ++current->cluster_waits;
  if (target != current->cluster_arrivals) fail("a wait at a cluster's barrier before the arrival");
  while (block.cluster_arrived < target * block.size * block.cluster) yield();
}


struct Barrier { int expected, pending; int64_t bytes; uint32_t phase; unsigned owner; bool fenced; uint64_t waits; };
struct TensorMap { unsigned char* data; int64_t rows, columns, pitch; int box; unsigned char unused[128 - 36]; };
struct Load { TensorMap map; unsigned rank; uint32_t to, barrier; int column, row; };
struct Store { TensorMap map; unsigned rank; uint32_t from; int column, row; std::vector<unsigned char> read; };
struct Named { int threads = 0; uint64_t arrived = 0; };

inline std::map<std::pair<unsigned, uint32_t>, Barrier> barriers;
inline std::map<std::pair<unsigned, int>, Named> named;
inline std::vector<Load> loads;
inline std::map<const Thread*, std::deque<std::vector<Store>>> stores;  // groups; the last is not committed
inline std::map<const Thread*, int> register_calls;
inline std::map<std::pair<const Thread*, int>, uint64_t> named_calls;
inline std::mt19937 landing(11);

inline bool ended(unsigned rank) {
  for (unsigned i = 0; i < block.size; ++i)
    if (!block.threads[rank * block.size + i]->done) return false;
  return true;
}
inline Barrier& barrier_at(unsigned rank, uint32_t at) {
  const auto found = barriers.find({rank, at});
  if (found == barriers.end()) fail("a barrier that is not initialised");
  return found->second;
}
// Of another block or of a copy: the initialisation was fenced, and for another block a cluster's barrier followed.
inline Barrier& visible_barrier(unsigned rank, uint32_t at) {
  Barrier& b = barrier_at(rank, at);
  if (!b.fenced) fail("a barrier whose initialisation is not fenced");
  if (rank != current->rank && current->cluster_waits <= b.waits) fail("another block's barrier before a barrier of the cluster");
  return b;
}
inline void complete(Barrier& b) {
  if (b.bytes >= 1 << 20 || b.bytes <= -(1 << 20)) fail("a barrier expects too many bytes");
  if (b.pending == 0 && b.bytes == 0) ++b.phase, b.pending = b.expected;
  block.progress = true;
}
inline void arrive(Barrier& b) {
  if (b.pending == 0) fail("an arrival beyond those that a barrier expects");
  --b.pending;
  complete(b);
}
// Byte `at` of a box in the swizzle: row of 128 bytes, 16-byte chunks permuted by address bits 7-9.
inline uint32_t in_box(uint32_t start, int row, int chunk) {
  const uint32_t linear = start + row * 128 + chunk * 16;
  return linear ^ (linear >> 7 & 7) << 4;
}
inline unsigned char* element(const TensorMap& map, int64_t row, int64_t column) {
  if (row < 0 || row >= map.rows || column < 0 || column >= map.columns) return nullptr;
  return map.data + row * map.pitch + 2 * column;
}
inline void land(size_t which) {
  const Load load = loads[which];
  loads.erase(loads.begin() + static_cast<ptrdiff_t>(which));
  if (ended(load.rank)) fail("a copy to a block that has ended");
  for (int row = 0; row < load.map.box; ++row)
    for (int column = 0; column < 64; ++column) {
      const uint32_t at = in_box(load.to, row, column / 8) + column % 8 * 2;
      uint16_t v = 0;
      if (const void* from = element(load.map, load.row + row, load.column + column)) std::memcpy(&v, from, 2);
      std::memcpy(shared[load.rank] + at, &v, 2);
      std::memcpy(seen_by_products[load.rank] + at, &v, 2);
    }
  Barrier& b = barrier_at(load.rank, load.barrier);
  b.bytes -= load.map.box * 128;
  complete(b);
}
inline void begin_async() {
  barriers.clear(), named.clear(), loads.clear(), stores.clear(), register_calls.clear(), named_calls.clear();
}
inline bool land_async(bool idle) {
  const bool ripens = turn++ < ripest;
  if (loads.empty() || (!idle && landing() % 2)) return ripens;
  land(landing() % loads.size());
  return true;
}
inline void leave_async() {
  for (const auto& group : stores[current])
    if (!group.empty()) fail("a thread left before its stores");
}
inline void end_async() {
  if (!loads.empty()) fail("a block left before its copies landed");
  for (const auto& [at, b] : barriers)
    if (b.bytes) fail("a block left a barrier that expects bytes");
  for (unsigned i = 0; i < block.size * block.cluster; ++i)
    if (register_calls[block.threads[i].get()] != register_calls[block.threads[i / block.size * block.size + i % block.size / 128 * 128].get()])
      fail("warps of a warpgroup ask for registers differently");
}
inline void load(void* to, const TensorMap& map, uint64_t* b, int column, int row, unsigned mask) {
  const auto offset = [](const void* p) { return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared[current->rank]); };
  const uint32_t at = offset(to), barrier = offset(b);
  if (at % 1024) fail("a tile that does not start with its swizzle");
  if (at + map.box * 128 > kShared) fail("a tile beyond shared memory");
  if (!mask || mask >> block.cluster) fail("no such block in the cluster");
  for (unsigned rank = 0; rank < block.cluster; ++rank) {
    if (!(mask >> rank & 1)) continue;
    if (ended(rank)) fail("a copy to a block that has ended");
    visible_barrier(rank, barrier);
    for (auto* memory : {shared[rank], seen_by_products[rank]}) std::memset(memory + at, 0xff, map.box * 128);
    loads.push_back({map, rank, at, barrier, column, row});
  }
  block.progress = true;
}
inline void read_store(Store& s) {
  if (!s.read.empty()) return;
  s.read.resize(s.map.box * 128);
  for (int row = 0; row < s.map.box; ++row)
    for (int c = 0; c < 8; ++c) std::memcpy(&s.read[row * 128 + c * 16], seen_by_products[s.rank] + in_box(s.from, row, c), 16);
}
inline void wait_stores(size_t most, bool done) {
  auto& groups = stores[current];
  const bool open = !groups.empty();  // the last group is open
  for (size_t n = 0; open && n + 1 + most < groups.size(); ++n)
    for (Store& s : groups[n]) read_store(s);
  while (done && groups.size() > most + 1) {
    for (const Store& s : groups.front())
      for (int row = 0; row < s.map.box; ++row)
        for (int column = 0; column < 64; ++column)
          if (void* to = element(s.map, s.row + row, s.column + column)) std::memcpy(to, &s.read[row * 128 + column * 2], 2);
    groups.pop_front();
  }
}
}  // namespace emulator

namespace spectral_ops::cuda {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::shared[emulator::current->rank]);
}

inline void stage16(void* to, const uint4& raw) {
  std::memcpy(to, &raw, sizeof raw);
  emulator::current->unfenced.push_back(static_cast<unsigned char*>(to));
}
inline void proxy_fence() {
  for (unsigned char* p : emulator::current->unfenced)
    if (unsigned char* seen = emulator::product_view(p)) std::memcpy(seen, p, 16);
  emulator::current->unfenced.clear();
}

inline void stream16_async(void* to, const void* from, int bytes) { copy16_async(to, from, bytes); }

template <class T, int kColumnMajor> void product_async(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  emulator::issue<T>(d, 32, a, b, !kColumnMajor, false, accumulate != 0);
}
template <class T, int kRowsOfB> void product256_async(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  emulator::issue<T>(d, 128, a, b, true, !kRowsOfB, accumulate != 0);
}
inline void products_done(float (&)[128]) {}
inline void products_begin() { emulator::fence_accumulators(); }
inline void products_commit() {
  emulator::current->committed_products.push_back(std::move(emulator::current->products));
  emulator::current->products.clear();
}
template <int N> void products_wait() { emulator::wait_products(N); }
inline void products_done(float (&)[32]) {}

template <bool kRelease> void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline uint32_t in_cluster(const void* p, int rank) {
  if (rank < 0 || rank >= static_cast<int>(emulator::block.cluster)) emulator::fail("no such block in the cluster");
  return static_cast<uint32_t>(rank) << 24 | shared_address(p);
}
inline void store_in_cluster(uint32_t address, float a, float b) {
  const unsigned rank = address >> 24, at = address & 0xffffff;
  if (at % 8) emulator::fail("unaligned store to another block");
  if (emulator::block.threads[rank * emulator::block.size]->done) emulator::fail("a store to a block that has ended");
  const float v[2] = {a, b};
  std::memcpy(emulator::shared[rank] + at, v, sizeof v);
}

// EMULATOR_HOPPER=1 asks the operators for their forms for Hopper.
template <auto kernel> bool has_body() {
  const char* text = std::getenv("EMULATOR_HOPPER");
  return text && std::atoi(text);
}

template <class... P, class... A>
cudaError_t enqueue_clusters(void (*kernel)(P...), int64_t grid, int cluster, int block, int64_t shared, cudaStream_t,
                             const A&... arguments) {
  if (grid <= 0) return cudaSuccess;
  if (shared > 227 * 1024) return cudaErrorInvalidConfiguration;
  return emulator::launch(kernel, grid, cluster, block, shared, arguments...);
}


using TensorMap = emulator::TensorMap;
static_assert(sizeof(TensorMap) == 128);
// With the encoder's own checks.
template <class DType>  // of 16 bits; not declared yet
cudaError_t tile_map(TensorMap& map, DType, const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows,
                     bool = false) {
  const int64_t most = int64_t{1} << 32, pitch = 2 * row_stride;
  if (reinterpret_cast<uintptr_t>(data) % 16 || pitch % 16 || pitch < 0 || pitch >= int64_t{1} << 40) return cudaErrorInvalidValue;
  if (rows < 1 || rows > most || columns < 1 || columns > most || box_rows < 1 || box_rows > 256) return cudaErrorInvalidValue;
  map = {static_cast<unsigned char*>(const_cast<void*>(data)), rows, columns, pitch, box_rows, {}};
  return cudaSuccess;
}
inline void barrier_init(uint64_t* b, int arrivals) {
  if (reinterpret_cast<uintptr_t>(b) % 8 || arrivals < 1 || arrivals >= 1 << 20) emulator::fail("a barrier that cannot be");
  emulator::barriers[{emulator::current->rank, shared_address(b)}] = {arrivals, arrivals, 0, 0, emulator::current->index, false, 0};
}
inline void barriers_visible() {
  for (auto& [at, b] : emulator::barriers)
    if (at.first == emulator::current->rank && b.owner == emulator::current->index && !b.fenced)
      b.fenced = true, b.waits = emulator::current->cluster_waits;
}
inline void barrier_expect(uint64_t* b, int bytes) {
  auto& barrier = emulator::barrier_at(emulator::current->rank, shared_address(b));
  barrier.bytes += bytes;
  emulator::arrive(barrier);
}
inline void barrier_wait(uint64_t* b, uint32_t parity) {
  const auto& barrier = emulator::barrier_at(emulator::current->rank, shared_address(b));
  while ((barrier.phase & 1) == parity) emulator::yield();
  emulator::block.progress = true;
}
inline void barrier_arrive(uint64_t* b, int rank) {
  in_cluster(b, rank);
  if (emulator::ended(rank)) emulator::fail("an arrival at a block that has ended");
  emulator::arrive(emulator::visible_barrier(rank, shared_address(b)));
}
inline void tile_load(void* to, const TensorMap& map, uint64_t* b, int column, int row) {
  emulator::load(to, map, b, column, row, 1u << emulator::current->rank);
}
inline void tile_multicast(void* to, const TensorMap& map, uint64_t* b, int column, int row, uint16_t mask) {
  emulator::load(to, map, b, column, row, mask);
}
inline void tile_store(const TensorMap& map, const void* from, int column, int row) {
  if (shared_address(from) % 1024) emulator::fail("a tile that does not start with its swizzle");
  auto& groups = emulator::stores[emulator::current];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({map, emulator::current->rank, shared_address(from), column, row, {}});
}
inline void tile_stores_commit() {
  auto& groups = emulator::stores[emulator::current];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int N> void tile_stores_read() { emulator::wait_stores(N, false); }
template <int N> void tile_stores_done() { emulator::wait_stores(N, true); }
inline void store_matrices(void* row, const uint32_t (&v)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("unaligned rows of a matrix");
  uint32_t words[8] = {v[0], v[1], v[2], v[3]};
  const auto* all = emulator::exchange(words, sizeof words);
  const int lane = emulator::current->index % 32;
  uint32_t mine[4];  // row lane % 8 of matrix lane / 8
  for (int c = 0; c < 4; ++c) mine[c] = all[4 * (lane % 8) + c][lane / 8];
  std::memcpy(row, mine, sizeof mine);
  emulator::current->unfenced.push_back(static_cast<unsigned char*>(row));
}
inline void named_barrier(int id, int threads) {
  if (id < 1 || id > 15 || threads < 32 || threads % 32) emulator::fail("a named barrier that cannot be");
  auto& barrier = emulator::named[{emulator::current->rank, id}];
  if (barrier.arrived % (barrier.threads ? barrier.threads : 1) && barrier.threads != threads)
    emulator::fail("a named barrier for different numbers of threads");
  if (barrier.threads != threads) barrier.threads = threads, barrier.arrived = 0;
  const uint64_t target = (barrier.arrived++ / threads + 1) * threads;
  emulator::block.progress = true;
  while (barrier.arrived < target) emulator::yield();
}
template <int N> void registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  ++emulator::register_calls[emulator::current];
}
template <int N> void more_registers() { registers<N>(); }
template <int N> void fewer_registers() { registers<N>(); }

}  // namespace spectral_ops::cuda
