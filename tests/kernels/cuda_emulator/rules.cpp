// One tile through shared memory, by each rule of hopper.h: test_cuda_emulator.py runs it whole (0) and with one rule broken.
#include "cuda/wgmma.cuh"

extern "C" { int64_t emulator_launches = 0, emulator_dry = 0, emulator_logged = 0, emulator_log[256]; }

using namespace spectral_ops::cuda;

static void copy(TensorMap from, TensorMap to, int broken) {
  unsigned char* tile = dynamic_shared();
  tile += (1024 - shared_address(tile) % 1024) % 1024;
  uint64_t* bar = reinterpret_cast<uint64_t*>(tile + 8192);
  const int t = thread_index(), rank = block_index() % 2;
  if (t == 0 && broken != 1) barrier_init(bar, 1);
  if (t == 0 && broken != 2) barriers_visible();
  cluster_arrive<true>(), cluster_wait();
  if (t == 0) {
    barrier_expect(bar, broken == 3 ? 4096 : 8192);
    if (broken == 4) barrier_arrive(bar, rank);
    tile_load(tile + (broken == 5 ? 128 : 0), from, bar, -8, rank * 64 - 8);
  }
  if (broken != 6) barrier_wait(bar, broken == 7);
  if (t < 32)
    for (int row = 0; row < 64; row += 4) {  // each element is rewritten as it is
      unsigned char* p = tile + in_tile(row + t / 8, t % 8);
      uint4 raw;
      std::memcpy(&raw, p, 16);
      if (broken == 9) raw.x ^= 1;
      std::memset(emulator::product_view(p), 0xff, 16);
      stage16(broken == 8 ? tile + (row + t / 8) * 128 + t % 8 * 16 : p, raw);
    }
  if (broken != 10) proxy_fence();
  named_barrier(1, broken == 11 && t < 32 ? 64 : 128);
  if (t == 0) {
    tile_store(to, tile, -8, rank * 64 - 8);
    if (broken != 12) tile_stores_commit();
    if (broken == 13) std::memset(emulator::product_view(tile), 0, 8192);
    if (broken != 14) tile_stores_done<0>();
  }
  if (broken != 15 || rank) cluster_arrive<true>(), cluster_wait();
}

int main(int, char** arguments) {
  alignas(16) uint16_t in[72 * 40], out[72 * 40];
  for (int i = 0; i < 72 * 40; ++i) in[i] = static_cast<uint16_t>(i), out[i] = 0xffff;
  TensorMap from, to;
  if (tile_map(from, 0, in + 1, 72, 40, 40, 64) == cudaSuccess || tile_map(from, 0, in, 72, 40, 41, 64) == cudaSuccess) return 2;
  if (tile_map(from, 0, in, 72, 40, 40, 257) == cudaSuccess || tile_map(from, 0, in, 0, 40, 40, 64) == cudaSuccess) return 2;
  if (tile_map(from, 0, in, 72, 40, 40, 64) != cudaSuccess || tile_map(to, 0, out, 72, 40, 40, 64) != cudaSuccess) return 2;
  enqueue_clusters(copy, 2, 2, 128, 16384, nullptr, from, to, std::atoi(arguments[1]));
  return std::memcmp(in, out, sizeof in) != 0;
}
