// A few rows times a tall weight matrix: what decoding asks of the LM head. The contract is the docstring of
// diffpo_kernels/skinny_linear/__init__.py.
#pragma once

#include <cstdint>

namespace diffpo {

// out[n][v] = sum over d of hidden[n][d] weight[v][d]. Strides in elements; the columns of weight and out are contiguous.
struct SkinnyLinearArguments {
    const float* hidden;
    int64_t rows, depth, hidden_row_stride, hidden_column_stride;
    const float* weight;
    int64_t vocabulary, weight_stride;
    float* out;  // [rows, vocabulary]
};

void skinny_linear_cpu(const SkinnyLinearArguments& arguments, int threads);

}  // namespace diffpo
