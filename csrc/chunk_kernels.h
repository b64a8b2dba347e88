// The vectorised inner loops of the CPU operators, compiled once per instruction set (see CMakeLists.txt) and chosen at run time.
#pragma once

#include <cstdint>

namespace diffpo {

// Every x has n entries with n a multiple of kLanes: callers pad with -inf.
constexpr int kLanes = 16;

struct ChunkKernels {
    const char* name;
    void (*widen_bfloat16)(const uint16_t* x, int n, float* out);  // any n
    void (*widen_float16)(const uint16_t* x, int n, float* out);   // any n
    // Largest and second largest entry; NaN entries are passed over.
    void (*top_two)(const float* x, int n, float* max, float* second);
    // sum exp(x - max) and sum (x - max) exp(x - max); NaN if any entry is NaN. max must be finite.
    // Meanwhile the n `entry_size`-byte entries from `next` are fetched into the cache; it may be any address.
    void (*exp_sums)(const float* x, int n, float max, float* sum, float* weighted, const char* next, int entry_size);
    // sum exp((x - max) scale), and the terms themselves if `terms` is not null.
    float (*exp_sum)(const float* x, int n, float max, float scale, float* terms);
    // First index with x == value, or n.
    int (*first_equal)(const float* x, int n, float value);
};

const ChunkKernels& chunk_kernels_baseline();
const ChunkKernels& chunk_kernels_avx2();
const ChunkKernels& chunk_kernels_avx512();

const ChunkKernels& chunk_kernels();  // the best that this processor runs

}  // namespace diffpo
