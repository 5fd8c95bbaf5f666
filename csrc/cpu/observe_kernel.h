// The kernels of observe_ for one instruction set; included between isa_begin.h and isa_end.h, inside a namespace.
//
// A tile is a group of vectors. A strip of it stays in the cache while it is read two or three times:
//
//   vectors, 1st   the sum of each vector, while it arrives from memory; not needed if samples show that means are close to 0;
//   vectors, 2nd   the powers 1 … 4 of its deviations from the mean, or of the values themselves, for its kurtosis;
//   features       the powers of each feature's deviations from a shift, its extremes and Σ|x|.
//
// A shift is a guess, from samples, and any guess may be wrong: what the sums about it show is checked. If the powers about the mean would be small
// differences of them, they are computed again about the mean.
//
// Deviations are multiplied by a power of two, so that their fourth powers neither underflow nor overflow. This factor is guessed from earlier
// values and checked afterwards. If it was wrong, the sums are computed again. A power of two changes no mantissa, so the guess changes no
// result. The fast loops only detect rare cases: nan, inf, values close to the ends of the range, vectors that hardly vary. Slower and more
// careful code then repeats the computation.
//
// There are two layouts. As rows: the features of a vector are contiguous. Otherwise they are copied to a scratch tile, where bfloat16 and
// float16 also become float32. Side by side: neighboring vectors are contiguous, as in (N, C, H, W), and a register holds one feature of
// several vectors.

// Prefetches the cache line of p into the second-level cache.
TORCHPROBE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

#include "observe_merge.h"
#include "observe_vectors.h"
#include "observe_kurtosis.h"
#include "observe_features.h"
#include "observe_tiles.h"
#include "observe_blocks.h"
