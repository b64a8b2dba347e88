// What a denoising step commits: the argument block shared by the CPU and the CUDA implementation.
// The contract (order, ties, NaN, both rules, advance) is the docstring of diffpo_kernels/entropy_bounded_commit/__init__.py.
#pragma once

#include <cstdint>

namespace diffpo {

enum class FloatType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Row r starts r * row_stride elements after data; its elements are adjacent.
template <typename T>
struct Rows {
    T* data;
    int64_t row_stride;
};
struct FloatRows {
    const void* data;
    int64_t row_stride;
    FloatType type;
};

struct EntropyBoundedCommitArguments {
    int64_t rows, length;
    Rows<int64_t> tokens;
    Rows<const int64_t> proposal;
    FloatRows proxy, entropy;
    FloatRows gamma;  // [rows], data null: gamma_of_all
    double gamma_of_all;
    int64_t mask_id;
    int64_t *start, *end;  // [rows], or null: *_of_all
    int64_t start_of_all, end_of_all;
    bool ranked, advance;
    Rows<const char> proposal_logprob;  // copied byte by byte, strides too are in bytes
    Rows<char> logprob;                 // data null: not recorded
    int logprob_size;                   // bytes of an element
    Rows<int64_t> commit_step;          // data null: not recorded
    int64_t* nfe;                       // [rows], or null
    int64_t max_window;
    bool* committed;  // [rows, length], contiguous; every entry is written
};

// float32 and float64 values only.
void entropy_bounded_commit_cpu(const EntropyBoundedCommitArguments& arguments, int threads);

// Asynchronous on `stream` (a cudaStream_t) of `device`. The proxy is ordered in float32. Throws std::runtime_error if the launch fails
// and std::invalid_argument for a max_window above the limit.
constexpr int64_t kMaxCudaWindow = 2048;
void entropy_bounded_commit_cuda(const EntropyBoundedCommitArguments& arguments, int device, void* stream);

}  // namespace diffpo
