// The Python module diffpo_kernels._native, and the only file that knows pybind11. Tensors cross as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "chunk_kernels.h"
#include "entropy_bounded_commit.h"
#include "linear_logprob.h"
#include "row_statistics.h"
#include "skinny_linear.h"
#include "surrogate_loss.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// `outputs`: the addresses of token, logprob, entropy, confidence, top1, top2, odds, lse, valid.
diffpo::RowStatisticsArguments row_statistics_arguments(uintptr_t logits, int dtype, int64_t rows, int64_t vocabulary,
                                                        int64_t row_stride, uintptr_t temperature, uintptr_t uniform,
                                                        const std::vector<uintptr_t>& outputs) {
    if (outputs.size() != 9) throw std::invalid_argument("row_statistics writes 9 outputs");
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
            pointer<float>(outputs[6]),
            pointer<float>(outputs[7]),
            pointer<bool>(outputs[8])};
}

void row_statistics_cpu(uintptr_t logits, int dtype, int64_t rows, int64_t vocabulary, int64_t row_stride, uintptr_t temperature,
                        uintptr_t uniform, const std::vector<int64_t>& banned, const std::vector<uintptr_t>& outputs, int threads) {
    auto arguments = row_statistics_arguments(logits, dtype, rows, vocabulary, row_stride, temperature, uniform, outputs);
    arguments.banned = banned.data();
    arguments.banned_count = static_cast<int64_t>(banned.size());
    py::gil_scoped_release release;
    diffpo::row_statistics_cpu(arguments, threads);
}

// addresses: tokens, proposal, proxy, entropy, proposal_logprob, logprob, commit_step, committed, gamma, start, end, nfe (0: not given).
// row_strides: of the first seven, in elements. types: of proxy, entropy, gamma. numbers: mask_id, start, end, max_window.
diffpo::EntropyBoundedCommitArguments entropy_bounded_commit_arguments(std::array<int64_t, 2> shape, const std::array<uintptr_t, 12>& addresses,
                                                                       const std::array<int64_t, 7>& row_strides,
                                                                       const std::array<int, 3>& types, int logprob_size,
                                                                       const std::array<int64_t, 4>& numbers, double gamma, bool ranked,
                                                                       bool advance) {
    const auto floats = [&](int operand, int64_t row_stride, int type) {
        return diffpo::FloatRows{pointer<const void>(addresses[operand]), row_stride, static_cast<diffpo::FloatType>(types[type])};
    };
    diffpo::EntropyBoundedCommitArguments a{};
    a.rows = shape[0], a.length = shape[1];
    a.tokens = {pointer<int64_t>(addresses[0]), row_strides[0]};
    a.proposal = {pointer<const int64_t>(addresses[1]), row_strides[1]};
    a.proxy = floats(2, row_strides[2], 0);
    a.entropy = floats(3, row_strides[3], 1);
    a.proposal_logprob = {pointer<const char>(addresses[4]), row_strides[4] * logprob_size};
    a.logprob = {pointer<char>(addresses[5]), row_strides[5] * logprob_size};
    a.logprob_size = logprob_size;
    a.commit_step = {pointer<int64_t>(addresses[6]), row_strides[6]};
    a.committed = pointer<bool>(addresses[7]);
    a.gamma = floats(8, 1, 2);
    a.gamma_of_all = gamma;
    a.start = pointer<int64_t>(addresses[9]), a.end = pointer<int64_t>(addresses[10]);
    a.nfe = pointer<int64_t>(addresses[11]);
    a.mask_id = numbers[0], a.start_of_all = numbers[1], a.end_of_all = numbers[2], a.max_window = numbers[3];
    a.ranked = ranked, a.advance = advance;
    return a;
}

