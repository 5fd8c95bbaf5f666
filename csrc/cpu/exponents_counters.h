// Carry-save counters of exponents in bytes, for one instruction set with byte lookups in registers; exponents_kernel.h includes this file.
//
// Two lookups (pshufb) turn the bytes of an input into 16 bits each, one of which is set: how far the exponent is below the largest one of a window.
// So the count of an exponent is the number of set bits at a place, which carry-save adders keep (Harley & Seal; Muła, Kurz & Lemire, Computer
// Journal 61(1), 2018): vectors of bits of equal weight are added three at a time to one of that weight and one of twice of it.

typedef unsigned char vbytes __attribute__((vector_size(VECTOR_BYTES)));
constexpr int INPUT = 4, INPUT_VALUES = INPUT * width<float>;  // vectors, and values, whose exponents fill one vector with bytes
constexpr unsigned char WITHIN = 0x80 - WINDOW;                // added to a distance below WINDOW, the highest bit stays 0

#if defined(TORCHPROBE_AVX512)
TORCHPROBE_INLINE vint larger(vint a, vint b) { return (vint)_mm512_max_epi32((__m512i)a, (__m512i)b); }
TORCHPROBE_INLINE vbytes larger(vbytes a, vbytes b) { return (vbytes)_mm512_max_epu8((__m512i)a, (__m512i)b); }
TORCHPROBE_INLINE vint smaller_unsigned(vint a, vint b) { return (vint)_mm512_min_epu32((__m512i)a, (__m512i)b); }
// Four vectors of numbers below 256 as the bytes of one, in some order.
TORCHPROBE_INLINE vbytes pack_bytes(vint a, vint b, vint c, vint d) {
  return (vbytes)_mm512_packus_epi16(_mm512_packus_epi32((__m512i)a, (__m512i)b), _mm512_packus_epi32((__m512i)c, (__m512i)d));
}
TORCHPROBE_INLINE vbytes add_saturated(vbytes a, vbytes b) { return (vbytes)_mm512_adds_epu8((__m512i)a, (__m512i)b); }
TORCHPROBE_INLINE vint look_up(__m128i table, vbytes places) {
  return (vint)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)places);
}
TORCHPROBE_INLINE uint64_t highest_bits(vbytes v) { return _mm512_movepi8_mask((__m512i)v); }
TORCHPROBE_INLINE uint64_t zero_bytes(vbytes v) { return _mm512_testn_epi8_mask((__m512i)v, (__m512i)v); }
// The sum and the carry of three bits.
TORCHPROBE_INLINE vint sum_bit(vint a, vint b, vint c) { return (vint)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96); }
TORCHPROBE_INLINE vint carry_bit(vint a, vint b, vint c) { return (vint)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0xe8); }
#else
TORCHPROBE_INLINE vint larger(vint a, vint b) { return (vint)_mm256_max_epi32((__m256i)a, (__m256i)b); }
TORCHPROBE_INLINE vbytes larger(vbytes a, vbytes b) { return (vbytes)_mm256_max_epu8((__m256i)a, (__m256i)b); }
TORCHPROBE_INLINE vint smaller_unsigned(vint a, vint b) { return (vint)_mm256_min_epu32((__m256i)a, (__m256i)b); }
TORCHPROBE_INLINE vbytes pack_bytes(vint a, vint b, vint c, vint d) {
  return (vbytes)_mm256_packus_epi16(_mm256_packus_epi32((__m256i)a, (__m256i)b), _mm256_packus_epi32((__m256i)c, (__m256i)d));
}
TORCHPROBE_INLINE vbytes add_saturated(vbytes a, vbytes b) { return (vbytes)_mm256_adds_epu8((__m256i)a, (__m256i)b); }
TORCHPROBE_INLINE vint look_up(__m128i table, vbytes places) {
  return (vint)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)places);
}
TORCHPROBE_INLINE uint64_t highest_bits(vbytes v) { return uint32_t(_mm256_movemask_epi8((__m256i)v)); }
TORCHPROBE_INLINE uint64_t zero_bytes(vbytes v) { return highest_bits((vbytes)_mm256_cmpeq_epi8((__m256i)v, __m256i{})); }
TORCHPROBE_INLINE vint sum_bit(vint a, vint b, vint c) { return a ^ b ^ c; }
TORCHPROBE_INLINE vint carry_bit(vint a, vint b, vint c) { return (a & b) | (c & (a ^ b)); }
#endif
TORCHPROBE_INLINE vint load_int(const void* p) {
  vint v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TORCHPROBE_INLINE void store_int(void* p, vint v) { __builtin_memcpy(p, &v, sizeof v); }

// The largest exponent of a window, with its bias.
TORCHPROBE_INLINE int top_of(const ExponentCounts& counts, int window) { return counts.first + WINDOW * window - 1; }

// The sum of the bits at each place of a half, times the weight, to the bins.
TORCHPROBE_INLINE void add_bits(ExponentCounts& counts, int window, int half, const unsigned char* vector, int64_t weight) {
  uint64_t words[VECTOR_BYTES / 8];
  __builtin_memcpy(words, vector, sizeof words);
  for (int bit = 0; bit < 8; ++bit) {
    int64_t found = 0;
    for (const uint64_t word : words) found += __builtin_popcountll(word & 0x0101010101010101 << bit);
    const int field = top_of(counts, window) - 8 * half - bit;
    if (found) counts.bins[field - FloatBits<float>::bias - LOWEST_EXPONENT + 1] += found * weight;
  }
}

// Adds what is counted of one window to the bins.
void empty_window(ExponentCounts& counts, int window) {
  SlicedCounters& sliced = counts.windows[window];
  for (int half = 0; half < 2 && sliced.begun; ++half) {
    add_bits(counts, window, half, sliced.ones[half], 1);
    add_bits(counts, window, half, sliced.twos[half], 2);
    add_bits(counts, window, half, sliced.fours[half], 4);
    for (int level = 0; sliced.added >> level; ++level) {
      add_bits(counts, window, half, sliced.sums[level][half], int64_t(8) << level);
      if (sliced.added >> level & 1) add_bits(counts, window, half, sliced.waiting[level][half], int64_t(8) << level);
    }
  }
  sliced.added = 0;
  sliced.begun = false;
}

// The two halves of the places of an input, one bit in each byte of one of them; or bits of equal weight of many.
struct Halves {
  vint low, high;
};

TORCHPROBE_INLINE Halves bits_of(vbytes places) {
  return {look_up(_mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0), places),
          look_up(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, -128), places)};
}

