// The kernels of observe_, for the instruction set that is being compiled. No include guard, included inside a namespace.
//
// A tile is a number of vectors that stay in the cache while they are read three times:
//
//   vectors, 1st   the sum of each vector, on its way in from memory;
//   vectors, 2nd   the powers 1 … 4 of its deviations from the mean, for its kurtosis;
//   features       the powers of each feature's deviations from the mean of four values of the tile, its extremes and Σ|x|.
//
// Deviations are multiplied by a power of two, so that their fourth powers neither under- nor overflow. The factor is guessed from what came
// before and checked afterwards: when it was wrong, the sums are made again. As a power of two changes no mantissa, the guess changes no
// result. Whatever is rare (nan, inf, values close to the ends of the range, vectors that barely vary) is noticed by the fast loops and done
// again, slowly and right.
//
// There are two layouts. As rows: the features of a vector are contiguous, or are made so in a scratch tile, which is also where bfloat16 and
// float16 become float32. Side by side: neighbouring vectors are contiguous, as in (N, C, H, W), and registers hold one feature of several.

#include "simd.h"

// Asks for the cache line of p, to the second level.
TORCHPROBE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

#include "observe_merge.h"
#include "observe_vectors.h"
#include "observe_features.h"
#include "observe_tiles.h"
