// The kurtosis of each vector and its outliers, from its sums over the blocks of features. Part of observe_kernel.h.
//
// Irregular vectors are computed again by slower code: those with a nonfinite element, an unsuitable scale, or hardly any variance.

// The moments of one vector in each lane, starting at vector r; scale is that of their sums. Mean and variance are those of (x − shift)·scale with
// the shift of the first block. Returns bits that say which vectors are irregular.
template <class T>
TORCHPROBE_INLINE uint32_t kurtosis_of(const Call& call, const Sums<T>& sums, int64_t r, double scale, double* kurtosis, double* mean,
                                       double* variance) {
  using E = vdouble;
  const double n = double(call.features), inverse_n = call.inverse_features;
  const E shift = load_as<E>(sums.of(0, r).shift());
  Moments<E> all{};
  E raw{}, terms{};  // the sums of squares about the shifts, and of what the fourth powers about the means are differences of
  for (int64_t b = 0; b < call.blocks; ++b) {
    const Vectors<T> v = sums.of(b, r);
    const double nb = double(call.block_size(b)), na = double(call.block_begin(b));
    const E s1 = load_as<E>(v.s1()), s2 = load_as<E>(v.s2()), s3 = load_as<E>(v.s3()), s4 = load_as<E>(v.s4());
    const E m = s1 * (call.blocks == 1 ? inverse_n : 1 / nb), mm = m * m;
    Moments<E> some{m, s2 - s1 * m, E{}, s4 - 4.0 * m * s3 + 6.0 * mm * s2 - 3.0 * nb * mm * mm};
    raw += s2, terms += s4 + 4.0 * abs(m * s3) + 6.0 * mm * s2;
    if (call.blocks > 1) some.m3 = s3 - m * (3.0 * s2 - 2.0 * nb * mm);
    if (b == 0) {
      all = some;
    } else {
      some.mean += (load_as<E>(v.shift()) - shift) * scale;
      const double share = 1 / (na + nb);
      all.merge(some, Weights<E>(splat(na), splat(na * share), splat(nb * share)));
    }
  }
  const E var = all.m2 * inverse_n, one = splat(1.0), zero{};
  store_as(kurtosis, E(n * all.m4 / (all.m2 * all.m2)));
  store_as(mean, all.mean);
  store_as(variance, var);
  const double low = Limits<T>::low, high = Limits<T>::high, strain = Limits<T>::strain;
  const auto regular = (var >= low) & (raw * inverse_n <= high) & (6.0 * raw <= strain * all.m2) & (terms <= strain * all.m4) & (all.m4 - all.m4 == 0);
  return gt(E(regular ? zero : one), zero);
}

// ---- irregular vectors -------------------------------------------------------------------------------------------------------------------

// The kurtosis of a vector of finite values by two passes in double; 0 if it is constant. Also returns mean and variance of (x − x[0])·scale.
template <class T>
double exact_kurtosis(const T* x, int64_t n, double& scale, double& mean, double& variance) {
  double largest = 0;
  auto half = [&](int64_t i) { return double(x[i]) / 2 - double(x[0]) / 2; };  // a difference of halves does not overflow
  for (int64_t i = 0; i < n; ++i) largest = __builtin_fabs(half(i)) > largest ? __builtin_fabs(half(i)) : largest;
  if (largest == 0) return 0;
  scale = inverse_power<double>(largest);
  double sum = 0, s2 = 0, s4 = 0;
  for (int64_t i = 0; i < n; ++i) sum += half(i) * scale;
  mean = 2 * (sum / double(n));
  for (int64_t i = 0; i < n; ++i) {
    const double d = 2 * (half(i) * scale) - mean;
    s2 += d * d, s4 += d * d * d * d;
  }
  variance = s2 / double(n);
  return double(n) * (s4 / s2) / s2;
}

