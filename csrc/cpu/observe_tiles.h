// The tiles of a call, one after the other. Part of observe_kernel.h.

// What one thread keeps from tile to tile.
template <class T>
struct Run {
  const Call& call;
  double* partial;
  T* scales;   // the last suitable scale of each feature
  T* scratch;  // room for one vector
  VectorState<T> vectors;
  bool uniform = true;  // every feature has seen `seen` values; until this ends, the row of counts is out of date
  double seen;

  Run(const Call& call, double* partial, T* memory)
      : call(call),
        partial(partial),
        scales(memory),
        scratch(memory + call.scratch_row),
        vectors(partial, rows_of(partial, call.features, 0).outliers, call.features, call.outlier_sigma) {
    const double* count = rows_of(partial, call.features, 0).count;
    seen = count[0];
    for (int64_t j = 1; j < call.features && uniform; ++j) uniform = count[j] == seen;
    for (int64_t j = 0; j < call.scratch_row; ++j) scales[j] = 1;
  }

  // The first guess of all scales, from one vector.
  template <class S>
  void guess_scales(const S* x, int64_t step) {
    T largest = largest_deviation(x, call.features, step, T(widen(x[0])));
    if (!(largest > 0 && is_finite(largest)) || (largest >= T(0x1p-8) && largest <= T(0x1p8))) largest = 1;
    vectors.scale = inverse_power<T>(largest);
    for (int64_t j = 0; j < call.scratch_row; ++j) scales[j] = vectors.scale;
  }

  // From now on each feature has its own count. The features before `done` have already seen the tile of n vectors.
  void count_apart(int64_t done, int n) {
    double* count = rows_of(partial, call.features, 0).count;
    for (int64_t j = 0; j < call.features; ++j) count[j] = seen + (j < done ? n : 0);
    uniform = false;
  }
};

// Merges features j … j + lanes of a tile of n vectors into the partial state, and first repeats those that are not valid. at(i, r) is feature i
// of vector r.
template <class T, int N, bool SideBySide, class At>
TORCHPROBE_INLINE void finish_features(Features<T, N>& f, bool suited, int64_t j, int lanes, int n, Run<T>& run, At at) {
  const Rows to = rows_of(run.partial, run.call.features, j);
  if (__builtin_expect(!suited || !run.uniform, 0)) {
    bool finite = true;
    for (int i = 0; i < lanes; ++i) {
      f.count[i] = T(n);
      if (!any(unsuited(splat(f.low[i]), splat(f.high[i]), splat(f.shift[i]), splat(f.scale[i]), splat(f.abs_sum[i])))) continue;
      T x[MAX_VECTORS];
      for (int r = 0; r < n; ++r) x[r] = at(i, r);
      feature_again<T, N, SideBySide>(x, n, f, i, to.nonfinite[i]);
      const T scale = f.scale[i] * f.unit[i];
      if (scale > 0 && is_finite(scale)) run.scales[j + i] = scale;
      finite &= f.count[i] == T(n);
    }
    if (!finite && run.uniform) run.count_apart(j, n);
  }
  if (run.uniform)
    merge_features<T, N>(f, lanes, n, run.seen, to);
  else
    merge_features_apart<T, N>(f, lanes, to);
}

// Enumerates the positions of a call along its first `dims` dimensions, in order; offset is in elements.
struct Cursor {
  const Call& call;
  const int dims;
  int64_t index[MAX_DIMS], offset = 0;

  Cursor(const Call& call, int64_t vector, int dims) : call(call), dims(dims) {
    for (int d = dims - 1; d >= 0; --d) {
      index[d] = vector % call.size[d];
      vector /= call.size[d];
      offset += index[d] * call.stride[d];
    }
  }
  void next() {
    for (int d = dims - 1; d >= 0; --d) {
      offset += call.stride[d];
      if (++index[d] < call.size[d]) return;
      offset -= index[d] * call.stride[d];
      index[d] = 0;
    }
  }
};

// Writes the offsets of the vectors of the next tile, except those that are masked out. Returns their number.
inline int enumerate(const Call& call, Cursor& cursor, int64_t& vector, int64_t end, int64_t* offset) {
  int n = 0;
  for (; vector < end; ++vector, cursor.next())
    if (!call.mask || call.mask[vector]) offset[n++] = cursor.offset;
  return n;
}

