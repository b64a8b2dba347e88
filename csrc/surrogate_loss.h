// surrogate_loss on the CPU: loss, gradient and diagnostics in one pass. The contract is the docstring of
// diffpo_kernels/surrogate_loss/__init__.py, the definition reference.py there, the order of the diagnostics diagnostics.py.
#pragma once

#include <cstdint>

namespace diffpo {

template <typename T>
struct SurrogateLossArguments {
    const T *logprob, *old;              // [rows, length]
    const T* advantage;                  // [rows], or [rows, length] if advantage_per_token
    const T *behaviour, *reference;      // [rows, length] or null
    const bool* mask;                    // [rows, length]
    const int64_t* step_bin;             // [rows, length] or null
    int64_t rows, length;
    int bins;  // 0 without step_bin
    double clip, weight_cap, kl_coefficient;
    bool importance_correction;
    bool by_sequence;  // normalisation
    bool advantage_per_token;
    T *loss, *gradient, *factor, *diagnostics;  // outputs; the gradient of the loss is factor * gradient [rows, length]
};

// T is float or double. The result does not depend on the number of threads.
template <typename T>
void surrogate_loss_cpu(const SurrogateLossArguments<T>& arguments, int threads);

}  // namespace diffpo
