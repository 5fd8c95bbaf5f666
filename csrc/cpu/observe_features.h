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

// Whether a feature must be repeated because its shift is far from its mean: the powers about the mean would be small differences of the sums of
// its n values. An outlier among the samples or two clusters of values are enough for that. Few values have few roundings.
constexpr int FEW = 4;
template <class V, class T>
TORCHPROBE_INLINE auto distant(V s1, V s2, V s3, V s4, T n) {
  const V m = s1 * (1 / n), mm = m * m;
  const V m2 = s2 - s1 * m, m4 = s4 - 4.0f * m * s3 + mm * (6.0f * s2 - 3.0f * n * mm), terms = s4 + 4.0f * abs(m * s3) + 6.0f * mm * s2;
  const T most = n < FEW ? T(__builtin_inf()) : Limits<T>::strain * (n < RUN ? RUN / n : 1);
  return (terms > most * m4) | (6.0f * s2 > most * m2);
}

// Twice the median.
template <class V>
TORCHPROBE_INLINE V middle(V a, V b, V c, V d) {
  return max(min(a, b), min(c, d)) + min(max(a, b), max(c, d));
}
// The shift of a feature: the median of the means of four times N neighbors from its first strip, so that an outlier does no harm. value(r) is that of
// row r < n. Of fewer than 16 values it is the median of four of them, and of fewer than four the first one.
template <int N, class F>
TORCHPROBE_INLINE auto sample_shift(int n, F value) {
  using V = decltype(value(0));
  if (n < 4) return value(0);
  const int second = n / 4, third = n / 2, fourth = n * 3 / 4;
  if (n < 16) return V(middle(value(0), value(second), value(third), value(fourth)) * 0.5f);
  auto sum = [&](int r) __attribute__((always_inline)) {
    const V two = value(r) + value(r + 1);
    return N == 2 ? two : V(two + (value(r + 2) + value(r + 3)));
  };
  return V(middle(sum(0), sum(second), sum(third), sum(fourth)) * (0.5f / N));
}
constexpr int samples_of(bool side_by_side) { return side_by_side ? 2 : 4; }  // they cost more one at a time

// ---- the sums, features contiguous -------------------------------------------------------------------------------------------------------

// The sums of V·W features of a lone vector, x: all deviations are 0.
template <class T, int V>
TORCHPROBE_INLINE bool lone_sums(const T* x, const T* scales, Features<T, V * width<T>>& out) {
  bool suited = true;
#pragma GCC unroll 2
  for (int i = 0; i < V * width<T>; i += width<T>) {
    const Vec<T> value = load(x + i), k = load(scales + i), size = abs(value);
    for (T* p : {out.s1, out.s2, out.s3, out.s4}) store(p + i, Vec<T>{});
    for (T* p : {out.low, out.high, out.shift}) store(p + i, value);
    store(out.unit + i, splat<T>(1)), store(out.scale + i, k), store(out.abs_sum + i, size);
    suited &= !any(unsuited(value, value, value, k, size));
  }
  return suited;
}