// Adds b and c to a; returns the carry.
TORCHPROBE_INLINE Halves add_carry(Halves& a, Halves b, Halves c) {
  const Halves carry{carry_bit(a.low, b.low, c.low), carry_bit(a.high, b.high, c.high)};
  a = {sum_bit(a.low, b.low, c.low), sum_bit(a.high, b.high, c.high)};
  return carry;
}

TORCHPROBE_INLINE Halves load_halves(const unsigned char (&from)[2][COUNTER_BYTES]) { return {load_int(from[0]), load_int(from[1])}; }
TORCHPROBE_INLINE void store_halves(unsigned char (&to)[2][COUNTER_BYTES], Halves v) { store_int(to[0], v.low), store_int(to[1], v.high); }

// What a loop holds of a window: bits of the weights 1, 2 and 4.
struct Counters {
  Halves ones, twos, fours;
};

TORCHPROBE_INLINE Counters begin_window(SlicedCounters& sliced) {
  if (!sliced.begun) store_halves(sliced.ones, Halves{}), store_halves(sliced.twos, Halves{}), store_halves(sliced.fours, Halves{});
  sliced.begun = true;
  return {load_halves(sliced.ones), load_halves(sliced.twos), load_halves(sliced.fours)};
}
TORCHPROBE_INLINE void leave_window(SlicedCounters& sliced, const Counters& counters) {
  store_halves(sliced.ones, counters.ones), store_halves(sliced.twos, counters.twos), store_halves(sliced.fours, counters.fours);
}

// Adds bits of weight 8 to the counters of a window.
TORCHPROBE_INLINE void add_eights(ExponentCounts& counts, int window, Halves eights) {
  SlicedCounters& sliced = counts.windows[window];
  const uint32_t before = sliced.added++;
  int level = 0;
  for (; before >> level & 1; ++level) {
    Halves sums = load_halves(sliced.sums[level]);
    eights = add_carry(sums, load_halves(sliced.waiting[level]), eights);
    store_halves(sliced.sums[level], sums);
  }
  store_halves(sliced.waiting[level], eights);
  if (!(before & (before + 1))) store_halves(sliced.sums[level], Halves{});  // the level is reached for the first time
  if (sliced.added == FULL) {  // the bits of lower weights stay where they are
    const Counters lower{load_halves(sliced.ones), load_halves(sliced.twos), load_halves(sliced.fours)};
    leave_window(sliced, Counters{});
    empty_window(counts, window);
    sliced.begun = true;
    leave_window(sliced, lower);
  }
}

// The place of each exponent in the window with this top, or a byte with the highest bit for those outside.
TORCHPROBE_INLINE vbytes places_below(vbytes top, vbytes fields) { return add_saturated(top - fields, vbytes{} + WITHIN); }
TORCHPROBE_INLINE vbytes top_bytes(const ExponentCounts& counts, int window) { return vbytes{} + (unsigned char)top_of(counts, window); }

// Adds one input to the counters of a window.
TORCHPROBE_INLINE void add_places(ExponentCounts& counts, int window, vbytes places) {
  SlicedCounters& sliced = counts.windows[window];
  Counters counters = begin_window(sliced);
  const Halves twos = add_carry(counters.ones, bits_of(places), Halves{});
  const Halves fours = add_carry(counters.twos, twos, Halves{});
  const Halves eights = add_carry(counters.fours, fours, Halves{});
  leave_window(sliced, counters);
  if (any(eights.low | eights.high)) add_eights(counts, window, eights);
}