// One vector x: from the same sums with a suitable scale, which is also written to `suitable`, or else by exact_kurtosis. They are about 0 where those
// in `before` are, and if that does not do, about the mean. `sums` has room for one vector. Returns the kurtosis, 0 if the vector is constant, and nan
// if an element is not finite. Also returns mean and variance of (x − shift)·scale.
template <class T, bool SideBySide>
double irregular_kurtosis(const Call& call, const T* x, const Sums<T>& before, int64_t r, const Sums<T>& sums, T& suitable, T& shift, double& scale,
                          double& mean, double& variance) {
  bool finite = true, zero = false;
  VectorLanes<T> lanes;
  for (int64_t b = 0; b < call.blocks; ++b) {
    const T* part = x + call.block_begin(b);
    const int64_t n = call.block_size(b);
    T sum = 0, damped = 0;
    if (SideBySide) {
      for (int64_t j = 0; j < n; ++j) sum += part[j], damped += part[j] * Limits<T>::damp;
    } else {
      sum = row_sum<T, T>(part, n, 1, nullptr), damped = row_sum<T, T>(part, n, Limits<T>::damp, nullptr);
    }
    const T inverse_n = T(1.0 / double(n));
    finite &= is_finite(sum);
    *sums.of(b, 1).shift() = is_finite(sum) ? sum * inverse_n : damped * inverse_n / Limits<T>::damp;
    zero |= *before.of(b, r).shift() == 0;
  }
  if (!finite)
    for (int64_t j = 0; j < call.features; ++j)
      if (!is_finite(x[j])) return __builtin_nan("");
  for (const bool about_zero : {true, false}) {
    if (about_zero && !zero) continue;
    for (int64_t b = 0; b < call.blocks; ++b)
      *sums.of(b, 0).shift() = about_zero && *before.of(b, r).shift() == 0 ? 0 : *sums.of(b, 1).shift();
    shift = *sums.of(0, 0).shift();
    const T largest = largest_deviation(x, call.features, 1, shift);
    if (!(largest > 0 && is_finite(largest))) continue;
    const T k = inverse_power<T>(largest);
    for (int64_t b = 0; b < call.blocks; ++b) {
      const T* part = x + call.block_begin(b);
      const Vectors<T> v = sums.of(b, 0);
      if (SideBySide)
        lone_powers<T>(part, call.block_size(b), *v.shift(), k, v);
      else
        row_powers<About::Mean, T, T>(part, call.block_size(b), *v.shift(), k, part, static_cast<T*>(nullptr), part, lanes, 0), lanes.flush(0, true, v);
    }
    double kurtosis[width<double>], means[width<double>], variances[width<double>];
    if (!(kurtosis_of<T>(call, sums, 0, double(k), kurtosis, means, variances) & 1)) {
      suitable = k, scale = double(k), mean = means[0], variance = variances[0];
      return kurtosis[0];
    }
  }
  shift = x[0];
  return exact_kurtosis<T>(x, call.features, scale, mean, variance);
}

// ---- from the sums to the outcome --------------------------------------------------------------------------------------------------------

// The outcome for vectors [begin, end), whose sums have the given scale; it becomes the last suitable one. at(r) is the first element of vector r.
template <class S, class T, bool SideBySide, class At>
void finish_vectors(const Call& call, const Sums<T>& sums, int64_t begin, int64_t end, At at, T& scale, const Outcome& out, T* scratch) {
  constexpr int W = width<double>;
  const double of_sums = scale, infinity = __builtin_inf();
  for (int64_t first = begin; first < end; first += W) {
    uint32_t irregular = kurtosis_of<T>(call, sums, first, of_sums, out.kurtosis + first, out.mean + first, out.variance + first);
    store_as(out.scale + first, splat(of_sums));
    if (end - first < W) irregular &= (1u << (end - first)) - 1;
    for (; __builtin_expect(irregular != 0, 0); irregular &= irregular - 1) {
      const int64_t r = first + __builtin_ctz(irregular);
      T *x = scratch + call.scratch.vector, shift = 0;
      for (int64_t j = 0; j < call.features; ++j) x[j] = widen(at(r)[j * call.feature_stride]);
      out.mean[r] = 0, out.variance[r] = infinity;
      out.kurtosis[r] = irregular_kurtosis<T, SideBySide>(call, x, sums, r, {scratch + call.scratch.lone_sums, MAX_LANES}, scale, shift,
                                                          out.scale[r], out.mean[r], out.variance[r]);
      for (int64_t b = 0; b < call.blocks; ++b) {
        const Vectors<T> v = sums.of(b, r);
        *v.shift() = shift;
        *v.peak() = out.kurtosis[r] > 0 ? T(infinity) : 0;  // any block may have an outlier, or none
      }
    }
  }
}

// Counts the elements with |(x − shift)·scale − mean| > threshold; step is from one feature to the next.
template <class S, class T>
void count_outliers_of(const S* x, int64_t n, int64_t step, T shift, double scale, double mean, double threshold, double* outliers) {
  auto confirm = [&](int64_t i) {
    const double d = (double(widen(x[i * step])) - double(shift)) * scale - mean;
    if (__builtin_fabs(d) > threshold) outliers[i] += 1;
  };
  constexpr int W = width<T>;
  int64_t i = 0;
  const T k = T(scale), m = T(mean), s = -(shift * k + m);
  const T limit = T(threshold * (1 - 1e-5) - 4 * epsilon<T> * (__builtin_fabs(double(shift) * k) + __builtin_fabs(mean)));
  if (step == 1 && k > 0 && is_finite(s))  // a fast comparison finds the candidates
    for (; i + W <= n; i += W)
      for (uint32_t bits = gt(abs(fma(load_wide(x + i), splat<T>(k), splat<T>(s))), splat<T>(limit)); bits; bits &= bits - 1)
        confirm(i + __builtin_ctz(bits));
  for (; i < n; ++i) confirm(i);
}

