// The kernels themselves, for every type. Part of observe_kernel.h.

constexpr int64_t TURN = 8;  // blocks that are read one after the other before the next tile

// Calls f with values of the type of the elements and of that of the arithmetic.
template <class F>
TORCHPROBE_INLINE auto with_types(const Call& call, F f) {
  switch (call.dtype) {
    case Dtype::Float64: return f(double(), double());
    case Dtype::Float32: return f(float(), float());
    case Dtype::BFloat16: return f(BFloat16(), float());
    default: return f(Float16(), float());
  }
}

void observe(const Call& call, int64_t first_tile, int64_t last_tile, double* partial, void* scratch) {
  with_types(call, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    T* memory = static_cast<T*>(scratch);
    const Sums<T> sums{memory + call.scratch.sums, (call.tile_vectors + MAX_LANES - 1) / MAX_LANES * MAX_LANES};
    double outcome[4 * MAX_VECTORS];
    const Outcome out(outcome, MAX_VECTORS);
    Run<T> run(call, partial, 0, call.features, memory, memory + call.scratch.scales, 1);
    if (call.side_by_side)
      observe_side_by_side<S, T>(call, first_tile, last_tile, run, sums, out);
    else
      observe_rows<S, T>(call, first_tile, last_tile, run, sums, out);
  });
}

// ---- if by_blocks: see ObserveKernels ----------------------------------------------------------------------------------------------------

double first_scale(const Call& call, int64_t offset) {
  return with_types(call, [&](auto s, auto) { return double(guess_scale(call, static_cast<const decltype(s)*>(call.x) + offset)); });
}

void sum_band(const Call& call, const Band& band, int64_t first_block, int64_t last_block, double* state, void* scratch) {
  with_types(call, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const Sums<T> sums{static_cast<T*>(band.sums), band.room};
    for (int64_t b = first_block; b < last_block; b += TURN) {
      const int64_t end = b + TURN < last_block ? b + TURN : last_block;
      const int64_t last_feature = call.block_begin(end - 1) + call.block_size(end - 1);
      Run<T> run(call, state, call.block_begin(b), last_feature, static_cast<T*>(scratch), static_cast<T*>(band.scales), T(band.scale));
      if (band.first) run.set_scales(run.scale);
      for (int64_t t = 0; t < band.tiles; ++t) {
        const int64_t at = band.tile[t], next = band.tile[t + 1], next_n = t + 1 < band.tiles ? band.tile[t + 2] - next : 0;
        const Tile tile{band.offset + at, int(next - at), band.offset + next, int(next_n)};
        if (call.side_by_side)
          sum_side_by_side<S, T>(tile, b, end, run, sums, at);
        else
          sum_rows<S, T>(tile, b, end, run, sums, at);
        run.seen += double(tile.n);
      }
    }
  });
}

double finish_band(const Call& call, const Band& band, int64_t begin, int64_t end, void* scratch) {
  return with_types(call, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const Sums<T> sums{static_cast<T*>(band.sums), band.room};
    T scale = T(band.scale);
    auto at = [&](int64_t r) { return static_cast<const S*>(call.x) + band.offset[r]; };
    if (call.side_by_side)
      finish_vectors<S, T, true>(call, sums, begin, end, at, scale, band.outcome, static_cast<T*>(scratch));
    else
      finish_vectors<S, T, false>(call, sums, begin, end, at, scale, band.outcome, static_cast<T*>(scratch));
    return double(scale);
  });
}

void count_band(const Call& call, const Band& band, int64_t first_block, int64_t last_block, double* state) {
  with_types(call, [&](auto s, auto t) {
    using S = decltype(s);
    using T = decltype(t);
    const Sums<T> sums{static_cast<T*>(band.sums), band.room};
    auto at = [&](int64_t r) { return static_cast<const S*>(call.x) + band.offset[r]; };
    count_outliers<S, T>(call, sums, 0, band.vectors, first_block, last_block, at, band.outcome, rows_of(state, call.features, 0).outliers);
  });
}

constexpr ObserveKernels observe_kernels(const char* name) {
  return {name, observe, merge, first_scale, sum_band, finish_band, count_band, record};
}
