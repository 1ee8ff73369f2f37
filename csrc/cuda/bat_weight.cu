// bat_weight_ (METHODS 1.4). d = k = 4096, r = 64, bf16, at 3.3 TB/s: W' moves 67 MB, 20 us, for 4 GFLOP. Predicted, not
// measured.
#include "bat.cuh"

namespace spectral_ops::cuda {

namespace {

template <class O> __device__ __forceinline__ void store_four(O* p, const float (&v)[4]) {
  if constexpr (sizeof(O) == 2) *reinterpret_cast<uint2*>(p) = make_uint2(pair_of<O>(v[0], v[1]), pair_of<O>(v[2], v[3]));
  else *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}

template <class O> constexpr int kWeightParts = sizeof(O) == 2 ? 2 : 3;  // of bat

template <class T, class O> struct Weight {
  const T* weight;
  const void* bat;
  O* out;
  int64_t weight_row, weight_column, out_stride;
  int r;
  int others;  // blocks of W that meet one block of bat
  int share;   // items of a thread block; an item is 16 rows of two of them
  int parts;   // thread blocks that share the items
  DType bat_dtype;
  bool by_column, delta;

  // Of the `other`-th block of W that meets block `block` of bat: where its row i lies in W, and its first column.
  __device__ __forceinline__ int64_t row(int block, int other, int i) const { return int64_t{by_column ? other : block} * r + i; }
  __device__ __forceinline__ int64_t column(int block, int other) const { return int64_t{by_column ? block : other} * r; }
};

// A thread block keeps r x 16 G of a block of bat as fragments. A warp takes 16 rows of two blocks of W at a time. It reads the
// columns of W that it also adds last. G: how many times 16 columns.
template <class T, class O, int G> __global__ void __launch_bounds__(kThreads, G * kParts<T> >= 2 ? 1 : 2) weight_mma(Weight<T, O> a) {
  constexpr int Q = kWeightParts<O>;
  const int fragments = a.r / 16 * 2 * G * 32;
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());   // [r / 16, 2 G, 32]: two parts of a lane's fragment
  uint2* third = reinterpret_cast<uint2*>(shared + fragments);  // the third, where there is one
  const int lane = threadIdx.x % 32, i = lane / 4, q = lane % 4, panels = a.r / (16 * G);
  const int panel = static_cast<int>(blockIdx.x) % panels, part = static_cast<int>(blockIdx.x) / panels % a.parts;
  const int block = static_cast<int>(blockIdx.x) / panels / a.parts, column0 = panel * 16 * G;
  const int64_t bat0 = int64_t{block} * a.r * a.r;
  for (int n = threadIdx.x; n < fragments; n += kThreads) {
    const int l = n % 32, t = n / 32 % (2 * G), s = n / (64 * G);
    const int c = 16 * s + 4 * (l % 4), e = column0 + 16 * (t / 2) + 4 * (l / 8) + 2 * (t % 2) + l / 4 % 2;
    float v[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) v[m] = load_any<float>(a.bat, bat0 + int64_t{c + m} * a.r + e, a.bat_dtype);
    uint32_t first[Q], second[Q];
    split(v[0], v[1], first);
    split(v[2], v[3], second);
    shared[n] = make_uint4(first[0], second[0], first[1], second[1]);
    if constexpr (Q == 3) third[n] = make_uint2(first[2], second[2]);
  }
  __syncthreads();  // the only barrier: from here on each warp is on its own
  const int pairs = (a.others + 1) / 2, items = a.r / 16 * pairs, last = min_of((part + 1) * a.share, items);
  for (int item = part * a.share + threadIdx.x / 32; item < last; item += kWarps) {
    const int row0 = item / pairs * 16, other0 = item % pairs * 2;
    const bool two = other0 + 1 < a.others;
    float c[2][2 * G][4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t at = bat0 + int64_t{row0 + 8 * h + i} * a.r + column0 + 16 * g + 4 * q + e;
          c[0][2 * g + e / 2][2 * h + e % 2] = c[1][2 * g + e / 2][2 * h + e % 2] = load_any<float>(a.bat, at, a.bat_dtype);
        }
    Four<T> W[2][2][G];
    for (int turn = 1; turn <= panels; ++turn) {
      const int from = (panel + turn) % panels;
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int other = other0 + (two ? m : 0);
          const T* p = a.weight + a.row(block, other, row0 + 8 * h + i) * a.weight_row + a.column(block, other) + from * 16 * G + 4 * q;
#pragma unroll
          for (int g = 0; g < G; ++g) W[m][h][g].load(p + 16 * g);
        }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        uint32_t rows16[2][kParts<T>][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t w[2][kParts<T>];
            W[m][h][g].words(w);
#pragma unroll
            for (int p = 0; p < kParts<T>; ++p) rows16[m][p][h] = w[0][p], rows16[m][p][2 + h] = w[1][p];
          }
#pragma unroll
        for (int t = 0; t < 2 * G; ++t) {
          const int at = ((from * G + g) * 2 * G + t) * 32 + lane;
          const uint4 raw = shared[at];
          uint32_t b[Q][2] = {{raw.x, raw.y}, {raw.z, raw.w}};
          if constexpr (Q == 3) b[2][0] = third[at].x, b[2][1] = third[at].y;
          multiply(c[0][t], rows16[0], b);
          multiply(c[1][t], rows16[1], b);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m == 1 && !two) break;
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int g = 0; g < G; ++g) {
          float v[4], w[4];
          W[m][h][g].values(w);
#pragma unroll
          for (int e = 0; e < 4; ++e) v[e] = c[m][2 * g + e / 2][2 * h + e % 2] + (a.delta ? 0.f : w[e]);
          const int64_t row = a.row(block, other0 + m, row0 + 8 * h + i);
          store_four(a.out + row * a.out_stride + a.column(block, other0 + m) + column0 + 16 * g + 4 * q, v);
        }
    }
  }
}