// Copies n vectors whose features are not contiguous into rows. In the usual case, (N, C, H, W), neighboring positions are contiguous. Then
// blocks of W positions × W features are transposed in registers.
template <class S, class T>
void pack_tile(const S* x, const int64_t* offset, int n, const Call& call, T* to) {
  constexpr int W = width<T>;
  const int64_t features = call.features, stride = call.feature_stride;
  for (int r = 0; r < n;) {
    int run = 1;
    while (r + run < n && run < W && offset[r + run] == offset[r] + run) ++run;
    int64_t j = 0;
    const S* from = x + offset[r];
    T* rows = to + r * call.scratch_row;
    if (run == W) {
      for (; j + W <= features; j += W) {
        Vec<T> block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load_wide(from + (j + i) * stride);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(rows + i * call.scratch_row + j, block[i]);
      }
    }
    for (; j < features; ++j)
      for (int i = 0; i < run; ++i) rows[i * call.scratch_row + j] = widen(from[offset[r + i] - offset[r] + j * stride]);
    r += run;
  }
}

// ---- vectors as rows ---------------------------------------------------------------------------------------------------------------------

template <class T>
TORCHPROBE_INLINE void observe_columns(T* const* row, int n, int64_t at, int64_t j, int lanes, Run<T>& run) {
  Features<T, width<T>> f;
  const bool suited = column_sums<T, T, 1>(row, n, at, run.scales + j, f, row);
  finish_features<T, width<T>, false>(f, suited, j, lanes, n, run, [&](int i, int r) { return row[r][at + i]; });
}

// A tile of n vectors as rows: from[r], which is copied to row[r] if it is not of type T. The vectors of the next tile are at ahead[r].
template <class S, class T>
void observe_rows(const S* const* from, T* const* row, const S* const* ahead, int n, Run<T>& run) {
  constexpr int W = width<T>, V = REGISTERS == 32 ? 2 : 1;
  const int64_t features = run.call.features;
  if (features == 1) {  // no kurtosis: a vector with one feature is constant
    for (int r = 0; r < n; ++r) run.partial[is_finite(row_sum<S, T>(from[r], 1, 1, row[r])) ? layout::CONSTANT : layout::INVALID] += 1;
  } else {
    Vectors<T> vectors;
    row_sums<S, T>(from, row, ahead, n, run.vectors, vectors);
    finish_vectors<T, T, false>(vectors, n, [&](int r) { return row[r]; }, 1, run.vectors, run.scratch);
  }

  int64_t j = 0;
  for (; j + V * W <= features; j += V * W) {
    Features<T, V * W> f;
    const bool suited = column_sums<S, T, V>(row, n, j, run.scales + j, f, ahead);
    finish_features<T, V * W, false>(f, suited, j, V * W, n, run, [&](int i, int r) { return row[r][j + i]; });
  }
  for (; j + W <= features; j += W) observe_columns<T>(row, n, j, j, W, run);
  if (j < features) {  // the last features do not fill a register: use a copy that does
    T rest[MAX_ROWS][W];
    T* copy[MAX_ROWS] = {};
    for (int r = 0; r < n; ++r) {
      store(rest[r], load_part<T>(row[r] + j, features - j, 0));
      copy[r] = rest[r];
    }
    observe_columns<T>(copy, n, 0, j, int(features - j), run);
  }
  run.seen += n;
}

template <class S, class T>
void observe_row_tiles(const Call& call, int64_t first_tile, int64_t last_tile, Run<T>& run, T* packed) {
  const S* x = static_cast<const S*>(call.x);
  constexpr bool same = std::is_same_v<S, T>;
  const bool contiguous = call.feature_stride == 1 || call.features == 1;

  int64_t vector = first_tile * call.tile_vectors, next_offset[MAX_ROWS];
  const int64_t end = last_tile * call.tile_vectors < call.vectors ? last_tile * call.tile_vectors : call.vectors;
  Cursor cursor(call, vector, call.dims);
  auto enumerate_next = [&] {
    const int64_t tile_end = vector + call.tile_vectors < end ? vector + call.tile_vectors : end;
    return enumerate(call, cursor, vector, tile_end, next_offset);
  };
  int next = enumerate_next();
  for (int64_t t = first_tile; t < last_tile; ++t) {
    int64_t offset[MAX_ROWS];
    const int n = next;
    __builtin_memcpy(offset, next_offset, n * sizeof *offset);
    next = t + 1 < last_tile ? enumerate_next() : 0;
    if (n == 0) continue;
    T* row[MAX_ROWS];
    for (int r = 0; r < n; ++r) row[r] = packed + r * call.scratch_row;
    if (contiguous) {
      const S *from[MAX_ROWS], *ahead[MAX_ROWS];
      for (int r = 0; r < n; ++r) {
        from[r] = x + offset[r];
        ahead[r] = x + (r < next ? next_offset : offset)[r];
        if constexpr (same) row[r] = const_cast<T*>(from[r]);  // used in place and never written
      }
      if (t == first_tile) run.guess_scales(from[0], 1);
      observe_rows<S, T>(from, row, ahead, n, run);
    } else {
      pack_tile<S, T>(x, offset, n, call, packed);
      if (t == first_tile) run.guess_scales(row[0], 1);
      observe_rows<T, T>(row, row, row, n, run);
    }
  }
}

