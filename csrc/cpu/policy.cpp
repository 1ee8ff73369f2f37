#include "../ops/policy.h"

#include "common.h"

namespace spectral_ops::cpu::SPECTRAL_OPS_ISA {

namespace {

constexpr int64_t kPiece = 1024;  // logits between two looks at the greatest so far

// exp(x) for x <= 0 and NaN, in float32 to 2 units in the last place; below -87, where it would be subnormal, 0.
inline vec<float> exp_of(vec<float> x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const vec<float> least = vec<float>{} - 87.0f;
  const vec<float> in = x < least ? least : x;  // keeps NaN
  const vec<float> shifted = in * 1.44269504088896341f + kShift;
  const vec<float> n = shifted - kShift;
  const vec<float> r = in - n * 0.693359375f + n * 2.12194440e-4f;  // n ln 2, its first part exact
  vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vec<float> power = bits_as<vec<float>>((bits_as<u32_vec>(shifted) << 23) + 0x3f800000);
  return x < least ? vec<float>{} : p * power;
}
inline vec<double> exp_of(vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = __builtin_exp(x[l]);
  return x;
}

// The same for one value, so that a row's tail is what a vector would be.
template <class A> inline A exp_of_one(A x) { return exp_of(vec<A>{} + x)[0]; }

template <class A> constexpr A kLeast = std::is_same_v<A, double> ? A(-1.7976931348623157e308) : A(-3.4028234663852886e38f);

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

// max(greatest, scale * z), z [n]; a NaN is left to the sum.
template <class T> inline acc_t<T> piece_max(const T* z, int64_t n, acc_t<T> scale, acc_t<T> greatest) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, N = 16 / L;
  vec<A> most[N];
  A lanes[16];
  for (auto& v : most) v = vec<A>{} + greatest;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int v = 0; v < N; ++v) {
      const vec<A> s = load(z + i + v * L) * scale;
      most[v] = s > most[v] ? s : most[v];
    }
  for (int v = 0; v < N; ++v) store(lanes + v * L, most[v]);
  for (A lane : lanes) greatest = lane > greatest ? lane : greatest;
  for (; i < n; ++i) {
    const A s = static_cast<A>(value(z[i])) * scale;
    greatest = s > greatest ? s : greatest;
  }
  return greatest;
}

// Σ exp(scale * z - greatest), z [n], in 16 lanes whatever the instruction set.
template <class T> inline acc_t<T> piece_sum(const T* z, int64_t n, acc_t<T> scale, acc_t<T> greatest) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, N = 16 / L;
  vec<A> sums[N] = {};
  A lanes[16];
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int v = 0; v < N; ++v) sums[v] += exp_of(load(z + i + v * L) * scale - greatest);
  for (int v = 0; v < N; ++v) store(lanes + v * L, sums[v]);
  for (int l = 0; i < n; ++i, ++l) lanes[l] += exp_of_one(static_cast<A>(value(z[i])) * scale - greatest);
  for (int half = 8; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <class T> void logprob_rows(const TargetLogprob& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A scale = static_cast<A>(a.scale);
  for (int64_t t = begin; t < end; ++t) {
    const T* z = row<T>(a.logits, t, a.logits_stride);
    A greatest = kLeast<A>, total = 0;  // kLeast is finite: -inf - kLeast is no NaN
    for (int64_t j = 0; j < a.columns; j += kPiece) {
      const int64_t n = a.columns - j < kPiece ? a.columns - j : kPiece;
      const A before = greatest;
      greatest = piece_max(z + j, n, scale, greatest);
      if (greatest > before) total *= exp_of_one(before - greatest);
      total += piece_sum(z + j, n, scale, greatest);
    }
    const int64_t target = a.targets[t];
    const A log_total = log_of(total);
    A logp = static_cast<A>(__builtin_nan(""));
    if (target >= 0 && target < a.columns) logp = static_cast<A>(value(z[target])) * scale - greatest - log_total;
    if (target == a.ignore_index) logp = 0;
    static_cast<A*>(a.logprob)[t] = logp;
    static_cast<A*>(a.logsumexp)[t] = greatest + log_total;
  }
}

template <class T> void gradient_rows(const SoftmaxGradient& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  const A scale = static_cast<A>(a.scale);
  for (int64_t t = begin; t < end; ++t) {
    T* z = row<T>(a.logits, t, a.logits_stride);
    const int64_t target = a.targets[t];
    if (target == a.ignore_index) {
      std::memset(static_cast<void*>(z), 0, static_cast<size_t>(a.columns) * sizeof(T));
      continue;
    }
    const A lse = static_cast<const A*>(a.logsumexp)[t];
    const bool inside = target >= 0 && target < a.columns;
    const A factor = inside ? scale * static_cast<const A*>(a.dlogp)[t] : static_cast<A>(__builtin_nan(""));
    const A chosen = inside ? static_cast<A>(value(z[target])) * scale - lse : A(0);
    int64_t i = 0;
    for (; i + L <= a.columns; i += L) store(z + i, exp_of(load(z + i) * scale - lse) * -factor);
    for (; i < a.columns; ++i) z[i] = rounded<T>(exp_of_one(static_cast<A>(value(z[i])) * scale - lse) * -factor);
    if (inside) z[target] = rounded<T>((A(1) - exp_of_one(chosen)) * factor);
  }
}

}  // namespace

void target_logprob(const TargetLogprob& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* t) { logprob_rows<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

void softmax_gradient(const SoftmaxGradient& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* t) { gradient_rows<std::remove_pointer_t<decltype(t)>>(a, begin, end); });
}

}  // namespace spectral_ops::cpu::SPECTRAL_OPS_ISA
