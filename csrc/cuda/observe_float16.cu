#include "kernels.cuh"

template struct torchprobe::cuda::Kernels<torchprobe::cuda::Float16>;
