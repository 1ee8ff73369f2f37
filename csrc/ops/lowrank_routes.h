// Which way y = g * (x Wᵀ + scale h Bᵀ) + bias + tile goes on an H100: a cost model of waves and bytes, free of torch. Assumed
// and not measured; functional/lowrank_routes.py is the same arithmetic in the same order, and a test compares the two.
#pragma once

#include <cstdint>
#include <limits>

namespace spectral_ops {

enum class MatmulRoute { library, update_first, fused, triton };

namespace routes {

constexpr int64_t kProcessors = 132;        // multiprocessors, one tile on each at a time
constexpr double kProductRate = 7.9e14;     // flop/s of the library's 128x256 tiles in full waves
constexpr double kMemoryRate = 3.0e12;      // bytes/s
constexpr double kFirstLaunch = 1.5e-6;     // s: first loads and tail of an operator
constexpr double kNextLaunch = 1.0e-6;      // s: a further launch, which waits for the one before
constexpr double kFusedShare = 0.97;        // of kProductRate, our kernel in full waves
constexpr double kTritonShare = 0.75;       // of kProductRate, Triton's
constexpr double kExposedRead = 0.25;       // share of the accumulator's read that a product of many waves does not hide
constexpr int64_t kLeastRows = 1024;        // below, our kernel is not taken: the library splits such products further
constexpr double kLeastFill = 0.9;          // of the waves' tiles that are wanted elements, for our kernel to be taken
constexpr int64_t kTileRows = 128, kTileColumns = 256, kClusterRows = 2;  // of our kernel
constexpr int64_t kDepth = 64, kStep = 16;  // of a stage, and of one tensor-core instruction
constexpr int64_t kElement = 2;             // bytes

struct LibraryTile { int64_t rows, columns; double share; };  // share of kProductRate in full waves
constexpr LibraryTile kLibraryTiles[] = {{128, 256, 1.0}, {128, 128, 0.9}, {64, 256, 0.85}, {64, 128, 0.7}, {64, 64, 0.5}};

constexpr int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

constexpr int64_t waves(int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns, int64_t cluster) {
  return parts(parts(rows, tile_rows * cluster) * cluster * parts(columns, tile_columns), kProcessors);
}

constexpr double larger(double a, double b) { return a < b ? b : a; }

// Seconds of whole waves of tiles, each `depth` long, at `share` of the rate.
constexpr double wave_seconds(int64_t count, int64_t tile, int64_t depth, double share) {
  return static_cast<double>(count) * static_cast<double>(kProcessors * 2 * tile * depth) / (kProductRate * share);
}

constexpr double byte_seconds(int64_t elements) { return static_cast<double>(kElement * elements) / kMemoryRate; }

}  // namespace routes

// Of y [rows, columns] with x [rows, inner], h [rows, r] (r = 0: none), in 16 bits.
struct MatmulSizes {
  int64_t rows, columns, inner, r;
  bool scaled /*g*/, bias, tiled, fused_runs, triton_runs;
};

struct MatmulCosts {
  double seconds[4];  // by MatmulRoute; infinity where a route cannot run
  bool fills;         // whether our kernel's waves are full enough for it to be taken

  constexpr MatmulRoute best() const {
    int found = 0;
    for (int route = 1; route < 4; ++route)
      if (seconds[route] < seconds[found] && (fills || static_cast<MatmulRoute>(route) != MatmulRoute::fused)) found = route;
    return static_cast<MatmulRoute>(found);
  }
};

constexpr MatmulCosts matmul_costs(const MatmulSizes& s) {
  using namespace routes;
  constexpr double kNever = std::numeric_limits<double>::infinity();
  if (s.rows <= 0 || s.columns <= 0) return {{0.0, kNever, kNever, kNever}, false};
  const int64_t depth = parts(s.inner, kDepth) * kDepth, both = depth + parts(s.r, kStep) * kStep;
  const double y = byte_seconds(s.rows * s.columns);
  const double floor = byte_seconds(s.rows * s.inner + s.columns * s.inner) + y;
  const double factors = byte_seconds((s.rows + s.columns) * s.r);

  double product = kNever;
  int64_t most = 1;  // waves of the library's choice
  for (const LibraryTile& tile : kLibraryTiles) {
    const int64_t count = waves(s.rows, s.columns, tile.rows, tile.columns, 1);
    const double seconds = wave_seconds(count, tile.rows * tile.columns, depth, tile.share);
    if (seconds < product) product = seconds, most = count;
  }
  product = larger(product, floor) + kFirstLaunch;
  const double update = static_cast<double>(2 * s.rows * s.columns * s.r) / kProductRate;
  const double exposed = larger(kExposedRead, 1.0 / static_cast<double>(most));  // one wave hides none of it

  double library = product;
  if (s.r > 0) library = library + (larger(y + y + factors, update) + kNextLaunch);
  if (s.tiled) library = library + (y + y + kNextLaunch);
  double first = kNever;  // g scales both products, so it cannot come before the second
  if (s.r > 0 && !s.scaled && !s.tiled) first = product + (larger(y + y * exposed + factors, update) + kNextLaunch);

  const int64_t count = waves(s.rows, s.columns, kTileRows, kTileColumns, kClusterRows);
  const double wanted = static_cast<double>(s.rows * s.columns);
  const bool fills = s.rows >= kLeastRows &&
                     wanted >= kLeastFill * static_cast<double>(count * kProcessors * kTileRows * kTileColumns);
  double fused = kNever, triton = kNever;
  if (s.fused_runs)
    fused = larger(wave_seconds(count, kTileRows * kTileColumns, both, kFusedShare), floor + factors) + kFirstLaunch;
  if (s.triton_runs && !s.tiled) {
    const int64_t plain = waves(s.rows, s.columns, kTileRows, kTileColumns, 1);
    triton = larger(wave_seconds(plain, kTileRows * kTileColumns, both, kTritonShare), floor + factors) + kFirstLaunch;
  }
  return {{library, first, fused, triton}, fills};
}

}  // namespace spectral_ops
