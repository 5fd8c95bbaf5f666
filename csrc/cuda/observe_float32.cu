#include "kernels.cuh"

namespace torchprobe::cuda { template Kernels kernels_of<float>(const Plan&); }
