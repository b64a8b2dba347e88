// Chooses the inner loops for the processor at hand, once per process.
#include <cstdlib>
#include <cstring>

#include "chunk_kernels.h"

namespace diffpo {
namespace {

// The environment variable DIFFPO_CPU (baseline, avx2, avx512) lowers the choice, so that every path can be tested on one machine.
bool allowed(const char* name) {
    const char* limit = std::getenv("DIFFPO_CPU");
    if (limit == nullptr || *limit == 0 || std::strcmp(limit, "avx512") == 0) return true;
    return std::strcmp(limit, "avx2") == 0 && std::strcmp(name, "avx2") == 0;
}

const ChunkKernels& choose() {
#if defined(DIFFPO_X86)
    if (allowed("avx512") && __builtin_cpu_supports("avx512f")) return chunk_kernels_avx512();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (allowed("avx2") && avx2) return chunk_kernels_avx2();
#endif
    return chunk_kernels_baseline();
}

}  // namespace

const ChunkKernels& chunk_kernels() {
    static const ChunkKernels& chosen = choose();
    return chosen;
}

}  // namespace diffpo
