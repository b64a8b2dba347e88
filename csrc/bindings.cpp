// The Python module diffpo_kernels._native, and the only file that knows pybind11. Tensors cross as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "chunk_kernels.h"
#include "linear_logprob.h"
#include "row_statistics.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// `outputs`: the addresses of token, logprob, entropy, top1, top2, lse, valid.
diffpo::RowStatisticsArguments row_statistics_arguments(uintptr_t logits, int dtype, int64_t rows, int64_t vocabulary,
                                                        int64_t row_stride, uintptr_t temperature, uintptr_t uniform,
                                                        const std::vector<uintptr_t>& outputs) {
    if (outputs.size() != 7) throw std::invalid_argument("row_statistics writes 7 outputs");
    return {pointer<const void>(logits),
            static_cast<diffpo::Dtype>(dtype),
            rows,
            vocabulary,
            row_stride,
            pointer<const float>(temperature),
            pointer<const double>(uniform),
            nullptr,
            0,
            pointer<int64_t>(outputs[0]),
            pointer<float>(outputs[1]),
            pointer<float>(outputs[2]),
            pointer<float>(outputs[3]),
            pointer<float>(outputs[4]),
            pointer<float>(outputs[5]),
            pointer<bool>(outputs[6])};
}

void row_statistics_cpu(uintptr_t logits, int dtype, int64_t rows, int64_t vocabulary, int64_t row_stride, uintptr_t temperature,
                        uintptr_t uniform, const std::vector<int64_t>& banned, const std::vector<uintptr_t>& outputs, int threads) {
    auto arguments = row_statistics_arguments(logits, dtype, rows, vocabulary, row_stride, temperature, uniform, outputs);
    arguments.banned = banned.data();
    arguments.banned_count = static_cast<int64_t>(banned.size());
    py::gil_scoped_release release;
    diffpo::row_statistics_cpu(arguments, threads);
}

#if defined(DIFFPO_CUDA)
void row_statistics_cuda(uintptr_t logits, int dtype, int64_t rows, int64_t vocabulary, int64_t row_stride, uintptr_t temperature,
                         uintptr_t uniform, uintptr_t banned, int64_t banned_count, const std::vector<uintptr_t>& outputs,
                         uintptr_t workspace, int device, uintptr_t stream) {
    auto arguments = row_statistics_arguments(logits, dtype, rows, vocabulary, row_stride, temperature, uniform, outputs);
    arguments.banned = pointer<const int64_t>(banned);
    arguments.banned_count = banned_count;
    py::gil_scoped_release release;
    diffpo::row_statistics_cuda(arguments, pointer<void>(workspace), device, pointer<void>(stream));
}
#endif

// `per_row`: the addresses of temperature, target, logprob, entropy, max, log_sum.
diffpo::LogitsChunk logits_chunk(uintptr_t logits, int dtype, int64_t rows, int64_t columns, int64_t first_column, uintptr_t bias,
                                 const std::vector<uintptr_t>& per_row) {
    if (per_row.size() != 6) throw std::invalid_argument("linear_logprob takes 6 tensors with one entry per row");
    return {pointer<void>(logits),
            static_cast<diffpo::Dtype>(dtype),
            rows,
            columns,
            first_column,
            pointer<const float>(bias),
            pointer<const float>(per_row[0]),
            pointer<const int64_t>(per_row[1]),
            pointer<float>(per_row[2]),
            pointer<float>(per_row[3]),
            pointer<float>(per_row[4]),
            pointer<float>(per_row[5])};
}

void linear_logprob_statistics_cpu(uintptr_t logits, int dtype, int64_t rows, int64_t columns, int64_t first_column, uintptr_t bias,
                                   const std::vector<uintptr_t>& per_row, int threads) {
    const auto chunk = logits_chunk(logits, dtype, rows, columns, first_column, bias, per_row);
    py::gil_scoped_release release;
    diffpo::linear_logprob_statistics_cpu(chunk, threads);
}

void linear_logprob_gradient_cpu(uintptr_t logits, int dtype, int64_t rows, int64_t columns, int64_t first_column, uintptr_t bias,
                                 const std::vector<uintptr_t>& per_row, uintptr_t by_logprob,
                                 uintptr_t by_entropy, uintptr_t bias_gradient, int threads) {
    const auto chunk = logits_chunk(logits, dtype, rows, columns, first_column, bias, per_row);
    py::gil_scoped_release release;
    diffpo::linear_logprob_gradient_cpu(chunk, pointer<const float>(by_logprob), pointer<const float>(by_entropy),
                                        pointer<float>(bias_gradient), threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.attr("instruction_set") = diffpo::chunk_kernels().name;
    module.def("row_statistics_cpu", &row_statistics_cpu);
    module.def("linear_logprob_statistics_cpu", &linear_logprob_statistics_cpu);
    module.def("linear_logprob_gradient_cpu", &linear_logprob_gradient_cpu);
#if defined(DIFFPO_CUDA)
    module.attr("has_cuda") = true;
    module.def("row_statistics_cuda_workspace", &diffpo::row_statistics_cuda_workspace);
    module.def("row_statistics_cuda", &row_statistics_cuda);
#else
    module.attr("has_cuda") = false;
#endif
}
