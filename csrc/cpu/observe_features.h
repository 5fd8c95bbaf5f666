// The moments of each feature over a tile. Part of observe_kernel.h.
//
// The fast loops write the sums of several features to a Features and return whether all of them are valid. finish_features (observe_tiles.h)
// repeats those that are not. If a tile of rows has several strips, the sums of one strip continue those of the strip before.

// N features over one tile: the sums of the powers of (x·unit − shift)·scale, the extremes of x, and Σ|x|·unit. unit is 1, except for values
// so close to the ends of the range that their sum would not fit.
template <class T, int N>
struct alignas(VECTOR_BYTES) Features {
  T unit[N], shift[N], scale[N], s1[N], s2[N], s3[N], s4[N], low[N], high[N], abs_sum[N], count[N];
};

// Whether a feature must be repeated: its sums show an unsuitable scale or a nonfinite value.
template <class V>
TORCHPROBE_INLINE auto unsuited(V low, V high, V shift, V scale, V abs_sum) {
  using T = std::remove_reference_t<decltype(low[0])>;
  const V largest = max(high - shift, shift - low) * scale;
  return (abs_sum - abs_sum != 0) | (largest > Limits<T>::high) | ((largest < Limits<T>::low) & (low != high));
}

// Whether a feature must be repeated because its mean is more than 4/3 standard deviations away from the shift: the powers about the mean would be
// small differences of the sums of its n values. Double and few values are precise enough.
template <class V, class T>
TORCHPROBE_INLINE auto distant(V s1, V s2, T n) {
  const T limit = sizeof(T) == 8 || n < 16 ? T(__builtin_inf()) : n;
  return T(1 + 9.0 / 16) * (s1 * s1) > limit * s2;
}

TORCHPROBE_INLINE int quarter_of(int n, int i) { return n >= 4 ? n * i / 4 : 0; }

// Twice the median.
template <class V>
TORCHPROBE_INLINE V middle(V a, V b, V c, V d) {
  return max(min(a, b), min(c, d)) + min(max(a, b), max(c, d));
}
template <class V>
TORCHPROBE_INLINE V median(V a, V b, V c, V d) {
  return middle(a, b, c, d) * 0.5f;
}

// The shift of a feature: the median of the means of four pairs of values from its first strip, so that an outlier does no harm. value(r) is that of
// row r < n. Of fewer than 16 values it is the median of four of them, and of fewer than four the first one.
template <class F>
TORCHPROBE_INLINE auto sample_shift(int n, F value) {
  if (n < 4) return value(0);
  const int second = n / 4, third = n / 2, fourth = n * 3 / 4;
  if (n < 16) return median(value(0), value(second), value(third), value(fourth));
  auto sum = [&](int r) __attribute__((always_inline)) { return decltype(value(0))(value(r) + value(r + 1)); };
  return decltype(value(0))(middle(sum(0), sum(second), sum(third), sum(fourth)) * 0.25f);
}

// ---- the sums, features contiguous -------------------------------------------------------------------------------------------------------

