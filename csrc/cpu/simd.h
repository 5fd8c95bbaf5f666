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

// The sums of the lanes of four vectors, widened to double.
struct Four {
  double a, b, c, d;
};
#if defined(TORCHPROBE_AVX512) || defined(TORCHPROBE_AVX2)
#if defined(TORCHPROBE_AVX512)
TORCHPROBE_INLINE __m256 fold(vfloat v) {
  return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
}
#else
TORCHPROBE_INLINE __m256 fold(vfloat v) { return (__m256)v; }
#endif
TORCHPROBE_INLINE Four reduce4(vfloat a, vfloat b, vfloat c, vfloat d) {
  const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
  float lanes[4];
  _mm_storeu_ps(lanes, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
  return {lanes[0], lanes[1], lanes[2], lanes[3]};
}
#endif
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
template <class V>
TORCHPROBE_INLINE Four reduce4(V a, V b, V c, V d) {
  return {reduce(a), reduce(b), reduce(c), reduce(d)};
}

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
TORCHPROBE_INLINE vfloat load_wide(const BFloat16* p) {
#if defined(TORCHPROBE_AVX512)
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(TORCHPROBE_AVX2)
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
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
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
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
  T lanes[width<T>];
  for (int i = 0; i < width<T>; ++i) lanes[i] = i < n ? widen(p[i]) : fill;
  return load<T>(lanes);
#endif
}

// Transposes W vectors of W lanes in place, by log2(W) rounds of a perfect shuffle.
#if !defined(__has_builtin)
#define __has_builtin(x) 0
#endif
#if __has_builtin(__builtin_shufflevector)
template <class V, int... I>
TORCHPROBE_INLINE void interleave(V a, V b, V& low, V& high, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
  low = __builtin_shufflevector(a, b, (I / 2 + (I % 2) * W)...);
  high = __builtin_shufflevector(a, b, (W / 2 + I / 2 + (I % 2) * W)...);
}
#else
template <class V, int... I>
TORCHPROBE_INLINE void interleave(V a, V b, V& low, V& high, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
  ((low[I] = (I % 2 ? b : a)[I / 2], high[I] = (I % 2 ? b : a)[W / 2 + I / 2]), ...);
}
#endif
template <class V>
TORCHPROBE_INLINE void transpose(V* v) {
  constexpr int W = sizeof(V) / sizeof(v[0][0]);
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    V t[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) interleave(v[i], v[i + W / 2], t[2 * i], t[2 * i + 1], std::make_integer_sequence<int, W>());
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = t[i];
  }
}
