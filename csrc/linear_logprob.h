// The two passes of linear_logprob over a chunk of logits on the CPU. The matrix products around them are torch's.
#pragma once

#include <cstdint>

#include "row_statistics.h"  // Dtype

namespace diffpo {

struct LogitsChunk {
    void* logits;  // [rows, columns], contiguous
    Dtype dtype;
    int64_t rows, columns, first_column;  // first_column: the token id of column 0
    const float* bias;                    // [columns], or null
    const float* temperature;  // the rest [rows]
    const int64_t* target;
    float *logprob, *entropy, *max, *log_sum;  // log p = (x - max) / temperature - log_sum, x the logit with its bias
};

// Writes logprob, entropy, max and log_sum; the chunk must hold every column.
void linear_logprob_statistics_cpu(const LogitsChunk& chunk, int threads);

constexpr int64_t kRowGroup = 64;  // rows per row of bias_gradient

// Replaces the logits by the gradient of sum_n by_logprob[n] logprob[n] + by_entropy[n] entropy[n] with respect to them.
// by_entropy: [rows] or null. bias_gradient: null, or [ceil(rows / kRowGroup), columns], the sums over each group of rows.
void linear_logprob_gradient_cpu(const LogitsChunk& chunk, const float* by_logprob, const float* by_entropy, float* bias_gradient,
                                 int threads);

}  // namespace diffpo