void entropy_bounded_commit_cpu(std::array<int64_t, 2> shape, const std::array<uintptr_t, 12>& addresses,
                                const std::array<int64_t, 7>& row_strides, const std::array<int, 3>& types, int logprob_size,
                                const std::array<int64_t, 4>& numbers, double gamma, bool ranked, bool advance, int threads) {
    const auto arguments =
        entropy_bounded_commit_arguments(shape, addresses, row_strides, types, logprob_size, numbers, gamma, ranked, advance);
    py::gil_scoped_release release;
    diffpo::entropy_bounded_commit_cpu(arguments, threads);
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

void entropy_bounded_commit_cuda(std::array<int64_t, 2> shape, const std::array<uintptr_t, 12>& addresses,
                                 const std::array<int64_t, 7>& row_strides, const std::array<int, 3>& types, int logprob_size,
                                 const std::array<int64_t, 4>& numbers, double gamma, bool ranked, bool advance, int device,
                                 uintptr_t stream) {
    const auto arguments =
        entropy_bounded_commit_arguments(shape, addresses, row_strides, types, logprob_size, numbers, gamma, ranked, advance);
    py::gil_scoped_release release;
    diffpo::entropy_bounded_commit_cuda(arguments, device, pointer<void>(stream));
}
#endif

// `inputs`: the addresses of logprob, old, advantage, behaviour, reference, mask, step_bin; `outputs`: loss, gradient, factor, diagnostics.
template <typename T>
void surrogate_loss_cpu(const std::vector<uintptr_t>& inputs, int64_t rows, int64_t length, int bins, double clip, double weight_cap,
                        double kl_coefficient, bool importance_correction, bool by_sequence, bool advantage_per_token,
                        const std::vector<uintptr_t>& outputs, int threads) {
    if (inputs.size() != 7 || outputs.size() != 4) throw std::invalid_argument("surrogate_loss reads 7 tensors and writes 4");
    const diffpo::SurrogateLossArguments<T> arguments{pointer<const T>(inputs[0]),
                                                      pointer<const T>(inputs[1]),
                                                      pointer<const T>(inputs[2]),
                                                      pointer<const T>(inputs[3]),
                                                      pointer<const T>(inputs[4]),
                                                      pointer<const bool>(inputs[5]),
                                                      pointer<const int64_t>(inputs[6]),
                                                      rows,
                                                      length,
                                                      bins,
                                                      clip,
                                                      weight_cap,
                                                      kl_coefficient,
                                                      importance_correction,
                                                      by_sequence,
                                                      advantage_per_token,
                                                      pointer<T>(outputs[0]),
                                                      pointer<T>(outputs[1]),
                                                      pointer<T>(outputs[2]),
                                                      pointer<T>(outputs[3])};
    py::gil_scoped_release release;
    diffpo::surrogate_loss_cpu(arguments, threads);
}

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

// `strides`: of hidden's rows and columns and of weight's rows.
void skinny_linear_cpu(uintptr_t hidden, uintptr_t weight, uintptr_t out, int64_t rows, int64_t depth, int64_t vocabulary,
                       const std::array<int64_t, 3>& strides, int threads) {
    const diffpo::SkinnyLinearArguments arguments{pointer<const float>(hidden), rows, depth, strides[0], strides[1],
                                                  pointer<const float>(weight), vocabulary, strides[2], pointer<float>(out)};
    py::gil_scoped_release release;
    diffpo::skinny_linear_cpu(arguments, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.attr("instruction_set") = diffpo::chunk_kernels().name;
    module.def("row_statistics_cpu", &row_statistics_cpu);
    module.def("surrogate_loss_cpu_float32", &surrogate_loss_cpu<float>);
    module.def("surrogate_loss_cpu_float64", &surrogate_loss_cpu<double>);
    module.def("entropy_bounded_commit_cpu", &entropy_bounded_commit_cpu);
    module.def("linear_logprob_statistics_cpu", &linear_logprob_statistics_cpu);
    module.def("linear_logprob_gradient_cpu", &linear_logprob_gradient_cpu);
    module.def("skinny_linear_cpu", &skinny_linear_cpu);
#if defined(DIFFPO_CUDA)
    module.attr("has_cuda") = true;
    module.def("row_statistics_cuda_workspace", &diffpo::row_statistics_cuda_workspace);
    module.def("row_statistics_cuda", &row_statistics_cuda);
    module.def("entropy_bounded_commit_cuda", &entropy_bounded_commit_cuda);
#else
    module.attr("has_cuda") = false;
#endif
}
