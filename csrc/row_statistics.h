// Row statistics of a matrix of logits: the argument block shared by the CPU and the CUDA implementation.
// The contract (every output, ties, NaN, -inf, banned ids) is the docstring of diffpo_kernels/row_statistics/__init__.py.
//
// Both split each row into chunks of columns. Stage 1 reads the logits once and leaves one Partial per (row, chunk); stage 2
// merges a row's partials in chunk order, then reads one chunk again to find the argmax and to sum the others without it, and one to
// finish a draw. Splitting by chunk and
// not by thread makes the result independent of the number of threads.
#pragma once

#include <cstdint>

namespace diffpo {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct RowStatisticsArguments {
    const void* logits;
    Dtype dtype;
    int64_t rows, vocabulary, row_stride;  // stride in elements; columns are contiguous
    const float* temperature;              // [rows], or null: all zero
    const double* uniform;                 // [rows], or null where temperature is null
    const int64_t* banned;                 // sorted, unique
    int64_t banned_count;
    int64_t* token;                        // outputs, [rows] each
    float *logprob, *entropy, *confidence, *top1, *top2, *odds, *lse;
    bool* valid;
};

void row_statistics_cpu(const RowStatisticsArguments& arguments, int threads);

// Asynchronous on `stream` (a cudaStream_t) of `device`; pointers are device pointers, `banned` and `workspace` too.
// workspace: row_statistics_cuda_workspace(rows, vocabulary) bytes. Throws std::runtime_error if a launch fails.
int64_t row_statistics_cuda_workspace(int64_t rows, int64_t vocabulary);
void row_statistics_cuda(const RowStatisticsArguments& arguments, void* workspace, int device, void* stream);

}  // namespace diffpo
