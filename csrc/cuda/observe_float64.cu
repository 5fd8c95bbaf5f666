#include "kernels.cuh"

namespace torchprobe::cuda { template Kernels kernels_of<double>(const Plan&); }
