// Merges one state into another. Part of observe_kernel.h.

// The per-feature rows of a partial state, starting at feature j.
struct Rows {
  double *count, *nonfinite, *outliers, *low, *high, *abs_sum, *mean, *m2, *m3, *m4;
};
inline Rows rows_of(double* state, int64_t features, int64_t j) {
  double* p = state + layout::HEADER + j;
  return {p + layout::COUNT * features, p + layout::NONFINITE * features, p + layout::OUTLIERS * features, p + layout::MIN * features,
          p + layout::MAX * features,   p + layout::ABS_SUM * features,   p + layout::MEAN * features,     p + layout::M2 * features,
          p + layout::M3 * features,    p + layout::M4 * features};
}

// The weights of two sets of na and nb values in their union.
template <class E>
struct Weights {
  E a, b, k2, k3, k4, aa, bb;  // shares, and the factors of δ², δ³ and δ⁴ in merge_moments
  TORCHPROBE_INLINE Weights(E na, E wa, E wb) : a(wa), b(wb), k2(na * wb), k3(k2 * (wa - wb)), k4(k2 * (wa * wa - wa * wb + wb * wb)),
                                                aa(6.0 * wa * wa), bb(6.0 * wb * wb) {}
};

// Merges the given moments into those at `to`, for one feature (E = double) or several (E = vdouble). Formulas: Chan et al. (1982) and Pébay
// (SAND2008-6212).
template <class E>
TORCHPROBE_INLINE void merge_moments(const Rows& to, int64_t i, E mean, E m2, E m3, E m4, const Weights<E>& w) {
  const E mean_a = load_as<E>(to.mean + i), m2_a = load_as<E>(to.m2 + i), m3_a = load_as<E>(to.m3 + i), m4_a = load_as<E>(to.m4 + i);
  const E delta = mean - mean_a, delta2 = delta * delta;
  const E cross2 = fma(w.a, m2, -(w.b * m2_a)), cross3 = fma(w.a, m3, -(w.b * m3_a)), inner = fma(w.aa, m2, w.bb * m2_a);
  store_as(to.m4 + i, fma(delta2, fma(delta2, w.k4, inner), fma(4.0 * delta, cross3, m4_a + m4)));
  store_as(to.m3 + i, fma(delta, fma(delta2, w.k3, 3.0 * cross2), m3_a + m3));
  store_as(to.m2 + i, fma(delta2, w.k2, m2_a + m2));
  store_as(to.mean + i, fma(delta, w.b, mean_a));
}
template <class E>
TORCHPROBE_INLINE void merge_extremes(const Rows& a, int64_t i, E low, E high, E na, E nb) {
  const E low_a = load_as<E>(a.low + i), high_a = load_as<E>(a.high + i);
  store_as(a.low + i, E(((na == 0) | ((nb > 0) & (low < low_a))) ? low : low_a));
  store_as(a.high + i, E(((na == 0) | ((nb > 0) & (high > high_a))) ? high : high_a));
}

// Merges the features of state b, starting at i, into those of state a.
template <class E>
TORCHPROBE_INLINE void merge_rows(const Rows& a, const Rows& b, int64_t i) {
  const E na = load_as<E>(a.count + i), nb = load_as<E>(b.count + i), zero{}, one = zero + 1.0, n = na + nb;
  const E inverse_n = 1.0 / E(n > 0 ? n : one), wa = na * inverse_n, wb = E(na > 0 ? nb * inverse_n : one);
  merge_extremes<E>(a, i, load_as<E>(b.low + i), load_as<E>(b.high + i), na, nb);
  merge_moments<E>(a, i, load_as<E>(b.mean + i), load_as<E>(b.m2 + i), load_as<E>(b.m3 + i), load_as<E>(b.m4 + i), Weights<E>(na, wa, wb));
  store_as(a.count + i, n);
  store_as(a.nonfinite + i, load_as<E>(a.nonfinite + i) + load_as<E>(b.nonfinite + i));
  store_as(a.outliers + i, load_as<E>(a.outliers + i) + load_as<E>(b.outliers + i));
  store_as(a.abs_sum + i, load_as<E>(a.abs_sum + i) + load_as<E>(b.abs_sum + i));
}

void merge(double* state, const double* partial, int64_t features, int64_t begin, int64_t end, bool header) {
  if (header) {
    const double na = state[layout::VECTORS], nb = partial[layout::VECTORS], wb = nb > 0 ? nb / (na + nb) : 0;
    const double delta = partial[layout::KURTOSIS_MEAN] - state[layout::KURTOSIS_MEAN];
    state[layout::KURTOSIS_MEAN] += delta * wb;
    state[layout::KURTOSIS_M2] += partial[layout::KURTOSIS_M2] + delta * delta * (na * wb);
    for (int64_t i : {int64_t(layout::VECTORS), int64_t(layout::CONSTANT), int64_t(layout::INVALID)}) state[i] += partial[i];
    for (int64_t i = layout::HISTOGRAM; i < layout::HEADER; ++i) state[i] += partial[i];
  }
  const Rows a = rows_of(state, features, begin), b = rows_of(const_cast<double*>(partial), features, begin);
  int64_t i = 0;
  for (; i + width<double> <= end - begin; i += width<double>) merge_rows<vdouble>(a, b, i);
  for (; i < end - begin; ++i) merge_rows<double>(a, b, i);
}
