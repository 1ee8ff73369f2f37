// Memory for what lives inside one call of a layer's operator: Bat's W', W + S, tiles of a weight gradient.
#pragma once

#include <atomic>
#include <memory>

#include "../ops/transpose.h"
#include "library.h"

namespace spectral_ops {

// Fresh memory on a CPU is paid for page by page, in every call. So one buffer is kept there, as large as the largest lease
// so far; a lease of more than kLimit bytes, or taken while the buffer is leased (by another thread, or inside another
// lease), gets memory of its own. On a GPU torch's allocator keeps memory by itself.
class Scratch {
 public:
  static constexpr int64_t kLimit = int64_t{1} << 30;

  static Scratch& instance() {
    static Scratch* scratch = new Scratch;  // never freed: torch may be gone before static destructors run
    return *scratch;
  }

  int64_t bytes() const { return bytes_; }

  // Gives the buffer back, unless it is leased at this moment.
  void release() {
    if (const Hold hold = take()) drop();
  }

 private:
  friend class Lease;
  struct GiveBack {
    void operator()(Scratch* scratch) const { scratch->leased_ = false; }
  };
  using Hold = std::unique_ptr<Scratch, GiveBack>;

  // The buffer for as long as the result lives; null where somebody else has it. No lock: a process that forks while
  // another thread has one would never get it again.
  Hold take() { return Hold(leased_.exchange(true) ? nullptr : this); }

  void drop() { bytes_ = 0, buffer_.reset(); }

  void* data(const Tensor& like, int64_t bytes) {
    if (!buffer_ || bytes_ < bytes) {
      drop();  // before its successor is allocated
      buffer_ = empty(like, {at_least(bytes, 1)}, ScalarType::Byte);
      bytes_ = bytes;
    }
    return buffer_->data_ptr();
  }

  std::atomic<bool> leased_{false};
  std::atomic<int64_t> bytes_{0};
  MaybeTensor buffer_;
};

// An uninitialised contiguous matrix, the caller's while this lives; on a GPU: for what is enqueued on its stream meanwhile.
class Lease {
 public:
  Lease(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
    const int64_t bytes = rows * columns * size_of(dtype);
    if (like.is_cpu() && bytes <= Scratch::kLimit) hold_ = Scratch::instance().take();
    if (!hold_) {
      memory_ = empty(like, {rows, columns}, dtype);
      return;
    }
    const int64_t sizes[] = {rows, columns}, strides[] = {at_least(columns, 1), 1};
    AtenTensorHandle made = nullptr;
    check_call(aoti_torch_create_tensor_from_blob(hold_->data(like, bytes), 2, sizes, strides, 0, dtype_code(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &made),
               "torch.from_blob");
    memory_ = Tensor(made);
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  const Tensor& tensor() const { return *memory_; }

 private:
  static int64_t size_of(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Double: return 8;
      case ScalarType::Float: return 4;
      case ScalarType::BFloat16:
      case ScalarType::Half: return 2;
      default: STD_TORCH_CHECK(false, "got scalar type ", static_cast<int>(dtype), ", wanted a floating one");
    }
  }

  Scratch::Hold hold_;  // given back last
  MaybeTensor memory_;
};

// Rows [start, start + n) of dyᵀx tile by tile: f(start, G [n, k]), n a multiple of `multiple`; as common.gradient_tiles.
template <class Device, class F>
void gradient_tiles(const Tensor& dy, const Tensor& x, int64_t multiple, const F& f) {
  const bool cpu = x.is_cpu();
  const int64_t d = dy.size(1), T = x.size(0), k = x.size(1), most = cpu ? 1024 : 2048;
  const int64_t whole = at_least(most / multiple, 1) * multiple, rows = d < whole ? d : whole;
  const ScalarType dtype = cpu ? x.scalar_type() : accumulate_type(x);
  // On the CPU several threads read dyᵀ in bfloat16 faster from a copy, the copy included.
  const bool turned = cpu && T > 1 && x.scalar_type() == ScalarType::BFloat16;
  const Lease lease(x, 1, rows * (k + (turned ? T : 0)), dtype);
  const Tensor& memory = lease.tensor();
  for (int64_t start = 0; start < d; start += rows) {
    const int64_t n = d - start < rows ? d - start : rows;
    const Tensor part = n < d ? columns_of(dy, start, n) : dy, G = part_of(memory, 0, n, k);
    Tensor factor = transposed(part);
    if (turned) {
      factor = part_of(memory, rows * k, n, T);
      if constexpr (has_kernel<Device, Transpose>) transpose_<Device>(factor, part);
      else torch::stable::copy_(factor, transposed(part));
    }
    if (dtype == x.scalar_type()) mm_out<Device>(G, factor, x);
    else call("aten::mm", "dtype_out", factor, x, dtype, G);
    f(start, G);
  }
}

}  // namespace spectral_ops
