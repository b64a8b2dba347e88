// The vectorised inner loops of the CPU operators, compiled once per instruction set (see CMakeLists.txt) and chosen at run time.
#pragma once

#include <cstdint>

namespace diffpo {

// Every x has n entries with n a multiple of kLanes: callers pad with -inf.
constexpr int kLanes = 16;

constexpr int64_t kWorkPerThread = 1 << 18;  // logits: about 80 us, several times what starting a thread costs

// One row's distribution and what a loss asks of it: log p = (x - max) scale - log_sum.
struct RowGradient {
    float max, scale, log_sum, entropy;
    float by_logprob, by_entropy;  // gradients of the loss, both times `scale`
};

// Up to kLinearRows rows of a weight matrix against up to kLinearColumns rows of hidden, which stand as columns: out[n][v] is the product
// of column n and weight row v. `width`: kLanes or kLinearColumns, at least `columns`; hidden is [depth, width].
constexpr int kLinearRows = 64, kLinearColumns = 32;
struct LinearBlock {
    const float* hidden;
    const float* weight;
    float* out;
    int64_t depth, weight_stride, out_stride;  // in elements
    int width, columns, rows;
};

struct ChunkKernels {
    const char* name;
    void (*widen_bfloat16)(const uint16_t* x, int n, float* out);  // any n
    void (*widen_float16)(const uint16_t* x, int n, float* out);   // any n
    void (*narrow_bfloat16)(const float* x, int n, uint16_t* out);  // any n; to nearest, ties to even
    void (*narrow_float16)(const float* x, int n, uint16_t* out);   // any n; to nearest, ties to even
    float (*max)(const float* x, int n);                            // NaN entries are passed over
    // Largest and second largest entry; NaN entries are passed over.
    void (*top_two)(const float* x, int n, float* max, float* second);
    // With z = (x - max) scale: sum exp(z) and sum z exp(z); NaN if any entry is NaN. max must be finite.
    // Meanwhile the n `entry_size`-byte entries from `next` are fetched into the cache; it may be any address.
    void (*exp_sums)(const float* x, int n, float max, float scale, float* sum, float* weighted, const char* next, int entry_size);
    // sum exp((x - max) scale), and the terms themselves if `terms` is not null.
    float (*exp_sum)(const float* x, int n, float max, float scale, float* terms);
    // First index with x == value, or n.
    int (*first_equal)(const float* x, int n, float value);
    // In place: x <- -p (by_logprob + by_entropy (log p + entropy)), the gradient of every logit but the target's.
    void (*gradient)(float* x, int n, const RowGradient& row);
    // An entry of `out` depends on its two rows alone, to the last bit: not on where they stand, nor on what is beside them.
    void (*linear)(const LinearBlock& block);
};

const ChunkKernels& chunk_kernels_baseline();
const ChunkKernels& chunk_kernels_avx2();
const ChunkKernels& chunk_kernels_avx512();

const ChunkKernels& chunk_kernels();  // the best that this processor runs

}  // namespace diffpo
