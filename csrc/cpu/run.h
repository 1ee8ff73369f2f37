// Runs the CPU kernels of an operator's arguments on torch's threads: the plan, its workspace, its steps in order.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "../csr_plan.h"
#include "../ops.h"
#include "kernels.h"
#include "tiling.h"

namespace spectral_ops::cpu {

template <class Arguments> void in_parallel(const Arguments& a, int64_t tasks, int64_t grain) {
  const auto kernel = kernel_for(a);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Kernels whose tasks are rows.
template <class Arguments> void run(const Arguments& a, const Tensor&) {
  in_parallel(a, a.rows, grain_rows(a.columns, a.seed != nullptr));
}

inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

template <class Plan> Tensor lay_out(Plan& plan, const Tensor& like) {
  Plan counted = plan;
  Arena count{nullptr};
  counted.plan(count);
  Tensor memory = workspace(like, count.used);
  Arena arena{static_cast<char*>(memory.data_ptr())};
  plan.plan(arena);
  return memory;
}

// Tasks a thread takes at least, where all of them do `work` multiply-adds: few enough to pay for waking it.
inline int64_t grain_of(int64_t tasks, int64_t work) {
  constexpr int64_t kWork = 1 << 18;
  return work <= kWork ? at_least_one(tasks) : at_least_one(tasks * kWork / work);
}

inline void pack_and_add(const Pass& pass) {
  in_parallel(PassPack{pass}, pass.pack_tasks(), 8);
  in_parallel(PassTiles{pass}, pass.tile_tasks(), grain_of(pass.tile_tasks(), pass.rows * pass.columns * (pass.width + 4)));
}

inline void finish(const Pass& pass) { in_parallel(PassFinish{pass}, pass.finish_tasks(), 4); }

inline void run_products(Pass& pass, const Tensor& like) {
  const Tensor memory = lay_out(pass, like);
  pack_and_add(pass);
  finish(pass);
}

inline void run(const Lift& lift) {
  in_parallel(LiftPack{lift}, lift.pack_tasks(), 8);
  in_parallel(LiftTiles{lift}, lift.tile_tasks(), grain_of(lift.tile_tasks(), lift.rows * lift.columns * (lift.r + 4)));
}

// --- bat ---

// Uninitialised memory: on the stack where little is wanted, as an allocation takes longer than filling it.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) : data_(small_) {
    if (bytes <= static_cast<int64_t>(sizeof small_)) return;
    large_ = workspace(like, bytes);
    data_ = static_cast<char*>(large_->data_ptr());
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() { return data_; }

 private:
  alignas(64) char small_[1 << 14];
  std::optional<Tensor> large_;
  char* data_;
};

// Runs a pass; its partial sums, `count` for each part of an owner, go to `direct` where there is one part, else to memory.
template <class Plan>
void add_up(Plan& pass, std::optional<Workspace>& memory, int64_t count, DType dtype, void* direct, const Tensor& like) {
  pass.room = (pass.room + 63) / 64 * 64;
  const int64_t rooms = pass.room <= BlockPlan::kSmallRoom ? 0 : pass.tasks * pass.room;
  const bool in_place = direct && pass.parts == 1;
  memory.emplace(like, rooms + (in_place ? 0 : accumulator_size(dtype) * pass.parts * count));
  pass.memory = rooms ? memory->data() : nullptr;
  pass.partial = in_place ? direct : memory->data() + rooms;
  in_parallel(pass, pass.tasks, grain_of(pass.tasks, pass.work));
}

inline void run(const BatWeight& a, const Tensor& like) {
  BatWeightPass pass(a);
  std::optional<Workspace> memory;
  add_up(pass, memory, 0, a.dtype, nullptr, like);
}

inline void run(const BatContract& a, const Tensor& like) {
  BatContractPass pass(a);
  const int64_t count = a.rows * a.r;
  std::optional<Workspace> memory;
  add_up(pass, memory, count, a.dtype, a.dB, like);
  if (pass.parts == 1) return;
  const PartSum sum{pass.partial, a.dB, count, pass.parts, accumulator(a.dtype)};
  in_parallel(sum, sum.tasks(), 16);
}

inline void run(const BatMatmul& a, const Tensor& like) {
  for (int64_t first = 0; first < a.T; first += kTile) {
    BatMatmulPass pass(a, first);
    Workspace turned(like, accumulator_size(a.dtype) * pass.in_features() * pass.width);
    pass.turned = turned.data();
    in_parallel(BatMatmulPack{pass}, tiles(pass.in_features()), 8);
    std::optional<Workspace> memory;
    add_up(pass, memory, pass.out_features() * pass.width, a.dtype, nullptr, like);
    in_parallel(BatMatmulFinish{pass}, tiles(pass.out_features()), 8);
  }
}

inline void run(const BatMix& a, const Tensor& like) {
  BatMixPass pass(a);
  Workspace factors(like, accumulator_size(a.dtype) * pass.groups.count * pass.groups.panels());
  pass.factors = factors.data();
  in_parallel(BatMixPack{pass}, pass.groups.count, 4);
  const int64_t count = a.rows * a.r;
  std::optional<Workspace> memory;
  add_up(pass, memory, count, a.dtype, nullptr, like);
  const PartSum sum{pass.partial, a.s, count, pass.parts, a.dtype};
  in_parallel(sum, sum.tasks(), 16);
}

inline void run(const BatMixBackward& a, const Tensor& like) {
  BatMixBackwardPass pass(a);
  const int64_t count = a.dC ? a.columns * a.r : 0;
  std::optional<Workspace> memory;
  add_up(pass, memory, count, a.dtype, a.dC, like);
  if (!a.dC || pass.parts == 1) return;
  const PartSum sum{pass.partial, a.dC, count, pass.parts, accumulator(a.dtype)};
  in_parallel(sum, sum.tasks(), 16);
}

// --- policy: an exponential costs about as much as a random word ---

inline void run(const TargetLogprob& a, const Tensor&) { in_parallel(a, a.rows, grain_rows(a.columns, true)); }

inline void run(const SoftmaxGradient& a, const Tensor&) { in_parallel(a, a.rows, grain_rows(a.columns, true)); }

// --- csr ---

inline void run(const CsrScatter& a, const Tensor&) { in_parallel(a, a.nnz, kEntriesPerThread); }

inline void run(const CsrGather& a, const Tensor&) {
  in_parallel(a, a.row_offsets[a.n] - a.row_offsets[0], kEntriesPerThread);
}

// Runs a sweep over x [T, k], whose entries cost `work` multiply-adds in all: each thread its groups, or where they do not
// go round, all threads parts of one slab of every group after another.
template <class S>
void run_sweep(S sweep, const void* x, int64_t T, int64_t x_stride, DType dtype, int64_t nnz, int64_t spare_bytes,
               const Tensor& like) {
  const Slabs& slabs = sweep.slabs;
  const int64_t threads = torch::stable::get_num_threads(), groups = slabs.groups, bytes = slabs.bytes();
  const int64_t work = T * (nnz + 4 * slabs.columns), grain = grain_of(groups, work);
  const int64_t busy = smaller(threads, (groups + grain - 1) / grain), rounds = (groups + busy - 1) / busy;
  sweep.shared = work >= threads << 18 && 4 * rounds * threads > 5 * groups;
  const Tensor room = workspace(like, bytes * (sweep.shared ? groups : threads)), spare = workspace(like, spare_bytes * threads);
  sweep.room = static_cast<char*>(room.data_ptr());
  const auto run_tasks = [&](int64_t tasks, int64_t least) {
    torch::stable::parallel_for(0, tasks, least, [&](int64_t begin, int64_t end) {
      uint32_t thread = 0;
      TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
      S mine = sweep;
      mine.spare = static_cast<char*>(spare.data_ptr()) + thread * spare_bytes;
      if (!mine.shared) mine.room += thread * bytes;
      kernel_for(mine)(mine, begin, end);
    });
  };
  if (!sweep.shared) return run_tasks(groups, grain);
  sweep.parts = (4 * threads + groups - 1) / groups;
  for (; sweep.wave * groups < slabs.count; ++sweep.wave) {
    const SlabPack pack{sweep, x, T, x_stride, dtype};
    in_parallel(pack, groups * pack.pieces(), 1);
    run_tasks(groups * sweep.parts, 1);
  }
}

inline void run(const CsrSpmm& a, const Tensor& like) {
  if (a.T == 0 || a.nnz == 0) return;
  SpmmSweep sweep{{}, a, a.values};
  Tensor values = like;
  if (a.permutation || a.values_dtype != accumulator(a.dtype)) {
    values = workspace(like, accumulator_size(a.dtype) * a.nnz);
    in_parallel(CsrWiden{a, values.data_ptr()}, a.nnz, kEntriesPerThread);
    sweep.values = values.data_ptr();
  }
  const int64_t size = accumulator_size(a.dtype), per_lane = a.dtype == DType::bfloat16 ? 2 : 1;
  sweep.slabs = slabs_of(a.T, a.k, size, per_lane);
  run_sweep(sweep, a.x, a.T, a.x_stride, a.dtype, a.nnz, size * kOutRows * sweep.slabs.lanes * per_lane, like);
}

inline void run(const CsrSddmm& a, const Tensor& like) {
  constexpr int64_t kMostBytes = 1 << 25;  // of partial sums
  const int64_t size = accumulator_size(a.dtype), per_lane = active_isa() == Isa::avx512_bf16 && a.dtype == DType::bfloat16 ? 2 : 1;
  SddmmSweep sweep{{}, a, a.out};
  sweep.slabs = slabs_of(a.T, a.k, size, per_lane, smaller(kGroups, at_least_one(kMostBytes / at_least_one(size * a.nnz))));
  const int64_t groups = a.T == 0 ? 0 : sweep.slabs.groups;
  Tensor sums = like;
  if (groups > 1) {
    sums = workspace(like, size * groups * a.nnz);
    sweep.sums = sums.data_ptr();
  }
  if (groups && a.nnz) run_sweep(sweep, a.x, a.T, a.x_stride, a.dtype, a.nnz, 0, like);
  if (groups != 1) in_parallel(SddmmFinish{a, sweep.sums, groups}, a.nnz, kEntriesPerThread);
}

// --- lowrank ---

inline void run(const LowRankUpdate& a, const Tensor& like) {
  const DType wide = accumulator(a.dtype);
  Lift lift;
  lift.out = a.out, lift.out_stride = a.out_stride, lift.dtype = a.dtype;
  lift.h = matrix(a.h, a.h_stride, 1, a.dtype), lift.m = matrix(a.B, a.B_stride, 1, a.dtype);
  lift.g = {a.g, 0, 1, wide}, lift.shift = {a.shift, 0, 1, wide};
  lift.scale = a.scale;
  lift.rows = a.rows, lift.columns = a.columns, lift.r = a.r;
  const Tensor memory = lay_out(lift, like);
  run(lift);
}

inline void run(const LowRankBackward& a, const Tensor& like) {
  if (SmallBackward::fits(a)) {
    const SmallBackward small{a};
    return kernel_for(small)(small, 0, 1);
  }
  Pass pass;
  pass.x = matrix(a.dy, a.dy_stride, 1, a.dtype);
  if (a.u) pass.m = matrix(a.B, a.B_stride, 1, a.dtype);
  if (a.dB) pass.h = matrix(a.h, a.h_stride, 1, a.dtype);
  if (a.dyz) pass.y = matrix(a.y, a.y_stride, 1, a.dtype), pass.bias = {a.bias, 0, 1, a.bias_dtype};
  pass.g = {a.g, 0, 1, a.g_dtype};
  pass.scaled = a.gdy;
  pass.column_sums = a.db != nullptr;
  pass.rows = a.rows, pass.columns = a.columns, pass.r = a.r;
  pass.scale = a.scale;
  pass.row_product = a.u, pass.row_product_stride = a.r, pass.row_product_dtype = a.dtype;
  pass.column_product = a.dB, pass.column_product_row = a.r;
  pass.sums = a.db, pass.y_sums = a.dyz;
  run_products(pass, like);
}

// --- dropout ---

inline double inverse_keep_rate(double p) { return p < 1 ? 1 / (1 - p) : 0; }

inline void run(const DropoutProject& a, const Tensor& like) {
  Pass pass;
  pass.x = matrix(a.x, a.x_stride, 1, a.dtype);
  pass.m = matrix(a.A, 1, a.A_stride, a.dtype);
  pass.seed = a.seed, pass.p = a.p;
  pass.rows = a.rows, pass.columns = a.columns, pass.r = a.r;
  pass.scale = inverse_keep_rate(a.p);
  pass.row_product = a.h, pass.row_product_stride = a.r, pass.row_product_dtype = a.dtype;
  run_products(pass, like);
}

inline void run(const DropoutOuter& a, const Tensor& like) {
  Pass pass;
  pass.x = matrix(a.x, a.x_stride, 1, a.dtype);
  pass.h = matrix(a.u, a.u_stride, 1, a.dtype);
  pass.seed = a.seed, pass.p = a.p;
  pass.rows = a.rows, pass.columns = a.columns, pass.r = a.r;
  pass.scale = inverse_keep_rate(a.p);
  pass.column_product = a.dA, pass.column_product_row = 1, pass.column_product_column = a.columns;
  run_products(pass, like);
}

inline void run(const DropoutLift& a, const Tensor& like) {
  Lift lift;
  lift.out = a.out, lift.out_stride = a.out_stride, lift.dtype = a.dtype;
  lift.h = matrix(a.u, a.u_stride, 1, a.dtype), lift.m = matrix(a.A, 1, a.A_stride, a.dtype);
  lift.seed = a.seed, lift.p = a.p;
  lift.rows = a.rows, lift.columns = a.columns, lift.r = a.r;
  const Tensor memory = lay_out(lift, like);
  run(lift);
}

// --- segments ---

inline int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline void run(const RowCopy& a, const Tensor&) { in_parallel(a, a.rows, grain_rows(a.bytes / 4, false)); }

// The rows of one adapter, by number, and whether they lie together.
struct OwnRows {
  const int64_t* numbers;
  int64_t count;
  bool together;
};

// f(s, its rows) for every adapter.
template <class Arguments, class F> void each_adapter(const Arguments& a, const F& f) {
  for (int64_t s = 0; s < a.n; ++s) {
    const int64_t first = a.offsets[s], end = a.offsets[s + 1];
    STD_TORCH_CHECK(0 <= first && first <= end && end <= a.rows, "offsets: got ", first, " before ", end,
                    ", wanted numbers that ascend from 0 to ", a.rows);
    OwnRows own{a.order + first, end - first, true};
    for (int64_t i = 0; i < own.count; ++i) {
      STD_TORCH_CHECK(0 <= own.numbers[i] && own.numbers[i] < a.rows, "order: got ", own.numbers[i], " of ", a.rows, " rows");
      own.together = own.together && own.numbers[i] == own.numbers[0] + i;
    }
    f(s, own);
  }
}

// An adapter's rows of a matrix: where they are if they lie together, else apart, moved there and back by read and write.
class OwnPart {
 public:
  OwnPart(const void* base, int64_t row_stride, int64_t columns, DType dtype, const OwnRows& own, const Tensor& like)
      : base_(static_cast<char*>(const_cast<void*>(base))), data_(base_), stride_(row_stride), size_(element_size(dtype)),
        base_stride_(size_ * row_stride), bytes_(size_ * columns), dtype_(dtype), own_(own), like_(like) {
    if (own.together) {
      if (base_ && own.count) data_ += own.numbers[0] * base_stride_;
      return;
    }
    memory_.emplace(like, own.count * bytes_);
    data_ = memory_->data(), stride_ = columns;
  }

