// The plans of the products with drop(x): those of lowrank.h, with a seed.
#pragma once

#include "../ops/dropout.h"
#include "lowrank.h"
#include "run.h"

namespace spectral_ops::cpu {

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
  run_lift(lift, like);
}

}  // namespace spectral_ops::cpu
