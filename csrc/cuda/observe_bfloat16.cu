#include "kernels.cuh"

namespace torchprobe::cuda { template Kernels kernels_of<BFloat16>(const Plan&); }
