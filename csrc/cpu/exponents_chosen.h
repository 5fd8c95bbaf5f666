// Which vectors of a call are read closely. Part of exponents.cpp, inside its namespace.

constexpr int64_t VECTORS_TAKEN = 16, VALUES_TAKEN = int64_t(1) << 13, STRATUM_TAKEN = 4;

template <class T, class I>
T from_bits(I bits) {
  T value;
  static_assert(sizeof bits == sizeof value);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int bin_of(double size) {
  uint64_t bits;
  std::memcpy(&bits, &size, sizeof bits);
  const int exponent = int(bits >> 52) - 1023;  // a subnormal double is in the first bin
  return std::clamp(exponent - LOWEST_EXPONENT + 1, 0, EXPONENT_BINS - 1);
}

// Numbers of the vectors that are taken, by stratum, and their weights: the same rule as in torchprobe/ops/exponents.py.
struct Chosen {
  std::vector<int64_t> vectors;
  std::vector<double> weights;
};

// The octave of the largest value of each vector; NO_STRATUM if it has none that is finite and not 0.
constexpr uint16_t NO_STRATUM = EXPONENT_BINS;
template <class T, class I>
std::vector<uint16_t> strata_of(const std::vector<I>& peaks) {
  constexpr int MANTISSA = sizeof(I) == 4 ? 23 : 52, BIAS = sizeof(I) == 4 ? 127 : 1023;
  std::vector<uint16_t> strata(peaks.size());
  for (size_t v = 0; v < peaks.size(); ++v) {
    const int exponent = int(peaks[v] >> MANTISSA) - BIAS;
    const bool normal = exponent > -BIAS && exponent >= LOWEST_EXPONENT && exponent <= HIGHEST_EXPONENT;
    strata[v] = uint16_t(normal ? exponent - LOWEST_EXPONENT + 1 : peaks[v] > 0 ? bin_of(double(from_bits<T>(peaks[v]))) : NO_STRATUM);
  }
  return strata;
}

// How many vectors each stratum has. Neighbors are often in the same one, so four tables take turns: no count waits for the one before it.
std::vector<int64_t> members_of(const std::vector<uint16_t>& strata) {
  std::vector<uint32_t> found[4];
  for (auto& table : found) table.assign(NO_STRATUM + 1, 0);
  for (size_t v = 0; v < strata.size(); ++v) ++found[v % 4][strata[v]];
  std::vector<int64_t> members(EXPONENT_BINS);
  for (size_t s = 0; s < EXPONENT_BINS; ++s) members[s] = int64_t(found[0][s]) + found[1][s] + found[2][s] + found[3][s];
  return members;
}

// Numbers of the vectors of one stratum with n members of which `take` are taken: vector r is, if ⌊(r + 1)·take / n⌋ > ⌊r·take / n⌋.
void take_from(const std::vector<uint16_t>& strata, uint16_t stratum, int64_t n, int64_t take, std::vector<int64_t>& vectors) {
  constexpr size_t BLOCK = 128;  // counted at once
  int64_t rank = 0, taken = 0, next = 0;  // of the first vector of the block, of those taken, and the rank that is taken next
  for (size_t begin = 0; begin < strata.size() && taken < take; begin += BLOCK) {
    const size_t end = std::min(begin + BLOCK, strata.size());
    uint16_t here = 0;
    for (size_t v = begin; v < end; ++v) here += uint16_t(strata[v] == stratum);
    next = ((taken + 1) * n + take - 1) / take - 1;
    if (rank + here > next) {
      int64_t r = rank;
      for (size_t v = begin; v < end && taken < take; ++v) {
        if (strata[v] != stratum) continue;
        if (r++ != next) continue;
        vectors.push_back(int64_t(v));
        next = ((++taken + 1) * n + take - 1) / take - 1;
      }
    }
    rank += here;
  }
}

template <class T, class I>
Chosen choose_vectors(const std::vector<I>& peaks, int64_t features) {
  const int64_t wanted = std::max(VECTORS_TAKEN, (VALUES_TAKEN + features - 1) / features);
  const std::vector<uint16_t> strata = strata_of<T>(peaks);
  const std::vector<int64_t> members = members_of(strata);
  const int64_t total = std::accumulate(members.begin(), members.end(), int64_t(0));
  Chosen chosen;
  for (size_t stratum = 0; stratum < EXPONENT_BINS; ++stratum) {
    const int64_t n = members[stratum];
    if (!n) continue;
    const int64_t take = std::min(n, std::max(n * wanted / total, STRATUM_TAKEN));
    take_from(strata, uint16_t(stratum), n, take, chosen.vectors);
    chosen.weights.resize(chosen.vectors.size(), double(n) / double(take));
  }
  return chosen;
}
