#include "kernels.cuh"

template struct torchprobe::cuda::Kernels<double>;
