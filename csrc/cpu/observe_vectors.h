// The kurtosis of each vector of a tile. Part of observe_kernel.h.
//
// The fast loops write the sums of the powers of (x − shift)·scale of every vector to a Vectors. finish_vectors computes the kurtosis from
// them. It repeats irregular vectors with slower code: those with a nonfinite element, an unsuitable scale, or hardly any variance.

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float low = 0x1p-20f, high = 0x1p24f;  // the range in which the sum of fourth powers of scaled deviations is safe
  static constexpr float damp = 0x1p-32f;                 // a sum of finite values with this factor does not overflow
};
template <>
struct Limits<double> {
  static constexpr double low = 0x1p-200, high = 0x1p200;
  static constexpr double damp = 0x1p-64;
};

// 2^-e with x·2^-e in [1, 2), for a finite and positive x. The result is a normal number.
template <class T>
T inverse_power(T x) {
  constexpr int bound = sizeof(T) == 4 ? 126 : 1022;
  const int e = __builtin_ilogb(x);
  return T(__builtin_ldexp(1.0, -(e < -bound ? -bound : e > bound ? bound : e)));
}
template <class T>
TORCHPROBE_INLINE bool is_finite(T x) {
  return x - x == 0;
}

// The largest |x − center| of n values; step is from one value to the next.
template <class S, class T>
T largest_deviation(const S* x, int64_t n, int64_t step, T center) {
  T largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T v = widen(x[i * step]), d = v > center ? v - center : center - v;
    largest = d > largest ? d : largest;
  }
  return largest;
}

// The sums of the vectors of a tile.
template <class T>
struct alignas(64) Vectors {
  T shift[MAX_VECTORS], s1[MAX_VECTORS], s2[MAX_VECTORS], s3[MAX_VECTORS], s4[MAX_VECTORS];
  T peak[MAX_VECTORS];  // an upper bound of the fourth powers of the vector
};

// What one thread keeps from tile to tile.
template <class T>
struct VectorState {
  double* partial;
  double* outliers;  // a row of the partial state
  int64_t n;         // features
  double inverse_n, sigma, sigma4;
  T scale = 1;  // the last suitable scale

  VectorState(double* partial, double* outliers, int64_t n, double sigma)
      : partial(partial), outliers(outliers), n(n), inverse_n(1.0 / double(n)), sigma(sigma) {
    // The mean of a regular vector lies within std/4 of the shift. So an outlier deviates from the shift by more than (sigma − 1/4)·std.
    const double reach = sigma > 0.25 ? sigma - 0.25 : 0;
    const bool possible = double(n - 1) / __builtin_sqrt(double(n)) > sigma;  // the largest possible deviation of one value among n
    sigma4 = possible ? 0.999 * (reach * reach) * (reach * reach) : __builtin_inf();
  }
};

// ---- the sums, features contiguous -------------------------------------------------------------------------------------------------------

// The sum of x·factor over one vector, in the order of row_powers. Also copies x to `to` if x is not of type T.
template <class S, class T>
T row_sum(const S* x, int64_t n, T factor, T* to) {
  constexpr int W = width<T>;
  Vec<T> a{}, b{};
  const Vec<T> f = splat<T>(factor);
  auto take = [&](Vec<T> v, int64_t i) __attribute__((always_inline)) {
    if constexpr (!std::is_same_v<S, T>) store(to + i, v);
    return v * f;
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    a += take(load_wide(x + i), i);
    b += take(load_wide(x + i + W), i + W);
  }
  if (i + W <= n) a += take(load_wide(x + i), i), i += W;
  if (i < n) b += take(load_part<S>(x + i, n - i, 0), i);
  return reduce(a + b);
}