// The outliers of vectors [begin, end) in blocks [first_block, last_block). `outliers` has a number for each feature.
template <class S, class T, class At>
void count_outliers(const Call& call, const Sums<T>& sums, int64_t begin, int64_t end, int64_t first_block, int64_t last_block, At at,
                    const Outcome& out, double* outliers) {
  using E = vdouble;
  constexpr int W = width<double>;
  const double n = double(call.features), sigma = call.outlier_sigma;
  if (!((n - 1) / __builtin_sqrt(n) > sigma)) return;  // the largest possible deviation of one value among n
  auto fourth = [&](double apart) {
    const double near = sigma > apart ? sigma - apart : 0;
    return 0.999 * (near * near) * (near * near);
  };
  const double sigma4 = fourth(0.25), nearer4 = fourth(1);
  const E one = splat(1.0), zero{};
  constexpr int AT_ONCE = 64;  // blocks; those of one vector are read in order
  for (int64_t first = begin; first < end; first += W) {
    const E shift = load_as<E>(sums.of(0, first).shift()), scale = load_as<E>(out.scale + first);
    const E mean = load_as<E>(out.mean + first), variance = load_as<E>(out.variance + first);
    auto distance = [&](int64_t b) __attribute__((always_inline)) { return (load_as<E>(sums.of(b, first).shift()) - shift) * scale - mean; };
    for (int64_t b0 = first_block; b0 < last_block; b0 += AT_ONCE) {
      const int blocks = last_block - b0 < AT_ONCE ? int(last_block - b0) : AT_ONCE;
      uint32_t bits[AT_ONCE], any_bits = 0;
      for (int b = 0; b < blocks; ++b) {
        // An outlier deviates from the shift of its block by more than from the mean, less the distance between these two, which is usually at
        // most a quarter of the standard deviation, and hardly ever more than the whole.
        const E apart = distance(b0 + b), peak = load_as<E>(sums.of(b0 + b, first).peak());
        const E apart2 = apart * apart, least = 16.0 * apart2 > variance ? splat(nearer4) : splat(sigma4);
        const auto possible = (apart2 > variance) | (peak > least * variance * variance);
        any_bits |= bits[b] = gt(E(possible ? one : zero), zero);
      }
      if (end - first < W) any_bits &= (1u << (end - first)) - 1;
      for (; __builtin_expect(any_bits != 0, 0); any_bits &= any_bits - 1) {
        const int lane = __builtin_ctz(any_bits);
        const int64_t r = first + lane;
        const double threshold = sigma * __builtin_sqrt(out.variance[r]);
        for (int b = 0; b < blocks; ++b) {
          if (!(bits[b] >> lane & 1)) continue;
          const double reach = threshold - __builtin_fabs(distance(b0 + b)[lane]);
          if (reach > 0 && !(double(*sums.of(b0 + b, r).peak()) > 0.999 * (reach * reach) * (reach * reach))) continue;
          const int64_t j = call.block_begin(b0 + b);
          count_outliers_of<S, T>(at(r) + j * call.feature_stride, call.block_size(b0 + b), call.feature_stride, *sums.of(0, r).shift(),
                                  out.scale[r], out.mean[r], threshold, outliers + j);
        }
      }
    }
  }
}

// ---- into the partial state --------------------------------------------------------------------------------------------------------------

inline void add_to_histogram(double* partial, double kurtosis) {
  int64_t bits;
  __builtin_memcpy(&bits, &kurtosis, 8);
  int64_t bin = (bits >> (52 - layout::BINS_PER_OCTAVE_LOG2)) - (int64_t(1023) << layout::BINS_PER_OCTAVE_LOG2);
  bin = bin < 0 ? 0 : bin >= layout::BINS ? layout::BINS - 1 : bin;
  partial[layout::HISTOGRAM + bin] += 1;
}

// Merges the kurtosis of n vectors into the header of the partial state; overwrites the outcome.
void record(const Outcome& out, int64_t n, double* partial) {
  double* kurtosis = out.kurtosis;
  int64_t count = 0;
  double sum = 0, m2 = 0;
  for (int64_t r = 0; r < n; ++r) {
    if (kurtosis[r] > 0) {
      sum += kurtosis[r], add_to_histogram(partial, kurtosis[r]);
      kurtosis[count++] = kurtosis[r];
    } else {
      partial[kurtosis[r] == 0 ? layout::CONSTANT : layout::INVALID] += 1;
    }
  }
  if (count == 0) return;
  const double nb = double(count), na = partial[layout::VECTORS], average = sum / nb;
  for (int64_t i = 0; i < count; ++i) m2 += (kurtosis[i] - average) * (kurtosis[i] - average);
  const double delta = average - partial[layout::KURTOSIS_MEAN];
  partial[layout::VECTORS] = na + nb;
  partial[layout::KURTOSIS_MEAN] += delta * (nb / (na + nb));
  partial[layout::KURTOSIS_M2] += m2 + delta * delta * (na * nb / (na + nb));
}
