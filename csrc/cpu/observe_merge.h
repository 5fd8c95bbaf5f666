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
  E a, b, k2, k3, k4, aa, bb;  // shares, and the factors of δ², δ³ and δ⁴ in Moments::merge
  TORCHPROBE_INLINE Weights(E na, E wa, E wb) : a(wa), b(wb), k2(na * wb), k3(k2 * (wa - wb)), k4(k2 * (wa * wa - wa * wb + wb * wb)),
                                                aa(6.0 * wa * wa), bb(6.0 * wb * wb) {}
};

// Mean and sums of powers of the deviations from it, of one set of values (E = double) or one in each lane (E = vdouble). Formulas: Chan et al.
// (1982) and Pébay (SAND2008-6212).
template <class E>
struct Moments {
  E mean, m2, m3, m4;

  TORCHPROBE_INLINE void merge(const Moments& b, const Weights<E>& w) {
    const E delta = b.mean - mean, delta2 = delta * delta;
    const E cross2 = fma(w.a, b.m2, -(w.b * m2)), cross3 = fma(w.a, b.m3, -(w.b * m3)), inner = fma(w.aa, b.m2, w.bb * m2);
    m4 = fma(delta2, fma(delta2, w.k4, inner), fma(4.0 * delta, cross3, m4 + b.m4));
    m3 = fma(delta, fma(delta2, w.k3, 3.0 * cross2), m3 + b.m3);
    m2 = fma(delta2, w.k2, m2 + b.m2);
    mean = fma(delta, w.b, mean);
  }
};

// Merges the given moments into those at `to`.
template <class E>
TORCHPROBE_INLINE void merge_moments(const Rows& to, int64_t i, const Moments<E>& moments, const Weights<E>& w) {
  Moments<E> all{load_as<E>(to.mean + i), load_as<E>(to.m2 + i), load_as<E>(to.m3 + i), load_as<E>(to.m4 + i)};
  all.merge(moments, w);
  store_as(to.m4 + i, all.m4);
  store_as(to.m3 + i, all.m3);
  store_as(to.m2 + i, all.m2);
  store_as(to.mean + i, all.mean);
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
  const Moments<E> moments{load_as<E>(b.mean + i), load_as<E>(b.m2 + i), load_as<E>(b.m3 + i), load_as<E>(b.m4 + i)};
  merge_moments<E>(a, i, moments, Weights<E>(na, wa, wb));
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