// The sums of V·W neighboring features over the n rows of a strip, starting at column j. `first` and `last` say which strip it is of a tile with
// `all` rows; the result means something only after the last one. Also prefetches the cache lines of `ahead`, of type S, that the rows leave out.
template <class S, class T, int V>
TORCHPROBE_INLINE bool column_sums(const T* const* row, int n, int64_t j, const T* scales, Features<T, V * width<T>>& out, const S* const* ahead,
                                   bool first, bool last, int all) {
  constexpr int W = width<T>, LINE = 64 / sizeof(S);
  if (all == 1) return lone_sums<T, V>(row[0] + j, scales, out);
  Vec<T> k[V], s[V], low[V], high[V], sum[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    if (first) {
      store(out.unit + v * W, splat<T>(1));
      store(out.scale + v * W, load(scales + v * W));
      auto value = [&](int r) __attribute__((always_inline)) { return load(row[r] + j + v * W); };
      store(out.shift + v * W, sample_shift<samples_of(false)>(n, value));
      for (T* p : {out.s1, out.s2, out.s3, out.s4, out.abs_sum}) store(p + v * W, Vec<T>{});
      for (T* p : {out.low, out.high}) store(p + v * W, load(row[0] + j + v * W));
    }
    k[v] = load(out.scale + v * W), s[v] = -(load(out.shift + v * W) * k[v]);
    low[v] = load(out.low + v * W), high[v] = load(out.high + v * W), sum[v] = load(out.abs_sum + v * W);
  }
  for (int begin = 0; begin < n; begin += RUN) {
    const int end = n - begin < RUN ? n : begin + RUN;
    Vec<T> s1[V] = {}, s2[V] = {}, s3[V] = {}, s4[V] = {};
    for (int64_t r = begin; r < end; ++r) {
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
      add_to(out.s1 + v * W, s1[v]);
      add_to(out.s2 + v * W, s2[v]);
      add_to(out.s3 + v * W, s3[v]);
      add_to(out.s4 + v * W, s4[v]);
    }
  }
  bool suited = true;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    store(out.low + v * W, low[v]);
    store(out.high + v * W, high[v]);
    store(out.abs_sum + v * W, sum[v]);
    if (!last) continue;
    suited &= !any(unsuited(low[v], high[v], load(out.shift + v * W), k[v], sum[v]));
    if (all < FEW) continue;
    suited &= !any(distant(load(out.s1 + v * W), load(out.s2 + v * W), load(out.s3 + v * W), load(out.s4 + v * W), T(all)));
  }
  return suited;
}

// The sums of one feature with the same arithmetic, into lane i.
template <class T, int N>
void column_again(const T* x, int n, T shift, T scale, Features<T, N>& out, int i) {
  const T s = -(shift * scale);
  T all[4] = {}, sum = 0;
  for (int begin = 0; begin < n; begin += RUN) {
    T part[4] = {};
    for (int r = begin; r < n && r < begin + RUN; ++r) {
      const T d = fma(x[r], scale, s), q = d * d;
      sum += x[r] < 0 ? -x[r] : x[r];
      part[0] += d;
      part[1] += q;
      part[2] = fma(q, d, part[2]);
      part[3] = fma(q, q, part[3]);
    }
    for (int p = 0; p < 4; ++p) all[p] += part[p];
  }
  out.s1[i] = all[0], out.s2[i] = all[1], out.s3[i] = all[2], out.s4[i] = all[3], out.abs_sum[i] = sum;
}

// ---- the sums, neighboring vectors contiguous --------------------------------------------------------------------------------------------

// The sums of up to W features, before their lanes are added up.
template <class T>
using FeatureLanes = Lanes<T, 7>;
// Into features first … first + count.
template <class T, int N>
TORCHPROBE_INLINE void flush(FeatureLanes<T>& lanes, int first, int count, Features<T, N>& out) {
  lanes.sum(0, count, out.s1 + first), lanes.sum(1, count, out.s2 + first), lanes.sum(2, count, out.s3 + first), lanes.sum(3, count, out.s4 + first);
  lanes.sum(4, count, out.abs_sum + first), lanes.least(5, count, out.low + first), lanes.largest(6, count, out.high + first);
}

// The sums and extremes of one feature of n neighboring vectors, into lane i and into slot `slot` of `lanes`. Also prefetches every other
// cache line of `ahead`, the same feature in the next block; side_by_side prefetches the rest.
template <class S, class T, int N>
TORCHPROBE_INLINE void feature_sums(const S* x, const S* ahead, int n, T shift, T scale, Features<T, N>& out, int i,
                                    FeatureLanes<T>& lanes, int slot) {
  constexpr int W = width<T>, LONGEST = 2 * RUN * W;
  const Vec<T> k = splat<T>(scale), s = splat<T>(-(shift * scale)), first = splat<T>(widen(x[0]));
  Vec<T> sum[2] = {}, low[2] = {first, first}, high[2] = {first, first};
  Powers<T> all{};
  for (int r = 0; r < n;) {
    Powers<T> powers[2] = {};
    auto add = [&](Vec<T> x, int v) __attribute__((always_inline)) {
      low[v] = min(low[v], x);
      high[v] = max(high[v], x);
      powers[v].add(fma(x, k, s));
    };
    const int end = n - r < LONGEST ? n : r + LONGEST;
    for (; r + 2 * W <= end; r += 2 * W) {
      prefetch(ahead + r);
      const Vec<T> a = load_wide(x + r), b = load_wide(x + r + W);
      add(a, 0), sum[0] += abs(a);
      add(b, 1), sum[1] += abs(b);
    }
    if (r + W <= end) {
      const Vec<T> a = load_wide(x + r);
      add(a, 0), sum[0] += abs(a);
      r += W;
    }
    if (r < end) {
      add(load_part<S>(x + r, end - r, shift), 1);  // a deviation of 0 adds nothing, and the shift lies between the extremes
      sum[1] += abs(load_part<S>(x + r, end - r, 0));
      r = end;
    }
    all.add_all(powers[0], powers[1]);
  }
  const Vec<T> numbers[] = {all.s1, all.s2, all.s3, all.s4, sum[0] + sum[1], min(low[0], low[1]), max(high[0], high[1])};
  for (int k = 0; k < 7; ++k) lanes.of[k][slot] = numbers[k];
  out.unit[i] = 1, out.shift[i] = shift, out.scale[i] = scale;
}

