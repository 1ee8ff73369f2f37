// bat_weight_ (METHODS 1.4). d = k = 4096, r = 64, bf16, at 3.0 TB/s: W' moves 68 MB, 24 us, for 4 GFLOP. Predicted, not
// measured.
#include "bat.cuh"

#include <utility>

namespace spectral_ops::cuda {

namespace {

template <class O> __device__ __forceinline__ void store_four(O* p, const float (&v)[4]) {
  if constexpr (sizeof(O) == 2) *reinterpret_cast<uint2*>(p) = make_uint2(pair_of<O>(v[0], v[1]), pair_of<O>(v[2], v[3]));
  else *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}

constexpr int kWeightThreads = 32 * kWeightWarps;  // of weight_mma: what its registers leave room for twice
template <class O> constexpr int kWeightParts = sizeof(O) == 2 ? 2 : 3;  // of bat

template <class T, class O> struct Weight {
  const T* weight;
  const void* bat;
  O* out;
  int64_t weight_row, weight_column, out_row;
  int64_t block_in, other_in, block_out, other_out;  // from a block of bat, or of those of W that it meets, to the next
  int r;
  int others;  // blocks of W that meet one block of bat
  int groups;  // of them, in weight_mma
  int items;   // of all blocks of bat, in weight_mma
  int parts;   // thread blocks that share the items, or the rows that meet one block of bat
  DType bat_dtype;
  bool delta;
};

template <class F> __device__ __forceinline__ void with_type(const void* p, DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f(static_cast<const double*>(p));
    case DType::float32: return f(static_cast<const float*>(p));
    case DType::bfloat16: return f(static_cast<const bfloat16*>(p));
    default: return f(static_cast<const float16*>(p));
  }
}

// A thread block keeps r x 16 G of a block of bat as fragments, of one block after another. A warp's item is 16 rows of M blocks
// of W: 2 KB where G columns are in one panel. Each piece of W gives way to the next item's as soon as it is a fragment.
template <class T, class O, int G>
__global__ void __launch_bounds__(kWeightThreads, kParts<T> + kWeightParts<O> == 5 && G == 1 ? 1 : 2) weight_mma(Weight<T, O> a) {
  constexpr int P = kParts<T>, Q = kWeightParts<O>, M = 4 / G;
  const int lane = threadIdx.x % 32, i = lane / 4, q = lane % 4, panels = a.r / (16 * G);
  const unsigned groups = a.groups, items = a.r / 16 * groups;
  uint4* shared = reinterpret_cast<uint4*>(dynamic_shared());         // [r / 16, 2 G, 32]: two parts of a lane's fragment
  uint2* third = reinterpret_cast<uint2*>(shared + a.r / 16 * G * 64);  // the third, where there is one
  const int panel = static_cast<int>(blockIdx.x) % panels, part = static_cast<int>(blockIdx.x) / panels, column0 = panel * 16 * G;
  const int first = static_cast<int>(int64_t{part} * a.items / a.parts);
  const int last = static_cast<int>(int64_t{part + 1} * a.items / a.parts);
  uint32_t left[1][4], right[2][2];  // the unit matrix, as either factor: adds bat itself, and W
#pragma unroll
  for (int n = 0; n < 4; ++n) left[0][n] = unit_at(i + 8 * (n % 2), 4 * q + 2 * (n / 2));
#pragma unroll
  for (int n = 0; n < 4; ++n) right[n / 2][n % 2] = unit_at(4 * (i / 2) + 2 * (n / 2) + i % 2, 4 * q + 2 * (n % 2));

  Four<T> W[M][2][G];
  const T* from[M];  // of the next loads
  const auto seek = [&](unsigned item) {
    const unsigned rest = item % items, other = rest % groups * M;
    const T* p = a.weight + item / items * a.block_in + other * a.other_in + (rest / groups * 16 + i) * a.weight_row + 4 * q;
#pragma unroll
    for (int m = 0; m < M; ++m) from[m] = p + (other + m < static_cast<unsigned>(a.others) ? m : 0) * a.other_in;
  };
  const auto load = [&](int g) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) W[m][h][g].load(from[m] + 8 * h * a.weight_row + 16 * g);
  };
  int item = first + threadIdx.x / 32;
  if (item < last) {
    seek(item);
#pragma unroll
    for (int g = 0; g < G; ++g) load(g);
  }
  for (int block = first / items; int64_t{block} * items < last; ++block) {
    __syncthreads();  // the previous fragments have been used
    for (int n = threadIdx.x; n < a.r * G; n += kWeightThreads) {
      const int line = n % 4, four = n / 4 % (4 * G), s = n / (16 * G);
      const int64_t at = (int64_t{block} * a.r + 16 * s + 4 * line) * a.r + column0 + 4 * four;
      float v[4][4];
      with_type(a.bat, a.bat_dtype, [&](const auto* bat) {
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) v[m][e] = static_cast<float>(value(bat[at + m * a.r + e]));
      });
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int to = (s * 2 * G + four / 4 * 2 + e / 2) * 32 + four % 4 * 8 + e % 2 * 4 + line;
        uint32_t low[Q], high[Q];
        split(v[0][e], v[1][e], low);
        split(v[2][e], v[3][e], high);
        shared[to] = make_uint4(low[0], high[0], low[1], high[1]);
        if constexpr (Q == 3) third[to] = make_uint2(low[2], high[2]);
      }
    }
    __syncthreads();
    const auto fragment = [&](int s, int t, uint32_t (&b)[Q][2]) {
      const int at = (s * 2 * G + t) * 32 + lane;
      const uint4 raw = shared[at];
      b[0][0] = raw.x, b[0][1] = raw.y, b[1][0] = raw.z, b[1][1] = raw.w;
      if constexpr (Q == 3) b[2][0] = third[at].x, b[2][1] = third[at].y;
    };
    const int end = static_cast<int>(min_of(int64_t{block + 1} * items, int64_t{last}));
    for (; item < end; item += kWeightWarps) {
      const int sixteen = (item - block * items) / groups, other = (item - block * items) % groups * M;
      float c[M][2 * G][4] = {};
#pragma unroll
      for (int t = 0; t < 2 * G; ++t) {
        uint32_t b[Q][2];
        fragment(sixteen, t, b);
        multiply(c[0][t], left, b);
#pragma unroll
        for (int m = 1; m < M; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[m][t][e] = c[0][t][e];
      }
      for (int turn = 0; turn < panels; ++turn) {
        const bool more = turn + 1 < panels || item + kWeightWarps < last;
        if (turn + 1 < panels) {
#pragma unroll
          for (int m = 0; m < M; ++m) from[m] += 16 * G;
        } else if (more) {
          seek(item + kWeightWarps);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
          uint32_t rows16[M][P][4];
#pragma unroll
          for (int m = 0; m < M; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              uint32_t w[2][P];
              W[m][h][g].words(w);
#pragma unroll
              for (int p = 0; p < P; ++p) rows16[m][p][h] = w[0][p], rows16[m][p][2 + h] = w[1][p];
            }
          if (more) load(g);
#pragma unroll
          for (int t = 0; t < 2 * G; ++t) {
            uint32_t b[Q][2];
            fragment(turn * G + g, t, b);
#pragma unroll
            for (int m = 0; m < M; ++m) multiply(c[m][t], rows16[m], b);
          }
          if (turn == panel && !a.delta)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
              for (int t = 0; t < 2; ++t)
#pragma unroll
                for (int p = 0; p < P; ++p) mma<bfloat16>(c[m][2 * g + t], rows16[m][p], right[t]);
        }
      }
      O* to = a.out + block * a.block_out + other * a.other_out + (sixteen * 16 + i) * a.out_row + column0 + 4 * q;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (other + m >= a.others) break;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int g = 0; g < G; ++g) {
            float v[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] = c[m][2 * g + e / 2][2 * h + e % 2];
            store_four(to + m * a.other_out + 8 * h * a.out_row + 16 * g, v);
          }
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
    return value(a.weight[block * a.block_in + other * a.other_in + row * a.weight_row + column * a.weight_column]);
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
    O* to = a.out + block * a.block_out + other * a.other_out + row * a.out_row;
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
  a.weight_row = from.weight_strides[0], a.weight_column = from.weight_strides[1], a.out_row = from.out_stride;
  a.block_in = from.r * a.weight_row, a.other_in = from.r * a.weight_column;
  a.block_out = from.r * a.out_row, a.other_out = from.r;
  if (from.by_column) std::swap(a.block_in, a.other_in), std::swap(a.block_out, a.other_out);
  a.r = static_cast<int>(from.r), a.bat_dtype = from.bat_dtype, a.delta = from.delta;
  a.others = static_cast<int>((from.by_column ? from.rows : from.columns) / from.r);
  const int64_t blocks = (from.by_column ? from.columns : from.rows) / from.r;
  if constexpr (kMatrixUnits<T>) {
    const bool aligned_out = reinterpret_cast<uintptr_t>(from.out) % (4 * sizeof(O)) == 0 && from.out_stride % 4 == 0;
    const WeightPlan plan = weight_plan(blocks, a.others, from.r, kWeightParts<O>);
    if (plan.matrix_units && aligned_fours(from.weight, from.weight_strides, sizeof(T)) && aligned_out) {
      a.groups = static_cast<int>(plan.groups), a.items = static_cast<int>(plan.items), a.parts = static_cast<int>(plan.parts);
      const auto kernel = plan.tile == 64 ? weight_mma<T, O, 4> : plan.tile == 32 ? weight_mma<T, O, 2> : weight_mma<T, O, 1>;
      return enqueue(kernel, plan.panels * plan.parts, kWeightThreads, plan.shared, stream, a);
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