// Sums the powers of (x − shift)·scale over one vector into v[r]. At the same time it reads `next`, the vector that follows, copies it to `to` if
// needed, and returns its sum. It also prefetches every other cache line of `ahead`, a vector of the next tile; column_sums prefetches the rest.
// Lanes are widened to double every 2048 elements. With Plain the scale is 1, and a subtraction replaces the fused multiply-add: the adder has
// free cycles and the multiplier does not.
template <class S, class T, bool Plain>
TORCHPROBE_INLINE T row_powers(const T* x, int64_t n, T shift, T scale, const S* next, T* to, const S* ahead, Vectors<T>& v, int r) {
  constexpr int W = width<T>;
  const Vec<T> k = splat<T>(scale), s = splat<T>(Plain ? shift : -(shift * scale));
  Vec<T> sum_a{}, sum_b{}, peak{};
  double t1 = 0, t2 = 0, t3 = 0, t4 = 0;
  auto take = [&](Vec<T> v, int64_t i) __attribute__((always_inline)) {
    if constexpr (!std::is_same_v<S, T>) store(to + i, v);
    return v;
  };
  for (int64_t begin = 0; begin < n; begin += 2048) {
    const int64_t end = n - begin < 2048 ? n : begin + 2048;
    Vec<T> a1{}, a2{}, a3{}, a4{}, b1{}, b2{}, b3{}, b4{};
    auto add = [&](Vec<T> v, Vec<T>& s1, Vec<T>& s2, Vec<T>& s3, Vec<T>& s4) __attribute__((always_inline)) {
      const Vec<T> d = Plain ? v - s : fma(v, k, s), q = d * d;
      s1 += d;
      s2 += q;
      s3 = fma(q, d, s3);
      s4 = fma(q, q, s4);
    };
    int64_t i = begin;
    for (; i + 2 * W <= end; i += 2 * W) {
      prefetch(ahead + i);
      sum_a += take(load_wide(next + i), i);
      add(load(x + i), a1, a2, a3, a4);
      sum_b += take(load_wide(next + i + W), i + W);
      add(load(x + i + W), b1, b2, b3, b4);
    }
    if (i + W <= end) {
      sum_a += take(load_wide(next + i), i);
      add(load(x + i), a1, a2, a3, a4);
      i += W;
    }
    if (i < end) {
      sum_b += take(load_part<S>(next + i, end - i, 0), i);
      add(load_part<T>(x + i, end - i, shift), b1, b2, b3, b4);  // a deviation of 0 adds nothing
    }
    peak = max(peak, max(a4, b4));
    const Four sums = reduce4(a1 + b1, a2 + b2, a3 + b3, a4 + b4);
    t1 += sums.a, t2 += sums.b, t3 += sums.c, t4 += sums.d;
  }
  v.shift[r] = shift, v.s1[r] = T(t1), v.s2[r] = T(t2), v.s3[r] = T(t3), v.s4[r] = T(t4), v.peak[r] = reduce_max(peak);
  return reduce(sum_a + sum_b);
}

// The sums of all vectors of a tile of rows. Also copies from[r] to row[r] if it is not of type T.
template <class S, class T>
TORCHPROBE_INLINE void row_sums(const S* const* from, T* const* row, const S* const* ahead, int rows, const VectorState<T>& state,
                                Vectors<T>& v) {
  const int64_t n = state.n;
  T sum = row_sum<S, T>(from[0], n, 1, row[0]);
  for (int r = 0; r < rows; ++r) {
    const T shift = sum * T(state.inverse_n);
    const int next = r + 1 < rows ? r + 1 : r;
    sum = state.scale == 1 ? row_powers<S, T, true>(row[r], n, shift, 1, from[next], row[next], ahead[r], v, r)
                           : row_powers<S, T, false>(row[r], n, shift, state.scale, from[next], row[next], ahead[r], v, r);
  }
}

// ---- the sums, neighboring vectors contiguous --------------------------------------------------------------------------------------------

constexpr int PEAK_BLOCK = 32;  // features; the sum of their fourth powers bounds the largest one