  const OwnPart& read() const {
    if (memory_) run(RowCopy{base_, data_, own_.numbers, nullptr, own_.count, bytes_, base_stride_, bytes_}, like_);
    return *this;
  }
  void write() const {
    if (memory_) run(RowCopy{data_, base_, nullptr, own_.numbers, own_.count, bytes_, bytes_, base_stride_}, like_);
  }
  void* data() const { return data_; }
  int64_t stride() const { return stride_; }
  Matrix rows() const { return matrix(data_, stride_, 1, dtype_); }

 private:
  char *base_, *data_;
  int64_t stride_, size_, base_stride_, bytes_;
  DType dtype_;
  const OwnRows& own_;
  const Tensor& like_;
  std::optional<Workspace> memory_;
};

// The first element of matrix s of a stack.
inline const void* matrix_at(const void* stack, int64_t s, int64_t stride, int64_t size) {
  return stack ? static_cast<const char*>(stack) + s * stride * size : nullptr;
}

inline void run(const SegmentProject& a, const Tensor& like) {
  const int64_t size = element_size(a.dtype);
  const bool strangers = a.rows && (a.offsets[0] > 0 || a.offsets[a.n] < a.rows);
  if (strangers && a.r) std::memset(a.h, 0, static_cast<size_t>(size * a.rows * a.r));
  each_adapter(a, [&](int64_t s, const OwnRows& own) {
    if (own.count == 0) return;
    const OwnPart x(a.x, a.x_stride, a.columns, a.dtype, own, like), h(a.h, a.r, a.r, a.dtype, own, like);
    Pass pass;
    pass.x = x.read().rows();
    pass.m = matrix(matrix_at(a.A, s, a.A_strides[0], size), a.A_strides[2], a.A_strides[1], a.dtype);
    pass.rows = own.count, pass.columns = a.columns, pass.r = a.r;
    pass.row_product = h.data(), pass.row_product_stride = a.r, pass.row_product_dtype = a.dtype;
    run_products(pass, like);
    h.write();
  });
}

inline void run(const SegmentLift& a, const Tensor& like) {
  each_adapter(a, [&](int64_t s, const OwnRows& own) {
    if (own.count == 0) return;
    const OwnPart out(a.out, a.out_stride, a.columns, a.dtype, own, like), h(a.h, a.h_stride, a.r, a.dtype, own, like);
    Lift lift;
    lift.out = out.read().data(), lift.out_stride = out.stride(), lift.dtype = a.dtype;
    lift.h = h.read().rows();
    lift.m = matrix(matrix_at(a.B, s, a.B_strides[0], element_size(a.dtype)), a.B_strides[1], a.B_strides[2], a.dtype);
    lift.rows = own.count, lift.columns = a.columns, lift.r = a.r;
    const Tensor memory = lay_out(lift, like);
    run(lift);
    out.write();
  });
}

inline void run(const SegmentOuter& a, const Tensor& like) {
  const int64_t count = a.r * a.columns, size = accumulator_size(a.dtype);
  each_adapter(a, [&](int64_t s, const OwnRows& own) {
    void* const out = const_cast<void*>(matrix_at(a.out, s, count, size));
    if (own.count == 0) {
      if (count) std::memset(out, 0, static_cast<size_t>(count * size));
      return;
    }
    const OwnPart x(a.x, a.x_stride, a.columns, a.dtype, own, like), u(a.u, a.u_stride, a.r, a.dtype, own, like);
    Pass pass;
    pass.x = x.read().rows();
    pass.h = u.read().rows();
    pass.rows = own.count, pass.columns = a.columns, pass.r = a.r;
    pass.column_product = out, pass.column_product_row = 1, pass.column_product_column = a.columns;
    run_products(pass, like);
  });
}

// --- dora ---

// A pass over a weight [rows, columns], turned so that it is read along memory: over Wᵀ where W's rows are not contiguous
// but its columns are. Returns whether it is turned; skinny [columns, r] multiplies W, whose rows' squares are summed.
inline bool weight_pass(Pass& pass, const Matrix& weight, int64_t rows, int64_t columns, const Matrix& skinny, int64_t r) {
  const bool turned = weight.column != 1 && weight.row == 1;
  pass.x = turned ? weight.transposed() : weight;
  pass.rows = turned ? columns : rows, pass.columns = turned ? rows : columns, pass.r = r;
  (turned ? pass.h : pass.m) = skinny;
  pass.row_squares = !turned;
  pass.column_sums = pass.square = turned;
  return turned;
}

// ‖W_o + scale (B A)_o‖ into a.norm
inline void compute_norm(const ColumnNorm& a, const Tensor& like) {
  const DType wide = accumulator(a.dtype);
  const Matrix A = matrix(a.A, a.A_strides[0], a.A_strides[1], a.A_dtype);
  const Tensor room = workspace(like, accumulator_size(a.dtype) * a.r * (a.r + a.rows));
  char* const gram = static_cast<char*>(room.data_ptr());

  Pass pass;
  const Matrix weight = matrix(a.weight, a.weight_strides[0], a.weight_strides[1], a.dtype);
  const bool turned = weight_pass(pass, weight, a.rows, a.columns, A.transposed(), a.r);
  const Tensor memory = lay_out(pass, like);
  pack_and_add(pass);

  Pass small;  // A Aᵀ
  small.r = a.r;
  if (accumulator_size(a.A_dtype) >= accumulator_size(a.dtype)) {
    small.x = A, small.m = A.transposed();
    small.rows = a.r, small.columns = a.columns;
    small.row_product = gram, small.row_product_stride = a.r, small.row_product_dtype = wide;
  } else {  // A has been widened by the pass over W
    small.x = small.h = turned ? matrix(pass.packed_h, pass.h_stride, 1, wide) : matrix(pass.packed_m, pass.m_stride, 1, wide);
    small.rows = a.columns, small.columns = a.r;
    small.column_product = gram, small.column_product_row = a.r;
  }
  const Tensor small_memory = lay_out(small, like);
  pack_and_add(small);
  finish(small);

  const NormFinish last{a, pass, turned, gram, gram + accumulator_size(a.dtype) * a.r * a.r};
  in_parallel(last, NormFinish::tasks(a), 1);
}

inline void run(const ColumnNorm& a, const Tensor& like) {
  if (!a.stamp) return compute_norm(a, like);
  Fingerprint parts[] = {
      {{a.A, a.A_strides[0], a.A_strides[1], a.A_dtype}, a.r, a.columns, 0, nullptr},
      {{a.B, a.B_strides[0], a.B_strides[1], a.B_dtype}, a.rows, a.r, a.r * a.columns, nullptr},
  };
  uint64_t sums[2] = {};
  for (Fingerprint& part : parts) {
    std::vector<uint64_t> shares(static_cast<size_t>(2 * part.tasks()));
    part.parts = shares.data();
    in_parallel(part, part.tasks(), 4);
    for (size_t i = 0; i < shares.size(); ++i) sums[i % 2] += shares[i];
  }
  const int64_t print[] = {static_cast<int64_t>(sums[0]), static_cast<int64_t>(sums[1])};
  if (!a.force && std::equal(print, print + 2, a.stamp)) return;
  compute_norm(a, like);
  std::copy(print, print + 2, a.stamp);
}

inline void run(const MagnitudeGrad& a, const Tensor& like) {
  std::vector<unsigned char> vanishing(static_cast<size_t>(a.columns));
  in_parallel(MagnitudeDivide{a, vanishing.data()}, a.columns, 1 << 14);
  std::vector<int64_t> pick;
  for (int64_t o = 0; o < a.columns; ++o)
    if (vanishing[static_cast<size_t>(o)]) pick.push_back(o);
  const Tensor z = workspace(like, accumulator_size(a.dtype) * a.rows * std::min<int64_t>(kTile, pick.size()));
  for (size_t first = 0; first < pick.size(); first += kTile) {  // kTile columns' x W_oᵀ at a time
    Pass pass;
    pass.x = matrix(a.x, a.x_stride, 1, a.dtype);
    pass.m = matrix(a.weight, a.weight_strides[1], a.weight_strides[0], a.dtype, pick.data() + first);
    pass.rows = a.rows, pass.columns = a.k, pass.r = std::min<int64_t>(kTile, pick.size() - first);
    pass.row_product = z.data_ptr(), pass.row_product_stride = pass.r, pass.row_product_dtype = accumulator(a.dtype);
    run_products(pass, like);
    in_parallel(MagnitudeExact{a, pass.row_product, pick.data() + first, pass.r}, pass.r, 1);
  }
}

// --- cayley ---

// Runs a pass over n matrices, each one thread's, in that thread's room.
template <class Pass> void run_matrices(Pass pass, const Tensor& like) {
  const int64_t n = pass.cayley.n, r = pass.cayley.r, bytes = (pass.room + 63) / 64 * 64;
  if (n == 0 || r == 0) return;
  const Tensor memory = workspace(like, bytes * torch::stable::get_num_threads());
  torch::stable::parallel_for(0, n, grain_of(n, 2 * n * r * r * r), [&](int64_t begin, int64_t end) {
    uint32_t thread = 0;
    TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
    Pass mine = pass;
    mine.memory = static_cast<char*>(memory.data_ptr()) + thread * bytes;
    kernel_for(mine)(mine, begin, end);
  });
}

inline void run(const CayleyForward& a, const Tensor& like) { run_matrices(CayleyForwardPass(a), like); }

inline void run(const CayleyBackward& a, const Tensor& like) { run_matrices(CayleyBackwardPass(a), like); }

// --- transpose ---

inline void run(const Transpose& a, const Tensor&) {
  in_parallel(a, tiles(a.rows), grain_of(tiles(a.rows), a.rows * a.columns));
}

// --- importance ---

inline void run(const ImportanceUpdate& a, const Tensor&) { in_parallel(a, a.count, 2); }

}  // namespace spectral_ops::cpu