// Any r, strides and alignment: N columns of bat, and as many rows as give a thread 4 x 4. 16 columns of W at a time.
template <class T, class O, int N> __global__ void __launch_bounds__(kThreads, 2) weight_fma(Weight<T, O> a) {
  using A = acc_t<T>;
  constexpr int kDeep = 16, kAcross = N / 4, kRows = kThreads / kAcross * 4;
  __shared__ __align__(16) A W[kDeep][kRows + 4];  // [column, row]
  __shared__ __align__(16) A B[kDeep][N + 4];      // [row, column]
  const int panels = (a.r + N - 1) / N, panel = static_cast<int>(blockIdx.x) % panels;
  const int part = static_cast<int>(blockIdx.x) / panels % a.parts, block = static_cast<int>(blockIdx.x) / panels / a.parts;
  const int column0 = panel * N, my_row = threadIdx.x / kAcross * 4, my_column = threadIdx.x % kAcross * 4;
  const int64_t rows = int64_t{a.r} * a.others, row0 = int64_t{part} * kRows, bat0 = int64_t{block} * a.r * a.r;
  const auto element = [&](int64_t n, int column) {  // of row n = i * others + other
    const int row = static_cast<int>(n / a.others), other = static_cast<int>(n % a.others);
    return value(a.weight[a.row(block, other, row) * a.weight_row + (a.column(block, other) + column) * a.weight_column]);
  };
  A c[4][4] = {};
  for (int c0 = 0; c0 < a.r; c0 += kDeep) {
    __syncthreads();  // the previous columns have been used
    for (int n = threadIdx.x; n < kRows * kDeep; n += kThreads) {
      const int line = n / kDeep, p = n % kDeep;
      W[p][line] = row0 + line < rows && c0 + p < a.r ? element(row0 + line, c0 + p) : A(0);
    }
    for (int n = threadIdx.x; n < N * kDeep; n += kThreads) {
      const int line = n / N, e = n % N;
      const bool inside = c0 + line < a.r && column0 + e < a.r;
      B[line][e] = inside ? load_any<A>(a.bat, bat0 + int64_t{c0 + line} * a.r + column0 + e, a.bat_dtype) : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int p = 0; p < kDeep; ++p)
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][e] += W[p][my_row + m] * B[p][my_column + e];
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int64_t n = row0 + my_row + m;
    if (n >= rows) break;
    const int row = static_cast<int>(n / a.others), other = static_cast<int>(n % a.others);
    O* to = a.out + a.row(block, other, row) * a.out_stride + a.column(block, other);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = column0 + my_column + e;
      if (column >= a.r) break;
      const A v = c[m][e] + load_any<A>(a.bat, bat0 + int64_t{row} * a.r + column, a.bat_dtype);
      to[column] = rounded<O>(a.delta ? v : v + element(n, column));
    }
  }
}

template <class T, class O> cudaError_t launch_weight(const BatWeight& from, cudaStream_t stream) {
  Weight<T, O> a{};
  a.weight = static_cast<const T*>(from.weight), a.bat = from.bat, a.out = static_cast<O*>(from.out);
  a.weight_row = from.weight_strides[0], a.weight_column = from.weight_strides[1], a.out_stride = from.out_stride;
  a.r = static_cast<int>(from.r), a.bat_dtype = from.bat_dtype, a.by_column = from.by_column, a.delta = from.delta;
  a.others = static_cast<int>((from.by_column ? from.rows : from.columns) / from.r);
  const int64_t blocks = (from.by_column ? from.columns : from.rows) / from.r;
  if constexpr (kMatrixUnits<T>) {
    const bool aligned_out = reinterpret_cast<uintptr_t>(from.out) % (4 * sizeof(O)) == 0 && from.out_stride % 4 == 0;
    const int64_t tile = block_tile_of(from.r), shared = from.r * tile * 2 * kWeightParts<O>;
    if (from.r % 16 == 0 && shared <= 96 * 1024 && aligned_fours(from.weight, from.weight_strides, sizeof(T)) && aligned_out) {
      const int64_t panels = from.r / tile, items = from.r / 16 * ceil_div(a.others, 2);
      const int64_t most = ceil_div(items, 2 * kWarps);  // two turns of each warp at least, for what it costs to keep bat
      a.parts = static_cast<int>(min_of(ceil_div(264, blocks * panels), most));
      a.share = static_cast<int>(ceil_div(items, a.parts));
      const auto kernel = tile == 64 ? weight_mma<T, O, 4> : tile == 32 ? weight_mma<T, O, 2> : weight_mma<T, O, 1>;
      return enqueue(kernel, blocks * panels * a.parts, kThreads, shared, stream, a);
    }
  }
  const bool narrow = from.r <= 16;
  a.parts = static_cast<int>(ceil_div(from.r * a.others, narrow ? 256 : 64));
  const auto kernel = narrow ? weight_fma<T, O, 16> : weight_fma<T, O, 64>;
  return enqueue(kernel, blocks * a.parts * (narrow ? 1 : ceil_div(from.r, 64)), kThreads, 0, stream, a);
}

}  // namespace

cudaError_t bat_weight(const BatWeight& a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return cudaSuccess;
  if (a.rows > kMaxColumns || a.columns > kMaxColumns || a.r > kMaxBlock) return cudaErrorInvalidValue;
  return for_dtype(a.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    return a.out_dtype == a.dtype ? launch_weight<T, T>(a, stream) : launch_weight<T, acc_t<T>>(a, stream);
  });
}

}  // namespace spectral_ops::cuda
