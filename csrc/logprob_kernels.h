// The vectorised inner loops of linear_logprob, compiled once per instruction set like those of chunk_kernels.h.
#pragma once

#include <cstdint>

namespace diffpo {

// One row's distribution and what the loss asks of it: log p = (x - max) scale - log_sum.
struct RowGradient {
    float max, scale, log_sum, entropy;
    float by_logprob, by_entropy;  // gradients of the loss, both times `scale`
};

// Every x has n entries with n a multiple of kLanes: callers pad with -inf.
struct LogprobKernels {
    const char* name;
    void (*narrow_bfloat16)(const float* x, int n, uint16_t* out);  // any n; to nearest, ties to even
    void (*narrow_float16)(const float* x, int n, uint16_t* out);   // any n; to nearest, ties to even
    float (*max)(const float* x, int n);                            // NaN entries are passed over
    // With z = (x - max) scale: sum exp(z) and sum z exp(z); NaN if any entry is NaN. max must be finite.
    void (*exp_sums)(const float* x, int n, float max, float scale, float* sum, float* weighted);
    // In place: x <- -p (by_logprob + by_entropy (log p + entropy)), the gradient of every logit but the target's.
    void (*gradient)(float* x, int n, const RowGradient& row);
};

const LogprobKernels& logprob_kernels_baseline();
const LogprobKernels& logprob_kernels_avx2();
const LogprobKernels& logprob_kernels_avx512();

}  // namespace diffpo