// The sums of V·W neighboring features over the n rows of a strip, starting at column j. `first` and `last` say which strip it is of a tile with
// `all` rows; the result means something only after the last one. Also prefetches the cache lines of `ahead`, of type S, that row_powers leaves out.
template <class S, class T, int V, bool Whole>
TORCHPROBE_INLINE bool column_sums(const T* const* row, int n, int64_t j, const T* scales, Features<T, V * width<T>>& out, const S* const* ahead,
                                   bool first, bool last, int all) {
  constexpr int W = width<T>, LINE = 64 / sizeof(S);
  Vec<T> k[V], shift[V], s[V], s1[V], s2[V], s3[V], s4[V], low[V], high[V], sum[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t i = j + v * W;
    if (Whole || first) {
      k[v] = load(scales + v * W);
      shift[v] = sample_shift(n, [&](int r) { return load(row[r] + i); });
      s1[v] = s2[v] = s3[v] = s4[v] = sum[v] = Vec<T>{};
      low[v] = high[v] = load(row[0] + i);
      store(out.unit + v * W, splat<T>(1));
      store(out.shift + v * W, shift[v]);
      store(out.scale + v * W, k[v]);
    } else {
      k[v] = load(out.scale + v * W), shift[v] = load(out.shift + v * W), sum[v] = load(out.abs_sum + v * W);
      s1[v] = load(out.s1 + v * W), s2[v] = load(out.s2 + v * W), s3[v] = load(out.s3 + v * W), s4[v] = load(out.s4 + v * W);
      low[v] = load(out.low + v * W), high[v] = load(out.high + v * W);
    }
    s[v] = -(shift[v] * k[v]);
  }
  for (int r = 0; r < n; ++r) {
    if (V * W > LINE) prefetch(ahead[r] + j + LINE);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec<T> x = load(row[r] + j + v * W), d = fma(x, k[v], s[v]), q = d * d;
      low[v] = min(low[v], x);
      high[v] = max(high[v], x);
      sum[v] += abs(x);
      s1[v] = v % 2 ? fma(d, splat<T>(1), s1[v]) : s1[v] + d;  // the same value, by the multiplier or by the adder
      s2[v] += q;
      s3[v] = fma(q, d, s3[v]);
      s4[v] = fma(q, q, s4[v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    store(out.s1 + v * W, s1[v]);
    store(out.s2 + v * W, s2[v]);
    store(out.s3 + v * W, s3[v]);
    store(out.s4 + v * W, s4[v]);
    store(out.low + v * W, low[v]);
    store(out.high + v * W, high[v]);
    store(out.abs_sum + v * W, sum[v]);
  }
  if (!Whole && !last) return true;
  auto wrong = unsuited(low[0], high[0], shift[0], k[0], sum[0]) | distant(s1[0], s2[0], T(all));
#pragma GCC unroll 2
  for (int v = 1; v < V; ++v) wrong |= unsuited(low[v], high[v], shift[v], k[v], sum[v]) | distant(s1[v], s2[v], T(all));
  return !any(wrong);
}

// The sums of one feature with the same arithmetic, into lane i.
template <class T, int N>
void column_again(const T* x, int n, T shift, T scale, Features<T, N>& out, int i) {
  const T s = -(shift * scale);
  T s1 = 0, s2 = 0, s3 = 0, s4 = 0, sum = 0;
  for (int r = 0; r < n; ++r) {
    const T d = fma(x[r], scale, s), q = d * d;
    sum += x[r] < 0 ? -x[r] : x[r];
    s1 += d;
    s2 += q;
    s3 = fma(q, d, s3);
    s4 = fma(q, q, s4);
  }
  out.s1[i] = s1, out.s2[i] = s2, out.s3[i] = s3, out.s4[i] = s4, out.abs_sum[i] = sum;
}

// ---- the sums, neighboring vectors contiguous --------------------------------------------------------------------------------------------

// The sums and extremes of one feature of n neighboring vectors, into lane i. Also prefetches every other cache line of `ahead`, the same
// feature in the next block; side_by_side prefetches the rest.
template <class S, class T, int N>
TORCHPROBE_INLINE void feature_sums(const S* x, const S* ahead, int n, T shift, T scale, Features<T, N>& out, int i) {
  constexpr int W = width<T>;
  const Vec<T> k = splat<T>(scale), s = splat<T>(-(shift * scale)), first = splat<T>(widen(x[0]));
  Vec<T> s1[2] = {}, s2[2] = {}, s3[2] = {}, s4[2] = {}, sum[2] = {}, low[2] = {first, first}, high[2] = {first, first};
  auto add = [&](Vec<T> x, int v) __attribute__((always_inline)) {
    const Vec<T> d = fma(x, k, s), q = d * d;
    low[v] = min(low[v], x);
    high[v] = max(high[v], x);
    s1[v] += d;
    s2[v] += q;
    s3[v] = fma(q, d, s3[v]);
    s4[v] = fma(q, q, s4[v]);
  };
  int r = 0;
  for (; r + 2 * W <= n; r += 2 * W) {
    prefetch(ahead + r);
    const Vec<T> a = load_wide(x + r), b = load_wide(x + r + W);
    add(a, 0), sum[0] += abs(a);
    add(b, 1), sum[1] += abs(b);
  }
  if (r + W <= n) {
    const Vec<T> a = load_wide(x + r);
    add(a, 0), sum[0] += abs(a);
    r += W;
  }
  if (r < n) {
    add(load_part<S>(x + r, n - r, shift), 1);  // a deviation of 0 adds nothing, and the shift lies between the extremes
    sum[1] += abs(load_part<S>(x + r, n - r, 0));
  }
  const Four powers = reduce4(s1[0] + s1[1], s2[0] + s2[1], s3[0] + s3[1], s4[0] + s4[1]);
  out.s1[i] = T(powers.a), out.s2[i] = T(powers.b), out.s3[i] = T(powers.c), out.s4[i] = T(powers.d);
  out.low[i] = reduce_min(min(low[0], low[1])), out.high[i] = reduce_max(max(high[0], high[1]));
  out.abs_sum[i] = reduce(sum[0] + sum[1]);
  out.unit[i] = 1, out.shift[i] = shift, out.scale[i] = scale;
}

// ---- one feature, repeated ----------------------------------------------------------------------------------------------------------------

// The sums of lane i about another shift, from its n values x.
template <class T, int N, bool SideBySide>
void feature_about(const T* x, int n, T shift, Features<T, N>& out, int i) {
  const T deviation = largest_deviation(x, n, 1, shift), scale = deviation > 0 ? inverse_power<T>(deviation) : T(1);
  if (SideBySide)
    feature_sums<T, T, N>(x, x, n, shift, scale, out, i);
  else
    column_again<T, N>(x, n, shift, scale, out, i);
  out.shift[i] = shift, out.scale[i] = scale;
}
template <class T, int N>
T near_mean(const Features<T, N>& f, int i, int n) {
  return f.shift[i] + f.s1[i] / T(n) / f.scale[i];
}

// Lane i from its n values x, which it overwrites; `strip` of them are in the first strip. Takes only the finite values, with a suitable unit and
// scale and the arithmetic of the layout, and adds the number of the others to `nonfinite`.
template <class T, int N, bool SideBySide>
void feature_again(T* x, int n, int strip, Features<T, N>& out, int i, double& nonfinite) {
  int kept = 0;
  for (int r = 0; r < n; ++r)
    if (is_finite(x[r])) x[kept++] = x[r];
  nonfinite += n - kept;
  n = kept;
  out.count[i] = T(n);
  out.shift[i] = out.s1[i] = out.s2[i] = out.s3[i] = out.s4[i] = out.low[i] = out.high[i] = out.abs_sum[i] = 0;
  out.scale[i] = out.unit[i] = 1;
  const T largest = largest_deviation(x, n, 1, T(0));
  if (largest == 0) return;
  const T unit = inverse_power<T>(largest);
  T low = x[0], high = x[0];
  for (int r = 0; r < n; ++r) {
    low = x[r] < low ? x[r] : low;
    high = x[r] > high ? x[r] : high;
    x[r] *= unit;
  }
  if (SideBySide) {
    feature_about<T, N, true>(x, n, median(x[0], x[quarter_of(n, 1)], x[quarter_of(n, 2)], x[quarter_of(n, 3)]), out, i);
  } else {
    feature_about<T, N, false>(x, n, sample_shift(n < strip ? n : strip, [&](int r) { return x[r]; }), out, i);
    if (distant(out.s1[i], out.s2[i], T(n))) feature_about<T, N, false>(x, n, near_mean(out, i, n), out, i);
  }
  out.unit[i] = unit, out.low[i] = low, out.high[i] = high;
}

// ---- into the partial state --------------------------------------------------------------------------------------------------------------

// 1/x for a power of two.
TORCHPROBE_INLINE double inverse(double power) {
  int64_t bits;
  __builtin_memcpy(&bits, &power, 8);
  bits = (int64_t(2046) << 52) - bits;
  __builtin_memcpy(&power, &bits, 8);
  return power;
}
TORCHPROBE_INLINE vdouble inverse(vdouble power) { return (vdouble)((int64_t(2046) << 52) - (vlong)power); }

// Merges features of a tile into the partial state, starting at lane i: na values were seen before, nb are new.
template <class E, class T, int N>
TORCHPROBE_INLINE void merge_lanes(const Features<T, N>& f, int i, const Rows& to, E na, E nb, E inverse_nb, const Weights<E>& w) {
  const E s1 = load_as<E>(f.s1 + i), s2 = load_as<E>(f.s2 + i), s3 = load_as<E>(f.s3 + i), s4 = load_as<E>(f.s4 + i);
  const E unit = inverse(load_as<E>(f.unit + i)), u = unit * inverse(load_as<E>(f.scale + i)), u2 = u * u, zero{};
  // From powers about the shift to powers about the mean.
  const E m = s1 * inverse_nb, mm = m * m, nmm = nb * mm;
  const E m2 = fma(-s1, m, s2), m3 = fma(m, fma(2.0 + zero, nmm, -3.0 * s2), s3);
  const E m4 = fma(mm, fma(6.0 + zero, s2, -3.0 * nmm), fma(-4.0 * m, s3, s4));
  const E mean = fma(m, u, load_as<E>(f.shift + i) * unit);
  merge_moments<E>(to, i, {mean, E(m2 > 0 ? m2 : zero) * u2, m3 * (u2 * u), E(m4 > 0 ? m4 : zero) * (u2 * u2)}, w);
  merge_extremes<E>(to, i, load_as<E>(f.low + i), load_as<E>(f.high + i), na, nb);
  store_as(to.abs_sum + i, fma(load_as<E>(f.abs_sum + i), unit, load_as<E>(to.abs_sum + i)));
}

// For features that have all seen `seen` values; n values are new.
template <class T, int N>
TORCHPROBE_INLINE void merge_features(const Features<T, N>& f, int lanes, double n, double seen, const Rows& to) {
  constexpr int W = width<double>;
  const double inverse_n = 1 / n, share = 1 / (seen + n);
  const Weights<double> one(seen, seen * share, n * share);
  const Weights<vdouble> several(splat(seen), splat(seen * share), splat(n * share));
  int i = 0;
  for (; i + W <= lanes; i += W) merge_lanes<vdouble>(f, i, to, splat(seen), splat(n), splat(inverse_n), several);
  for (; i < lanes; ++i) merge_lanes<double>(f, i, to, seen, n, inverse_n, one);
}

// For features with different counts; f.count is the number of new values of each.
template <class E, class T, int N>
TORCHPROBE_INLINE void merge_lanes_apart(const Features<T, N>& f, int i, const Rows& to) {
  const E na = load_as<E>(to.count + i), nb = load_as<E>(f.count + i), n = na + nb, zero{}, one = zero + 1.0;
  const E inverse_n = 1.0 / E(n > 0 ? n : one), inverse_nb = E(nb > 0 ? 1.0 / E(nb > 0 ? nb : one) : zero);
  merge_lanes<E>(f, i, to, na, nb, inverse_nb, Weights<E>(na, E(na * inverse_n), E(nb * inverse_n)));
  store_as(to.count + i, n);
}
template <class T, int N>
void merge_features_apart(const Features<T, N>& f, int lanes, const Rows& to) {
  int i = 0;
  for (; i + width<double> <= lanes; i += width<double>) merge_lanes_apart<vdouble>(f, i, to);
  for (; i < lanes; ++i) merge_lanes_apart<double>(f, i, to);
}