// V·W vectors at once, feature by feature. Of the last register only `lanes` may be in use.
template <class S, class T, int V>
TORCHPROBE_INLINE void side_by_side(const S* x, const S* ahead, int64_t stride, int lanes, const VectorState<T>& state, Vectors<T>& v, int at) {
  constexpr int W = width<T>;
  auto get = [&](const S* p, int i) __attribute__((always_inline)) {
    return i == V - 1 && lanes < W ? load_part<S>(p + i * W, lanes, 0) : load_wide(p + i * W);
  };
  Vec<T> sum[V] = {};
  for (int64_t j = 0; j < state.n; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) sum[i] += get(x + j * stride, i);
  const Vec<T> k = splat<T>(state.scale);
  Vec<T> s[V], s1[V] = {}, s2[V] = {}, s3[V] = {}, s4[V] = {}, peak[V] = {};
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    const Vec<T> shift = sum[i] * splat<T>(T(state.inverse_n));
    store(v.shift + at + i * W, shift);
    s[i] = -(shift * k);
  }
  for (int64_t begin = 0; begin < state.n; begin += PEAK_BLOCK) {
    const int64_t end = state.n - begin < PEAK_BLOCK ? state.n : begin + PEAK_BLOCK;
    Vec<T> block[V] = {};
    for (int64_t j = begin; j < end; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        if (i % 2) prefetch(ahead + j * stride + i * W);
        const Vec<T> d = fma(get(x + j * stride, i), k, s[i]), q = d * d;
        s1[i] += d;
        s2[i] += q;
        s3[i] = fma(q, d, s3[i]);
        block[i] = fma(q, q, block[i]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) s4[i] += block[i], peak[i] = max(peak[i], block[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    store(v.s1 + at + i * W, s1[i]);
    store(v.s2 + at + i * W, s2[i]);
    store(v.s3 + at + i * W, s3[i]);
    store(v.s4 + at + i * W, s4[i]);
    store(v.peak + at + i * W, peak[i]);
  }
}

// The sums of all vectors of a tile: element j of vector r is x[j·stride + r].
template <class S, class T>
TORCHPROBE_INLINE void side_by_side_sums(const S* x, const S* ahead, int64_t stride, int vectors, const VectorState<T>& state, Vectors<T>& v) {
  constexpr int W = width<T>, V = REGISTERS == 32 ? 4 : 2;
  int r = 0;
  for (; r + V * W <= vectors; r += V * W) side_by_side<S, T, V>(x + r, ahead + r, stride, W, state, v, r);
  for (; r < vectors; r += W) side_by_side<S, T, 1>(x + r, ahead + r, stride, vectors - r < W ? vectors - r : W, state, v, r);
}

// The sums of one vector, with the arithmetic of side_by_side.
template <class T>
void lone_powers(const T* x, int64_t n, T shift, T scale, Vectors<T>& v, int r) {
  T s1 = 0, s2 = 0, s3 = 0, s4 = 0, peak = 0;
  const T s = -(shift * scale);
  for (int64_t begin = 0; begin < n; begin += PEAK_BLOCK) {
    T block = 0;
    for (int64_t j = begin; j < n && j < begin + PEAK_BLOCK; ++j) {
      const T d = fma(x[j], scale, s), q = d * d;
      s1 += d;
      s2 += q;
      s3 = fma(q, d, s3);
      block = fma(q, q, block);
    }
    s4 += block;
    peak = block > peak ? block : peak;
  }
  v.shift[r] = shift, v.s1[r] = s1, v.s2[r] = s2, v.s3[r] = s3, v.s4[r] = s4, v.peak[r] = peak;
}

// ---- from the sums to the kurtosis -------------------------------------------------------------------------------------------------------

// The kurtosis of a vector of finite values by two passes in double; 0 if it is constant. Also returns mean and std of (x − x[0])·scale.
template <class T>
double exact_kurtosis(const T* x, int64_t n, double& mean, double& std, double& scale) {
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
  std = __builtin_sqrt(s2 / double(n));
  return double(n) * (s4 / s2) / s2;
}

// Counts the elements with |(x − shift)·scale − mean| > threshold; step is from one feature to the next.
template <class S, class T>
void count_outliers(const S* x, int64_t n, int64_t step, T shift, double scale, double mean, double threshold, double* outliers) {
  auto confirm = [&](int64_t i) {
    const double d = (double(widen(x[i * step])) - double(shift)) * scale - mean;
    if (__builtin_fabs(d) > threshold) outliers[i] += 1;
  };
  constexpr int W = width<T>;
  int64_t i = 0;
  const T k = T(scale), s = -(shift * k + T(mean)), limit = T(threshold * (1 - 1e-5));
  if (step == 1 && k > 0 && is_finite(s))  // a fast comparison finds the candidates
    for (; i + W <= n; i += W)
      for (uint32_t bits = gt(abs(fma(load_wide(x + i), splat<T>(k), splat<T>(s))), splat<T>(limit)); bits; bits &= bits - 1)
        confirm(i + __builtin_ctz(bits));
  for (; i < n; ++i) confirm(i);
}

inline void add_to_histogram(double* partial, double kurtosis) {
  int64_t bits;
  __builtin_memcpy(&bits, &kurtosis, 8);
  int64_t bin = (bits >> (52 - layout::BINS_PER_OCTAVE_LOG2)) - (int64_t(1023) << layout::BINS_PER_OCTAVE_LOG2);
  bin = bin < 0 ? 0 : bin >= layout::BINS ? layout::BINS - 1 : bin;
  partial[layout::HISTOGRAM + bin] += 1;
}

// Kurtosis, mean and variance from the sums, for one vector in each lane, starting at vector r. Returns two sets of bits: which vectors are
// irregular, and which may contain an outlier.
struct Found {
  uint32_t irregular, outlying;
};
template <class T>
TORCHPROBE_INLINE Found kurtosis_of(const Vectors<T>& v, int r, const VectorState<T>& state, double* kurtosis, double* mean, double* variance) {
  using E = vdouble;
  const double n = double(state.n);
  const E s1 = load_as<E>(v.s1 + r), s2 = load_as<E>(v.s2 + r), s3 = load_as<E>(v.s3 + r), s4 = load_as<E>(v.s4 + r);
  const E m = s1 * state.inverse_n, mm = m * m, m2 = s2 - s1 * m, var = m2 * state.inverse_n, raw = s2 * state.inverse_n;
  store_as(kurtosis, E(n * (s4 - 4.0 * m * s3 + 6.0 * mm * s2 - 3.0 * n * mm * mm) / (m2 * m2)));
  store_as(mean, m);
  store_as(variance, var);
  const E one = splat(1.0), zero{};
  const auto regular = (raw >= double(Limits<T>::low)) & (raw <= double(Limits<T>::high)) & (mm * (16 * n) <= m2) & (s4 - s4 == 0);
  const auto outlying = load_as<E>(v.peak + r) > var * var * state.sigma4;
  return {gt(E(regular ? zero : one), zero), gt(E(outlying ? one : zero), zero)};
}

// The kurtosis of an irregular vector: from the same sums with a suitable scale, or else by exact_kurtosis. 0 if the vector is constant, nan if
// an element is not finite. Also counts its outliers.
template <class T, bool SideBySide>
double irregular_kurtosis(const T* x, VectorState<T>& state) {
  const int64_t n = state.n;
  T sum = 0, damped = 0;
  if (SideBySide) {
    for (int64_t j = 0; j < n; ++j) sum += x[j], damped += x[j] * Limits<T>::damp;
  } else {
    sum = row_sum<T, T>(x, n, 1, nullptr), damped = row_sum<T, T>(x, n, Limits<T>::damp, nullptr);
  }
  if (!is_finite(sum))
    for (int64_t j = 0; j < n; ++j)
      if (!is_finite(x[j])) return __builtin_nan("");
  const T shift = is_finite(sum) ? sum * T(state.inverse_n) : damped * T(state.inverse_n) / Limits<T>::damp;
  const T largest = largest_deviation(x, n, 1, shift);
  double kurtosis[width<double>], mean[width<double>], variance[width<double>];
  if (largest > 0 && is_finite(largest)) {
    state.scale = inverse_power<T>(largest);
    Vectors<T> v{};
    if (SideBySide)
      lone_powers<T>(x, n, shift, state.scale, v, 0);
    else
      row_powers<T, T, false>(x, n, shift, state.scale, x, nullptr, x, v, 0);
    const Found found = kurtosis_of<T>(v, 0, state, kurtosis, mean, variance);
    if (!(found.irregular & 1)) {
      if (found.outlying & 1)
        count_outliers<T, T>(x, n, 1, shift, double(state.scale), mean[0], state.sigma * __builtin_sqrt(variance[0]), state.outliers);
      return kurtosis[0];
    }
  }
  double std, scale;
  kurtosis[0] = exact_kurtosis<T>(x, n, mean[0], std, scale);
  if (kurtosis[0] > 0 && state.sigma4 < __builtin_inf())
    count_outliers<T, T>(x, n, 1, x[0], scale, mean[0], state.sigma * std, state.outliers);
  return kurtosis[0];
}

// Merges the vectors of a tile into the partial state. Element j of vector r is at(r)[j·step]; scratch has room for one vector.
template <class S, class T, bool SideBySide, class At>
void finish_vectors(const Vectors<T>& v, int vectors, At at, int64_t step, VectorState<T>& state, T* scratch) {
  const double scale = state.scale;
  double kurtosis[MAX_VECTORS], mean[MAX_VECTORS], variance[MAX_VECTORS];
  int count = 0;
  for (int first = 0; first < vectors; first += width<double>) {
    const Found found = kurtosis_of<T>(v, first, state, kurtosis + first, mean + first, variance + first);
    const int end = vectors - first < width<double> ? vectors : first + width<double>;
    for (int r = first; r < end; ++r) {
      if (__builtin_expect(found.irregular >> (r - first) & 1, 0)) {
        for (int64_t j = 0; j < state.n; ++j) scratch[j] = widen(at(r)[j * step]);
        kurtosis[r] = irregular_kurtosis<T, SideBySide>(scratch, state);
        if (!(kurtosis[r] > 0)) {
          state.partial[kurtosis[r] == 0 ? layout::CONSTANT : layout::INVALID] += 1;
          continue;
        }
      } else if (found.outlying >> (r - first) & 1) {
        count_outliers<S, T>(at(r), state.n, step, v.shift[r], scale, mean[r], state.sigma * __builtin_sqrt(variance[r]), state.outliers);
      }
      kurtosis[count++] = kurtosis[r];
    }
  }
  if (count == 0) return;
  double sum = 0, m2 = 0;
  for (int i = 0; i < count; ++i) sum += kurtosis[i], add_to_histogram(state.partial, kurtosis[i]);
  const double nb = count, na = state.partial[layout::VECTORS], average = sum / nb;
  for (int i = 0; i < count; ++i) m2 += (kurtosis[i] - average) * (kurtosis[i] - average);
  const double delta = average - state.partial[layout::KURTOSIS_MEAN];
  state.partial[layout::VECTORS] = na + nb;
  state.partial[layout::KURTOSIS_MEAN] += delta * (nb / (na + nb));
  state.partial[layout::KURTOSIS_M2] += m2 + delta * delta * (na * nb / (na + nb));
}