// ---- vectors side by side ----------------------------------------------------------------------------------------------------------------

// Blocks of neighboring positions of (N, C, H, W), read in place for every type.
template <class S, class T>
void observe_blocks(const Call& call, int64_t first_tile, int64_t last_tile, Run<T>& run) {
  constexpr int N = 32;
  const S* x = static_cast<const S*>(call.x);
  const int64_t row = call.size[call.dims - 1], blocks = (row + call.tile_vectors - 1) / call.tile_vectors, stride = call.feature_stride;
  Cursor cursor(call, first_tile / blocks, call.dims - 1);
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const int64_t block = t % blocks, start = block * call.tile_vectors;
    const int n = int(row - start < call.tile_vectors ? row - start : call.tile_vectors);
    const S* from = x + cursor.offset + start;
    if (block + 1 == blocks) cursor.next();
    const S* ahead = t + 1 < last_tile ? x + cursor.offset + (block + 1 == blocks ? 0 : start + n) : from;
    if (t == first_tile) run.guess_scales(from, stride);
    Vectors<T> vectors;
    side_by_side_sums<S, T>(from, ahead, stride, n, run.vectors, vectors);
    finish_vectors<S, T, true>(vectors, n, [&](int r) { return from + r; }, stride, run.vectors, run.scratch);
    for (int64_t j = 0; j < call.features; j += N) {
      const int lanes = int(call.features - j < N ? call.features - j : N);
      Features<T, N> f;
      bool suited = true;
      for (int i = 0; i < lanes; ++i) {
        const S* p = from + (j + i) * stride;
        const T shift = median<T>(widen(p[0]), widen(p[quarter_of(n, 1)]), widen(p[quarter_of(n, 2)]), widen(p[quarter_of(n, 3)]));
        feature_sums<S, T, N>(p, ahead + (j + i) * stride, n, shift, run.scales[j + i], f, i);
      }
      for (int i = 0; i < lanes; i += width<T>) {
        auto part = [&](const T* p) { return load_part<T>(p + i, lanes - i < width<T> ? lanes - i : width<T>, 1); };
        suited &= !any(unsuited(part(f.low), part(f.high), part(f.shift), part(f.scale), part(f.abs_sum)));
      }
      finish_features<T, N, true>(f, suited, j, lanes, n, run, [&](int i, int r) { return widen(from[(j + i) * stride + r]); });
    }
    run.seen += n;
  }
}

template <class S, class T>
void observe_range(const Call& call, int64_t first_tile, int64_t last_tile, double* partial, void* scratch) {
  T* memory = static_cast<T*>(scratch);
  Run<T> run(call, partial, memory);
  if (call.side_by_side)
    observe_blocks<S, T>(call, first_tile, last_tile, run);
  else
    observe_row_tiles<S, T>(call, first_tile, last_tile, run, memory + 2 * call.scratch_row);
  if (run.uniform) run.count_apart(0, 0);
}

void observe(const Call& call, int64_t first_tile, int64_t last_tile, double* partial, void* scratch) {
  switch (call.dtype) {
    case Dtype::Float64: return observe_range<double, double>(call, first_tile, last_tile, partial, scratch);
    case Dtype::Float32: return observe_range<float, float>(call, first_tile, last_tile, partial, scratch);
    case Dtype::BFloat16: return observe_range<BFloat16, float>(call, first_tile, last_tile, partial, scratch);
    case Dtype::Float16: return observe_range<Float16, float>(call, first_tile, last_tile, partial, scratch);
  }
}
