#include "kernels.cuh"

template struct torchprobe::cuda::Kernels<torchprobe::cuda::BFloat16>;
