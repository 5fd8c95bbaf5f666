// Ends what isa_begin.h began.
}  // namespace
}  // namespace torchprobe::cpu

#if defined(TORCHPROBE_AVX512) || defined(TORCHPROBE_AVX2)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
