#include "kernels.cuh"

namespace torchprobe::cuda { template Kernels kernels_of<Float16>(const Plan&); }
