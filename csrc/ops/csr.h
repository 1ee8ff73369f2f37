// csr_scatter_, csr_gather_, csr_spmm_ and csr_sddmm: their kernels' arguments, free of torch, and their host side for any
// device.
//
// A sparse matrix [d, k], or n rows of one: row o holds entries [row_offsets[o], row_offsets[o + 1]), entry p is in
// columns[p], ascending and unique within a row. nnz entries of columns, values and out; those before row_offsets[0] and
// from row_offsets[n] on belong to other rows.
#pragma once

#include "../kernels.h"
#ifdef SPECTRAL_OPS_HOST
#include "../ops.h"
#endif

namespace spectral_ops {

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

namespace cpu {
SPECTRAL_OPS_CPU_KERNEL(csr_scatter, CsrScatter)
SPECTRAL_OPS_CPU_KERNEL(csr_gather, CsrGather)
}  // namespace cpu

namespace cuda {
SPECTRAL_OPS_CUDA_KERNEL(csr_scatter, CsrScatter)
SPECTRAL_OPS_CUDA_KERNEL(csr_gather, CsrGather)
SPECTRAL_OPS_CUDA_KERNEL(csr_spmm, CsrSpmm)
SPECTRAL_OPS_CUDA_KERNEL(csr_sddmm, CsrSddmm)
}  // namespace cuda

#ifdef SPECTRAL_OPS_HOST

// On the CPU no index may lead outside its tensor. The order and uniqueness of columns CSR.validate() has checked.
inline void check_range(const char* name, const int32_t* index, int64_t count, int64_t end) {
  bool outside = false;  // one pass, without a branch, over what the kernel reads next
  for (int64_t p = 0; p < count; ++p) outside |= static_cast<uint32_t>(index[p]) >= static_cast<uint64_t>(end);
  STD_TORCH_CHECK(!outside, name, ": got an index outside 0 to ", end - 1);
}

// The pattern of `rows` rows of k columns; part: of a larger matrix, whose other entries the offsets leave out.
template <class Arguments>
void set_pattern(Arguments& a, const Tensor& row_offsets, const Tensor& columns, int64_t rows, int64_t k, bool part,
                 const Tensor& like) {
  STD_TORCH_CHECK(columns.dim() == 1, "columns: got ", columns.dim(), " dimensions, wanted a vector");
  a.k = k, a.nnz = columns.size(0);
  a.row_offsets = index_data<int32_t>("row_offsets", row_offsets, rows + 1, like);
  a.columns = index_data<int32_t>("columns", columns, a.nnz, like);
  if (!like.is_cpu()) return;  // on a GPU reading them would wait for it
  const int64_t first = a.row_offsets[0], last = a.row_offsets[rows];
  STD_TORCH_CHECK(part ? first >= 0 && last <= a.nnz : first == 0 && last == a.nnz, "row_offsets: got a range of ", first,
                  " to ", last, ", wanted ", part ? "one within 0 to " : "0 to ", a.nnz);
  bool decreases = false;
  for (int64_t o = 0; o < rows; ++o) decreases |= a.row_offsets[o + 1] < a.row_offsets[o];
  STD_TORCH_CHECK(!decreases, "row_offsets: decreases");
  check_range("columns", a.columns + first, last - first, k);
}

template <class Device>
void csr_scatter_(Tensor out, Tensor values, Tensor row_offsets, Tensor columns, bool accumulate) {
  check_matrix("out", out);
  check_written_once("out", out);
  CsrScatter a{};
  a.d = out.size(0);
  a.dtype = dtype_of("out", out);
  set_pattern(a, row_offsets, columns, a.d, out.size(1), false, out);
  std::optional<Tensor> entries = values;
  a.values = vector_data("values", entries, a.nnz, out, a.values_dtype);
  a.out = out.data_ptr();
  a.out_strides[0] = out.stride(0), a.out_strides[1] = out.stride(1);
  a.accumulate = accumulate;
  Device::launch(a, out);
}

template <class Device>
void csr_gather_(Tensor out, Tensor dense, Tensor row_offsets, Tensor columns) {
  check_matrix("dense", dense);
  check_written_once("out", out);
  CsrGather a{};
  a.n = dense.size(0);
  a.dense_dtype = dtype_of("dense", dense);
  set_pattern(a, row_offsets, columns, a.n, dense.size(1), true, dense);
  std::optional<Tensor> target = out;
  a.out = const_cast<void*>(vector_data("out", target, a.nnz, dense, a.dtype));
  a.dense = dense.data_ptr();
  a.dense_strides[0] = dense.stride(0), a.dense_strides[1] = dense.stride(1);
  Device::launch(a, dense);
  if (!out.is_contiguous()) torch::stable::copy_(out, *target);
}

template <class Device>
void csr_spmm_(Tensor out, Tensor x, Tensor values, Tensor row_offsets, Tensor columns, std::optional<Tensor> permutation) {
  check_matrix("out", out);
  check_matrix("x", x);
  check_written_once("out", out);
  CsrSpmm a{};
  a.T = out.size(0), a.d = out.size(1);
  a.dtype = dtype_of("out", out);
  x = checked_factor("x", x, a.T, x.size(1), out, "out");
  set_pattern(a, row_offsets, columns, a.d, x.size(1), false, out);
  std::optional<Tensor> entries = values;
  a.values = vector_data("values", entries, a.nnz, out, a.values_dtype);
  a.permutation = index_data<int32_t>("permutation", permutation, a.nnz, out);
  if (a.permutation && out.is_cpu()) check_range("permutation", a.permutation, a.nnz, a.nnz);
  Tensor target = rows_of(out);
  a.out = target.data_ptr(), a.x = x.data_ptr();
  a.out_stride = target.stride(0), a.x_stride = x.stride(0);
  Device::launch(a, out);
  if (!unit_inner_stride(out)) torch::stable::copy_(out, target);
}

template <class Device> Tensor csr_sddmm(Tensor dy, Tensor x, Tensor row_offsets, Tensor columns) {
  check_matrix("dy", dy);
  check_matrix("x", x);
  CsrSddmm a{};
  a.T = dy.size(0), a.d = dy.size(1);
  a.dtype = dtype_of("dy", dy);
  x = checked_factor("x", x, a.T, x.size(1), dy, "dy");
  dy = rows_of(dy);
  set_pattern(a, row_offsets, columns, a.d, x.size(1), false, dy);
  Tensor out = empty(dy, {a.nnz}, accumulate_type(dy));
  a.dy = dy.data_ptr(), a.x = x.data_ptr(), a.out = out.data_ptr();
  a.dy_stride = dy.stride(0), a.x_stride = x.stride(0);
  Device::launch(a, dy);
  return out;
}

template <class Device> void bind_csr(Bindings& rows) {
  if constexpr (has_kernel<Device, CsrScatter>) rows.mutating<&csr_scatter_<Device>>("csr_scatter_");
  if constexpr (has_kernel<Device, CsrGather>) rows.mutating<&csr_gather_<Device>>("csr_gather_");
  if constexpr (has_kernel<Device, CsrSpmm>) rows.mutating<&csr_spmm_<Device>>("csr_spmm_");
  if constexpr (has_kernel<Device, CsrSddmm>) rows.add<&csr_sddmm<Device>>("csr_sddmm");
}

#endif

}  // namespace spectral_ops
