// The vector operations that the kernels need, for one instruction set: see isa_begin.h, which includes this file inside a namespace.
// Arithmetic uses the compiler's vector types. This file adds only what they lack.

#if defined(TORCHPROBE_AVX512)
constexpr int VECTOR_BYTES = 64;
constexpr int REGISTERS = 32;
#elif defined(TORCHPROBE_AVX2)
constexpr int VECTOR_BYTES = 32;
constexpr int REGISTERS = 16;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int REGISTERS = 16;
#endif

#define TORCHPROBE_INLINE inline __attribute__((always_inline))

typedef float vfloat __attribute__((vector_size(VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t vlong __attribute__((vector_size(VECTOR_BYTES)));

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using V = vfloat;
  using I = vint;
  static constexpr int W = VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  using V = vdouble;
  using I = vlong;
  static constexpr int W = VECTOR_BYTES / 8;
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
constexpr int width = Simd<T>::W;

template <class T>
TORCHPROBE_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
TORCHPROBE_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
TORCHPROBE_INLINE void add_to(T* p, Vec<T> v) {
  store(p, load(p) + v);
}
template <class T>
TORCHPROBE_INLINE Vec<T> splat(T s) {
  return s - Vec<T>{};  // a broadcast, since x − 0 is x for every x
}
// One double or a vector of doubles (E), from an array of floats or doubles.
typedef float vhalf __attribute__((vector_size(VECTOR_BYTES / 2)));
template <class E>
TORCHPROBE_INLINE E load_as(const float* p) {
  if constexpr (sizeof(E) == sizeof(double)) {
    return *p;
  } else {
#if defined(TORCHPROBE_AVX512)
    return (vdouble)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#else
    vhalf v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vdouble);
#endif
  }
}
template <class E>
TORCHPROBE_INLINE E load_as(const double* p) {
  E v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class E>
TORCHPROBE_INLINE void store_as(double* p, E v) {
  __builtin_memcpy(p, &v, sizeof v);
}

TORCHPROBE_INLINE vfloat abs(vfloat v) { return (vfloat)((vint)v & 0x7fffffff); }
TORCHPROBE_INLINE vdouble abs(vdouble v) { return (vdouble)((vlong)v & 0x7fffffffffffffff); }
TORCHPROBE_INLINE float abs(float v) { return __builtin_fabsf(v); }
TORCHPROBE_INLINE double abs(double v) { return __builtin_fabs(v); }

// fma is a·b + c, rounded once if the hardware can do that. Scalars and vectors are rounded in the same way.
// min and max return the second operand if one operand is nan. Bit i of gt says whether a[i] > b[i].
#if defined(TORCHPROBE_AVX512)
TORCHPROBE_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
TORCHPROBE_INLINE vdouble fma(vdouble a, vdouble b, vdouble c) { return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
TORCHPROBE_INLINE vfloat min(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
TORCHPROBE_INLINE vfloat max(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
TORCHPROBE_INLINE vdouble min(vdouble a, vdouble b) { return (vdouble)_mm512_min_pd((__m512d)a, (__m512d)b); }
TORCHPROBE_INLINE vdouble max(vdouble a, vdouble b) { return (vdouble)_mm512_max_pd((__m512d)a, (__m512d)b); }
TORCHPROBE_INLINE uint32_t gt(vfloat a, vfloat b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
TORCHPROBE_INLINE uint32_t gt(vdouble a, vdouble b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ); }
#elif defined(TORCHPROBE_AVX2)
TORCHPROBE_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
TORCHPROBE_INLINE vdouble fma(vdouble a, vdouble b, vdouble c) { return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
TORCHPROBE_INLINE vfloat min(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps((__m256)a, (__m256)b); }
TORCHPROBE_INLINE vfloat max(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps((__m256)a, (__m256)b); }
TORCHPROBE_INLINE vdouble min(vdouble a, vdouble b) { return (vdouble)_mm256_min_pd((__m256d)a, (__m256d)b); }
TORCHPROBE_INLINE vdouble max(vdouble a, vdouble b) { return (vdouble)_mm256_max_pd((__m256d)a, (__m256d)b); }
TORCHPROBE_INLINE uint32_t gt(vfloat a, vfloat b) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)); }
TORCHPROBE_INLINE uint32_t gt(vdouble a, vdouble b) { return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)); }
#else
template <class V>
TORCHPROBE_INLINE V fma(V a, V b, V c) { return a * b + c; }
template <class V>
TORCHPROBE_INLINE V min(V a, V b) { return a < b ? a : b; }
template <class V>
TORCHPROBE_INLINE V max(V a, V b) { return a > b ? a : b; }
template <class V>
TORCHPROBE_INLINE uint32_t gt(V a, V b) {
  uint32_t bits = 0;
  for (int i = 0; i < int(sizeof(V) / sizeof(a[0])); ++i) bits |= uint32_t(a[i] > b[i]) << i;
  return bits;
}
#endif
TORCHPROBE_INLINE float min(float a, float b) { return a < b ? a : b; }
TORCHPROBE_INLINE float max(float a, float b) { return a > b ? a : b; }
TORCHPROBE_INLINE double min(double a, double b) { return a < b ? a : b; }
TORCHPROBE_INLINE double max(double a, double b) { return a > b ? a : b; }
#if defined(TORCHPROBE_AVX512) || defined(TORCHPROBE_AVX2)
TORCHPROBE_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TORCHPROBE_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

// Whether a comparison is true in any lane.
template <class I>
TORCHPROBE_INLINE bool any(I mask) {
#if defined(TORCHPROBE_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(TORCHPROBE_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  const vlong bits = (vlong)mask;
  return (bits[0] | bits[1]) != 0;
#endif
}

// The sum, the minimum and the maximum of the lanes. The upper half is combined with the lower half until one lane is left.
template <class V, class F>
TORCHPROBE_INLINE auto fold_lanes(V v, F f) {
  constexpr int W = sizeof(V) / sizeof(v[0]);
  std::remove_reference_t<decltype(v[0])> lanes[W];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = f(lanes[i], lanes[i + half]);
  return lanes[0];
}
template <class V>
TORCHPROBE_INLINE auto reduce(V v) {
  return fold_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
template <class V>
TORCHPROBE_INLINE auto reduce_min(V v) {
  return fold_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return a < b ? a : b; });
}
template <class V>
TORCHPROBE_INLINE auto reduce_max(V v) {
  return fold_lanes(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}
#if defined(TORCHPROBE_AVX512)
TORCHPROBE_INLINE __m128 quarter(__m256 v, bool high) { return high ? _mm256_extractf128_ps(v, 1) : _mm256_castps256_ps128(v); }
TORCHPROBE_INLINE __m256 half(vfloat v, bool high) {
  return high ? _mm512_extractf32x8_ps((__m512)v, 1) : _mm512_castps512_ps256((__m512)v);
}
#define TORCHPROBE_FOLD(NAME, OP)                                                                   \
  TORCHPROBE_INLINE float NAME(vfloat v) {                                                          \
    const __m256 a = _mm256_##OP##_ps(half(v, false), half(v, true));                               \
    __m128 b = _mm_##OP##_ps(quarter(a, false), quarter(a, true));                                  \
    b = _mm_##OP##_ps(b, _mm_movehl_ps(b, b));                                                      \
    return _mm_cvtss_f32(_mm_##OP##_ss(b, _mm_movehdup_ps(b)));                                     \
  }
TORCHPROBE_FOLD(reduce, add)
TORCHPROBE_FOLD(reduce_min, min)
TORCHPROBE_FOLD(reduce_max, max)
#undef TORCHPROBE_FOLD
#endif
// Half precision in memory, float in registers.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
TORCHPROBE_INLINE double widen(double x) { return x; }
TORCHPROBE_INLINE float widen(float x) { return x; }
TORCHPROBE_INLINE float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
TORCHPROBE_INLINE float widen(Float16 x) {
  // Shifts the bits into place. One multiplication then corrects the exponent, also of subnormal numbers.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float f;
  __builtin_memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // inf and nan
  bits |= uint32_t(x.bits & 0x8000) << 16;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
TORCHPROBE_INLINE vdouble load_wide(const double* p) { return load<double>(p); }
TORCHPROBE_INLINE vfloat load_wide(const float* p) { return load<float>(p); }
#if defined(TORCHPROBE_AVX2)
TORCHPROBE_INLINE vfloat widen_all(__m128i bits, BFloat16) { return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16); }
TORCHPROBE_INLINE vfloat widen_all(__m128i bits, Float16) { return (vfloat)_mm256_cvtph_ps(bits); }
#endif
TORCHPROBE_INLINE vfloat load_wide(const BFloat16* p) {
#if defined(TORCHPROBE_AVX512)
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(TORCHPROBE_AVX2)
  return widen_all(_mm_loadu_si128((const __m128i*)p), *p);
#else
  vfloat v;
  for (int i = 0; i < width<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}
TORCHPROBE_INLINE vfloat load_wide(const Float16* p) {
#if defined(TORCHPROBE_AVX512)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(TORCHPROBE_AVX2)
  return widen_all(_mm_loadu_si128((const __m128i*)p), *p);
#else
  vfloat v;
  for (int i = 0; i < width<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

// The first n lanes from memory; the other lanes are `fill`.
template <class S>
TORCHPROBE_INLINE auto load_part(const S* p, int64_t n, decltype(widen(S{})) fill) {
#if defined(TORCHPROBE_AVX512)
  if constexpr (sizeof(S) == 4) {
    return (vfloat)_mm512_mask_loadu_ps((__m512)splat<float>(fill), __mmask16((1u << n) - 1), p);
  } else if constexpr (sizeof(S) == 8) {
    return (vdouble)_mm512_mask_loadu_pd((__m512d)splat<double>(fill), __mmask8((1u << n) - 1), p);
  } else {
    const __mmask16 lanes = __mmask16((1u << n) - 1);
    S whole[16];
    _mm256_storeu_si256((__m256i*)whole, _mm256_maskz_loadu_epi16(lanes, p));
    return (vfloat)_mm512_mask_mov_ps((__m512)splat<float>(fill), lanes, (__m512)load_wide(whole));
  }
#else
  using T = decltype(widen(S{}));
#if defined(TORCHPROBE_AVX2)
  if constexpr (sizeof(S) == 4) {
    const vint used = (vint)_mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return (vfloat)_mm256_blendv_ps((__m256)splat<float>(fill), _mm256_maskload_ps(p, (__m256i)used), (__m256)used);
  } else if constexpr (sizeof(S) == 8) {
    const vlong used = (vlong)_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
    return (vdouble)_mm256_blendv_pd((__m256d)splat<double>(fill), _mm256_maskload_pd(p, (__m256i)used), (__m256d)used);
  }
  if constexpr (sizeof(S) == 2) {  // eight elements, from two loads that overlap
    uint64_t low = 0, high = 0;
    if (n >= 4) {
      __builtin_memcpy(&low, p, 8);
      __builtin_memcpy(&high, p + n - 4, 8);
      high = n == 4 ? 0 : high >> 16 * (8 - n);
    } else {
      for (int i = 0; i < n; ++i) low |= uint64_t(p[i].bits) << 16 * i;
    }
    const __m128i bits = _mm_set_epi64x(int64_t(high), int64_t(low));
    const __m256i used = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return (vfloat)_mm256_blendv_ps((__m256)splat<float>(fill), (__m256)widen_all(bits, S{}), (__m256)used);
  }
#endif
  T lanes[width<T>];
  for (int i = 0; i < width<T>; ++i) lanes[i] = i < n ? widen(p[i]) : fill;
  return load<T>(lanes);
#endif
}

// Lane i of the result is lane I of a, or lane I − W of b.
#if !defined(__has_builtin)
#define __has_builtin(x) 0
#endif
template <int... I, class V>
TORCHPROBE_INLINE V permute(V a, V b, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else
  constexpr int W = sizeof...(I);
  V v;
  int lane = 0;
  ((v[lane++] = I < W ? a[I % W] : b[I % W]), ...);
  return v;
#endif
}
// Transposes W vectors of W lanes in place, by log2(W) rounds of a perfect shuffle.
template <class V, int... I>
TORCHPROBE_INLINE void transpose(V* v, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    V t[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      t[2 * i] = permute(v[i], v[i + W / 2], std::integer_sequence<int, (I / 2 + (I % 2) * W)...>());
      t[2 * i + 1] = permute(v[i], v[i + W / 2], std::integer_sequence<int, (W / 2 + I / 2 + (I % 2) * W)...>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = t[i];
  }
}
template <class V>
TORCHPROBE_INLINE void transpose(V* v) {
  transpose(v, std::make_integer_sequence<int, sizeof(V) / sizeof(v[0][0])>());
}
// Lane i of the result is what fold_lanes would make of v[i], in the same order. There are W vectors; it overwrites them.
template <int HALF, class V, class F, int... I>
TORCHPROBE_INLINE V fold_each(V* v, F f, std::integer_sequence<int, I...> lanes) {
  constexpr int W = sizeof...(I);
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i)
    v[i] = f(permute(v[i], v[i + HALF], std::integer_sequence<int, (I % (2 * HALF) < HALF ? I : W + I - HALF)...>()),
             permute(v[i], v[i + HALF], std::integer_sequence<int, (I % (2 * HALF) < HALF ? I + HALF : W + I)...>()));
  if constexpr (HALF > 1) return fold_each<HALF / 2>(v, f, lanes);
  return v[0];
}
template <class V, class F>
TORCHPROBE_INLINE V fold_each(V* v, F f) {
  constexpr int W = sizeof(V) / sizeof(v[0][0]);
  return fold_each<W / 2>(v, f, std::make_integer_sequence<int, W>());
}

// Up to W times K vectors, whose lanes are to be added up, or whose least or largest lane is to be found. `to` gets one number for each.
template <class T, int K>
struct Lanes {
  static constexpr int W = width<T>, FEW = 4;
  Vec<T> of[K][W];

  TORCHPROBE_INLINE void sum(int k, int count, T* to) {
    fold(k, count, to, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }
  TORCHPROBE_INLINE void least(int k, int count, T* to) {
    fold(k, count, to, [](auto a, auto b) __attribute__((always_inline)) { return min(a, b); });
  }
  TORCHPROBE_INLINE void largest(int k, int count, T* to) {
    fold(k, count, to, [](auto a, auto b) __attribute__((always_inline)) { return max(a, b); });
  }

 private:
  // The rest of a register of `to` is overwritten if there are more than a few.
  template <class F>
  TORCHPROBE_INLINE void fold(int k, int count, T* to, F f) {
    if (count < FEW && count < W) {
      for (int i = 0; i < count; ++i) to[i] = fold_lanes(of[k][i], f);
      return;
    }
    for (int i = count; i < W; ++i) of[k][i] = of[k][0];
    store(to, fold_each(of[k], f));
  }
};
