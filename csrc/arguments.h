// The arguments of every kernel, free of torch: what the host side (csrc/ops/) fills and csrc/cpu and csrc/cuda read.
#pragma once

#include <cstdint>

namespace spectral_ops {

enum class DType : int32_t { float64, float32, bfloat16, float16 };

// h [rows, r] = sums of drop(x) over shards, x [rows, columns]; both with unit inner stride.
// offsets [r + 1], or null for the cyclic map; seed [1], or null without dropout; both live where x lives.
struct BlockSum {
  const void* x;
  void* h;
  const int32_t* offsets;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t x_stride, h_stride;  // elements between rows
  DType dtype;                 // of x and h
};

// out [rows, columns] gets (accumulate: is increased by) mask * s[:, shard(i)], s [rows, r]; unit inner strides.
struct BlockTile {
  void* out;
  const void* s;
  const int32_t* offsets;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t out_stride, s_stride;  // elements between rows
  DType dtype, s_dtype;          // of out, of s
  bool accumulate;
};

// out [rows, columns] becomes g * (out + scale h Bᵀ) + shift, h [rows, r], B [columns, r]; unit inner strides.
struct LowRankUpdate {
  void* out;
  const void *h, *B;
  const void *g, *shift;  // [columns] float32 (float64 for float64), or null
  double scale;
  int64_t rows, columns, r;
  int64_t out_stride, h_stride, B_stride;
  DType dtype;  // of out, h and B
};

// One pass over dy [rows, columns] (and y, where given); a null output is not wanted. Unit inner strides.
// u [rows, r] = scale (g * dy) B, gdy [rows, columns] = g * dy, in dtype and contiguous; dB [columns, r] =
// scale (g * dy)ᵀ h, db [columns] = Σ dy, dyz [columns] = Σ dy * (y - bias), contiguous in float32 (float64 for float64).
struct LowRankBackward {
  const void *dy, *h, *B;
  const void *g, *y, *bias;  // or null
  void *u, *dB, *db, *dyz, *gdy;
  void* workspace;  // CUDA: backward_plan(...).bytes of partial sums
  double scale;
  int64_t rows, columns, r;
  int64_t dy_stride, h_stride, B_stride, y_stride;
  DType dtype, g_dtype, bias_dtype;  // dtype: of dy, h, B and y
};

// norm [rows] = ‖weight_o + scale (B A)_o‖ in float32 (float64 for float64); A [r, columns], B [rows, r].
struct ColumnNorm {
  const void *weight, *A, *B;
  void* norm;
  int64_t* stamp;  // [2] fingerprint of A and B, or null where nothing is cached
  void* workspace;  // CUDA: norm_plan(...).bytes
  double scale;
  int64_t rows, columns, r;
  int64_t weight_strides[2], A_strides[2], B_strides[2];
  DType dtype, A_dtype, B_dtype;  // dtype: of weight
  bool force;                     // recompute even if the fingerprint is the stamp
};

// dm [columns] = dyz / (g norm), or where |g| < vanishing_g, or |g| norm < |bias| / vanishing_bias,
// Σ_t dy (x·weight_o + scale h·B_o) / norm. dy [rows, columns], x [rows, k], h [rows, r], B [columns, r] with unit inner strides.
struct MagnitudeGrad {
  const void *dyz, *g, *norm;  // [columns] float32 (float64 for float64)
  const void *dy, *x, *h, *weight, *B;
  const void* bias;  // or null
  void* dm;
  double scale, vanishing_g, vanishing_bias;
  int64_t rows, columns, k, r;
  int64_t dy_stride, x_stride, h_stride, B_stride;
  int64_t weight_strides[2];
  DType dtype, bias_dtype;  // dtype: of dy, x, h, weight and B
};

// Products with drop(x), unit inner strides; x, A [r, columns], u and out in dtype.
// h [rows, r] = drop(x) Aᵀ, contiguous in dtype.
struct DropoutProject {
  const void *x, *A;
  void* h;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t x_stride, A_stride;
  DType dtype;
};

// dA [r, columns] = uᵀ drop(x), u [rows, r]; contiguous in float32 (float64 for float64).
struct DropoutOuter {
  const void *u, *x;
  void* dA;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t u_stride, x_stride;
  DType dtype;
};

// out [rows, columns] += drop(u A)
struct DropoutLift {
  void* out;
  const void *u, *A;
  const int64_t* seed;
  double p;
  int64_t rows, columns, r;
  int64_t out_stride, u_stride, A_stride;
  DType dtype;
};

// out [rows, columns] = drop(x), contiguous.
struct SeededDropout {
  const void* x;
  void* out;
  const int64_t* seed;
  double p;
  int64_t rows, columns, x_stride;
  DType dtype;
};

// A sparse matrix [d, k], or n rows of one: row o holds entries [row_offsets[o], row_offsets[o + 1]), entry p is in
// columns[p], ascending and unique within a row. nnz entries of columns, values and out; those before row_offsets[0] and
// from row_offsets[n] on belong to other rows.

// out [d, k] at the pattern becomes values (accumulate: out + values, in at least float32), rounded once.
struct CsrScatter {
  void* out;
  const void* values;  // [nnz], unit stride
  const int32_t *row_offsets, *columns;
  int64_t d, k, nnz;
  int64_t out_strides[2];
  DType dtype, values_dtype;  // of out, of values
  bool accumulate;
};

// out [nnz] gets dense [n, k] at the entries of n rows; other entries stay as they are.
struct CsrGather {
  void* out;  // unit stride
  const void* dense;
  const int32_t *row_offsets, *columns;
  int64_t n, k, nnz;
  int64_t dense_strides[2];
  DType dtype, dense_dtype;  // of out, of dense
};

// out [T, d] += x Sᵀ, x [T, k], summed in float32 (float64 for float64) and rounded once; unit inner strides.
// Entry p has the value values[permutation[p]], or values[p] where that is null.
struct CsrSpmm {
  void* out;
  const void *x, *values;
  const int32_t *row_offsets, *columns, *permutation;
  void* workspace;  // CUDA
  int64_t T, d, k, nnz;
  int64_t out_stride, x_stride;  // elements between rows
  DType dtype, values_dtype;     // dtype: of out and x
};

// out [nnz] = (dyᵀ x) at the pattern, in float32 (float64 for float64); dy [T, d], x [T, k] with unit inner strides.
struct CsrSddmm {
  const void *dy, *x;
  const int32_t *row_offsets, *columns;
  void* out;
  void* workspace;  // CUDA
  int64_t T, d, k, nnz;
  int64_t dy_stride, x_stride;
  DType dtype;  // of dy and x
};

// --- bat: blocks are r x r, r divides rows and columns; bat [n, r, r] is contiguous, block i from bat + i r r ---

// out [rows, columns] = W' of weight (delta: W' - W); W(o,j) meets block o of bat, n = rows / r, or with by_column block j,
// n = columns / r. out has unit inner stride.
struct BatWeight {
  const void *weight, *bat;
  void* out;
  int64_t rows, columns, r;
  int64_t weight_strides[2], out_stride;
  DType dtype, bat_dtype, out_dtype;  // dtype: of weight; out_dtype: that, or its accumulator
  bool by_column, delta;
};

// out [T, rows] = x W'ᵀ, x [T, columns] (transpose: out [T, columns] = x W', x [T, rows]); weight [rows, columns], block o of
// bat for block-row o. out is contiguous, x has unit inner stride; both in dtype.
struct BatMatmul {
  const void *x, *weight, *bat;
  void* out;
  void* workspace;  // CUDA: partial sums
  int64_t T, rows, columns, r;
  int64_t x_stride, weight_strides[2];
  DType dtype, bat_dtype;
  bool transpose;
};

// dB [rows / r, r, r] = Σ_j W(o,j)ᵀ G(o,j) + G(o,j), contiguous in float32 (float64 for float64). G [rows, columns] has unit
// inner stride.
struct BatContract {
  const void *weight, *G;
  void* dB;
  void* workspace;  // CUDA: partial sums
  int64_t rows, columns, r;
  int64_t weight_strides[2], G_stride;
  DType dtype, G_dtype;  // G_dtype: weight's dtype, or dB's
};

// z [rows, columns], z_j = x_j + x_j C_jᵀ, and s [rows, r] = Σ_j x_j C_jᵀ, contiguous in x's dtype; bat: C [columns / r, r, r].
struct BatMix {
  const void *x, *bat;
  void *z, *s;
  void* workspace;  // CUDA: partial sums
  int64_t rows, columns, r;
  int64_t x_stride;
  DType dtype, bat_dtype;
};

// With v_j = g_j + q: g_j becomes g_j + v_j C_j (need_g), and dC [columns / r, r, r], dC_j = v_jᵀ x_j, contiguous in float32
// (float64 for float64), or null. g, x [rows, columns] and q [rows, r] have unit inner strides.
struct BatMixBackward {
  void* g;
  const void *q, *x, *bat;
  void* dC;
  void* workspace;  // CUDA: partial sums
  int64_t rows, columns, r;
  int64_t g_stride, q_stride, x_stride;
  DType dtype, bat_dtype;
  bool need_g;
};

// --- policy: targets [rows], 0 <= target < columns, or ignore_index; else NaN ---

// logprob, logsumexp [rows] in float32 (float64 for float64) of scale * logits [rows, columns], unit inner stride.
struct TargetLogprob {
  const void* logits;
  const int64_t* targets;
  void *logprob, *logsumexp;
  double scale;
  int64_t rows, columns, logits_stride, ignore_index;
  DType dtype;  // of logits
};

// logits becomes scale * dlogp * (onehot - exp(scale * logits - logsumexp)); logsumexp, dlogp [rows] as above.
struct SoftmaxGradient {
  void* logits;
  const int64_t* targets;
  const void *logsumexp, *dlogp;
  double scale;
  int64_t rows, columns, logits_stride, ignore_index;
  DType dtype;  // of logits
};

// --- segments: adapter s has rows order[offsets[s]] to order[offsets[s + 1] - 1]; factors [n, ., .] have any strides ---

// h [rows, r] = x A_sᵀ, x [rows, columns], A [n, r, columns]; contiguous, zero for a row without adapter.
struct SegmentProject {
  const void *x, *A;
  void* h;
  const int64_t *order, *offsets;
  int64_t rows, columns, r, n;
  int64_t x_stride, A_strides[3];
  DType dtype;
};

// out [rows, columns] += h B_sᵀ, h [rows, r], B [n, columns, r].
struct SegmentLift {
  void* out;
  const void *h, *B;
  const int64_t *order, *offsets;
  int64_t rows, columns, r, n;
  int64_t out_stride, h_stride, B_strides[3];
  DType dtype;
};

// out [n, r, columns] = Σ u_tᵀ x_t over each adapter's rows, contiguous in float32 (float64 for float64).
struct SegmentOuter {
  const void *u, *x;
  void* out;
  const int64_t *order, *offsets;
  int64_t rows, columns, r, n;
  int64_t u_stride, x_stride;
  DType dtype;
};

// Row out_rows[t] of out becomes row x_rows[t] of x for every t < rows; null stands for t itself.
struct RowCopy {
  const void* x;
  void* out;
  const int64_t *x_rows, *out_rows;
  int64_t rows, bytes;
  int64_t x_stride, out_stride;  // bytes between rows
};

// --- cayley: contiguous matrices [n, r, r] ---

// Q = 2 (I + K)⁻¹ - I, K = (X - Xᵀ) / 2, in float32 (float64 for float64).
struct CayleyForward {
  const void* X;
  void* Q;
  int64_t n, r;
  DType dtype;  // of X
};

// dX = (V - Vᵀ) / 4, V = M Gᵀ M, M = I + Q; all float32 or float64.
struct CayleyBackward {
  const void *Q, *G;
  void* dX;
  int64_t n, r;
  DType dtype;
};

// --- transpose ---

// out [columns, rows] = xᵀ, x [rows, columns]; unit inner strides.
struct Transpose {
  const void* x;
  void* out;
  int64_t rows, columns;
  int64_t x_stride, out_stride;  // elements between rows
  DType dtype;
};

// --- importance ---

// A [rows_A, k], B [rows_B, r] and E [rows_E] of one layer and their gradients, contiguous: parts along the first dimension
// of tensors with r, d and r rows.
struct ImportanceLayer {
  const void *p[3], *g[3];
  DType dtypes[3];  // of p and g
  int64_t rows_A, k, rows_B, r, rows_E;
  int64_t offset;       // of A in exp_avg and uncertainty; B and E follow
  int64_t first;        // of its r scores
  int64_t row_A, row_E, d;
};

// exp_avg and uncertainty after one more step, and the scores of every triplet, or null; all float32 (float64 for float64).
struct ImportanceUpdate {
  const ImportanceLayer* layers;
  void *exp_avg, *uncertainty, *scores;
  double beta1, beta2;
  int64_t count;  // of layers
  DType dtype;    // of exp_avg, uncertainty and scores
};

}  // namespace spectral_ops