// ---- one feature, repeated ----------------------------------------------------------------------------------------------------------------

// The sums of lane i about another shift, from its n values x.
template <class T, int N, bool SideBySide>
void feature_about(const T* x, int n, T shift, Features<T, N>& out, int i) {
  const T deviation = largest_deviation(x, n, 1, shift), scale = deviation > 0 ? inverse_power<T>(deviation) : T(1);
  if (SideBySide) {
    FeatureLanes<T> lanes;
    feature_sums<T, T, N>(x, x, n, shift, scale, out, i, lanes, 0), flush(lanes, i, 1, out);
  } else {
    column_again<T, N>(x, n, shift, scale, out, i);
  }
  out.shift[i] = shift, out.scale[i] = scale;
}
// The sums of lane i about its mean, if the shift is far from it. The sums about a very distant shift show only about where the mean is.
template <class T, int N, bool SideBySide>
void feature_nearer(const T* x, int n, Features<T, N>& out, int i) {
  for (int attempt = 0; attempt < 3 && distant(out.s1[i], out.s2[i], out.s3[i], out.s4[i], T(n)); ++attempt)
    feature_about<T, N, SideBySide>(x, n, out.shift[i] + out.s1[i] / T(n) / out.scale[i], out, i);
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
  feature_about<T, N, SideBySide>(x, n, sample_shift<samples_of(SideBySide)>(n < strip ? n : strip, [&](int r) { return x[r]; }), out, i);
  feature_nearer<T, N, SideBySide>(x, n, out, i);
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
  const double wa = seen * share, wb = seen > 0 ? n * share : 1;
  const Weights<double> one(seen, wa, wb);
  const Weights<vdouble> several(splat(seen), splat(wa), splat(wb));
  int i = 0;
  for (; i + W <= lanes; i += W) merge_lanes<vdouble>(f, i, to, splat(seen), splat(n), splat(inverse_n), several);
  for (; i < lanes; ++i) merge_lanes<double>(f, i, to, seen, n, inverse_n, one);
}

// For features with different counts; f.count is the number of new values of each.
template <class E, class T, int N>
TORCHPROBE_INLINE void merge_lanes_apart(const Features<T, N>& f, int i, const Rows& to) {
  const E na = load_as<E>(to.count + i), nb = load_as<E>(f.count + i), n = na + nb, zero{}, one = zero + 1.0;
  const E inverse_n = 1.0 / E(n > 0 ? n : one), inverse_nb = E(nb > 0 ? 1.0 / E(nb > 0 ? nb : one) : zero);
  const E wb = E(na > 0 ? nb * inverse_n : one);  // n · (1 / n) may be less than 1: then a constant feature would seem to vary
  merge_lanes<E>(f, i, to, na, nb, inverse_nb, Weights<E>(na, E(na * inverse_n), wb));
  store_as(to.count + i, n);
}
template <class T, int N>
void merge_features_apart(const Features<T, N>& f, int lanes, const Rows& to) {
  int i = 0;
  for (; i + width<double> <= lanes; i += width<double>) merge_lanes_apart<vdouble>(f, i, to);
  for (; i < lanes; ++i) merge_lanes_apart<double>(f, i, to);
}
