// Row statistics in CUDA. See row_statistics.h for the two stages.
//
// Status: compiled for sm_80, sm_90 and sm_100, not yet run on a device. backends.py therefore never picks it by itself.
//
// Stage 1: one block per (row, chunk). A thread keeps its 16 logits in registers between the max and the exponentials, so the logits
// cross the memory bus once, and no index or random number is carried per logit. Stage 2: one block per row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "row_statistics.h"

namespace diffpo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = kChunk / kThreads;
constexpr float kLowest = -1e30f;  // differences below it count as it: exp gives 0 all the same, and 0 * kLowest is 0, not NaN

__device__ float minus_infinity() { return -__int_as_float(0x7f800000); }
__device__ float nan() { return __int_as_float(0x7fc00000); }
__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }

struct TopTwo {
    float max, second;
};
struct Sums {
    float sum, weighted, tempered;
};
__device__ TopTwo combine(TopTwo a, TopTwo b) { return {fmaxf(a.max, b.max), fmaxf(fminf(a.max, b.max), fmaxf(a.second, b.second))}; }
__device__ Sums combine(Sums a, Sums b) { return {a.sum + b.sum, a.weighted + b.weighted, a.tempered + b.tempered}; }
__device__ int64_t combine(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ TopTwo shuffle(TopTwo a, int lane) {
    return {__shfl_xor_sync(~0u, a.max, lane), __shfl_xor_sync(~0u, a.second, lane)};
}
__device__ Sums shuffle(Sums a, int lane) {
    return {__shfl_xor_sync(~0u, a.sum, lane), __shfl_xor_sync(~0u, a.weighted, lane), __shfl_xor_sync(~0u, a.tempered, lane)};
}
__device__ int64_t shuffle(int64_t a, int lane) { return __shfl_xor_sync(~0u, static_cast<long long>(a), lane); }

// The combination of every thread's value, given to every thread. Same order always, so the result is deterministic.
template <typename T>
__device__ T reduce_block(T value) {
    __shared__ T per_warp[kWarps];
    for (int lane = 16; lane > 0; lane /= 2) value = combine(value, shuffle(value, lane));
    if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = value;
    __syncthreads();
    value = per_warp[0];
    for (int w = 1; w < kWarps; ++w) value = combine(value, per_warp[w]);
    __syncthreads();
    return value;
}

// One chunk of a row as float32 in registers; entries past the row's end and banned ones are -inf.
template <typename T>
struct Chunk {
    static constexpr int kVector = 16 / sizeof(T);  // entries in one 16-byte load
    float x[kPerThread];

    __device__ static int index(int j) { return (j / kVector * kThreads + threadIdx.x) * kVector + j % kVector; }

    __device__ Chunk(const RowStatisticsArguments& a, int64_t row, int64_t chunk) {
        const int64_t begin = chunk * kChunk;
        const T* source = static_cast<const T*>(a.logits) + row * a.row_stride + begin;
        const int64_t left = a.vocabulary - begin;
        const int n = left < kChunk ? static_cast<int>(left) : kChunk;
        if (n == kChunk && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
#pragma unroll
            for (int j = 0; j < kPerThread; j += kVector) {
                const int4 bits = __ldg(reinterpret_cast<const int4*>(source + index(j)));
                const T* entry = reinterpret_cast<const T*>(&bits);
#pragma unroll
                for (int k = 0; k < kVector; ++k) x[j + k] = widen(entry[k]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kPerThread; ++j) x[j] = index(j) < n ? widen(source[index(j)]) : minus_infinity();
        }
        for (int64_t b = 0; b < a.banned_count; ++b) {
            const int64_t banned = a.banned[b] - begin;
            if (banned < 0 || banned >= kChunk) continue;
#pragma unroll
            for (int j = 0; j < kPerThread; ++j)
                if (index(j) == banned) x[j] = minus_infinity();
        }
    }
};

__device__ float temperature_of(const RowStatisticsArguments& a, int64_t row) { return a.temperature ? a.temperature[row] : 0.0f; }
__device__ float scale_of(float temperature) { return fminf(1.0f / temperature, 1e30f); }

template <typename T>
__global__ void __launch_bounds__(kThreads) summarise(RowStatisticsArguments a, int64_t chunks, Partial* partial) {
    const int64_t row = blockIdx.x / chunks;
    const Chunk<T> chunk(a, row, blockIdx.x % chunks);
    TopTwo top{minus_infinity(), minus_infinity()};
    bool bad = false;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
        bad |= !(chunk.x[j] < -minus_infinity());  // NaN or +inf
        top = {fmaxf(top.max, chunk.x[j]), fmaxf(top.second, fminf(top.max, chunk.x[j]))};
    }
    const bool any_bad = __syncthreads_or(bad);
    top = reduce_block(top);

    const float temperature = temperature_of(a, row), shift = top.max > minus_infinity() ? top.max : 0.0f;
    Sums sums{0, 0, 0};
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
        const float z = fmaxf(chunk.x[j] - shift, kLowest), e = __expf(z);  // -inf: e is 0 and z finite, so z e is 0
        sums.sum += e;
        sums.weighted += z * e;
    }
    if (temperature > 0) {
        const float scale = scale_of(temperature);
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sums.tempered += __expf((chunk.x[j] - shift) * scale);
    }
    sums = reduce_block(sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = {any_bad ? nan() : top.max, top.second, sums.sum, sums.weighted, sums.tempered};
}

// Sum over the threads before this one, and over all.
__device__ double scan_block(double value, double* total) {
    __shared__ double per_warp[kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double inclusive = value;
    for (int step = 1; step < 32; step *= 2) {
        const double below = __shfl_up_sync(~0u, inclusive, step);
        if (lane >= step) inclusive += below;
    }
    if (lane == 31) per_warp[warp] = inclusive;
    __syncthreads();
    double before = inclusive - value, all = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += per_warp[w];
        all += per_warp[w];
    }
    __syncthreads();
    *total = all;
    return before;
}

// The smallest candidate of the block, or, where rounding left none, the largest index with a positive weight.
__device__ int64_t choose(int64_t candidate, int64_t last_positive) {
    const int64_t none = INT64_MAX;  // no thread has a candidate
    const int64_t first = reduce_block(candidate);
    const int64_t last = -reduce_block(-last_positive);
    return first != none ? first : last;
}

template <typename T>
__device__ void draw(const RowStatisticsArguments& a, int64_t row, int64_t chunks, const Partial* partial, float row_max, float temperature) {
    const float scale = scale_of(temperature);
    const auto weight = [&](int64_t c) {
        return c < chunks && partial[c].max > minus_infinity() ? exp(static_cast<double>(partial[c].max - row_max) * scale) * partial[c].tempered : 0.0;
    };
    // A thread owns a run of neighbouring chunks, so that an ordered scan over threads is an ordered scan over chunks.
    const int64_t run = (chunks + kThreads - 1) / kThreads, begin = threadIdx.x * run;
    double mine = 0, total;
    for (int64_t c = begin; c < begin + run; ++c) mine += weight(c);
    double before = scan_block(mine, &total);
    const double threshold = a.uniform[row] * total;
    __shared__ double chosen_before;
    int64_t candidate = INT64_MAX, last_positive = -1;
    double cumulative = before;
    for (int64_t c = begin; c < begin + run; ++c) {
        const double w = weight(c);
        if (w > 0) last_positive = c;
        if (w > 0 && candidate == INT64_MAX && cumulative + w > threshold) candidate = c;
        cumulative += w;
    }
    const int64_t chosen = choose(candidate, last_positive);
    cumulative = before;
    for (int64_t c = begin; c < begin + run; ++c) {
        if (c == chosen) chosen_before = cumulative;
        cumulative += weight(c);
    }
    __syncthreads();

    // The same walk inside the chunk, through shared memory so that a thread owns neighbouring entries.
    __shared__ float terms[kChunk];
    const Chunk<T> chunk(a, row, chosen);
    const float chunk_max = partial[chosen].max;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) terms[Chunk<T>::index(j)] = __expf((chunk.x[j] - chunk_max) * scale);
    __syncthreads();
    const double local_threshold = (threshold - chosen_before) * exp(static_cast<double>(row_max - chunk_max) * scale);
    const int first = threadIdx.x * kPerThread;
    mine = 0;
    for (int i = first; i < first + kPerThread; ++i) mine += terms[i];
    double chunk_total;
    cumulative = scan_block(mine, &chunk_total);
    candidate = INT64_MAX;
    last_positive = -1;
    for (int i = first; i < first + kPerThread; ++i) {
        if (terms[i] > 0) last_positive = i;
        if (terms[i] > 0 && candidate == INT64_MAX && cumulative + terms[i] > local_threshold) candidate = i;
        cumulative += terms[i];
    }
    const int64_t index = choose(candidate, last_positive), token = chosen * kChunk + index;
    if (threadIdx.x == 0) {
        const float x = widen(static_cast<const T*>(a.logits)[row * a.row_stride + token]);
        a.token[row] = token;
        a.logprob[row] = static_cast<float>(static_cast<double>(x - row_max) * scale - log(total));
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish(RowStatisticsArguments a, int64_t chunks, const Partial* partials) {
    const int64_t row = blockIdx.x;
    const Partial* partial = partials + row * chunks;
    TopTwo top{minus_infinity(), minus_infinity()};
    bool bad = false;
    for (int64_t c = threadIdx.x; c < chunks; c += kThreads) {
        bad |= isnan(partial[c].max);
        top = combine(top, TopTwo{partial[c].max, partial[c].second});
    }
    bad = __syncthreads_or(bad);
    top = reduce_block(top);
    if (bad || !(top.max > minus_infinity())) {
        if (threadIdx.x == 0) {
            a.valid[row] = false;
            a.token[row] = -1;
            a.logprob[row] = a.entropy[row] = a.top1[row] = a.top2[row] = a.lse[row] = nan();
        }
        return;
    }
    Sums sums{0, 0, 0};
    int64_t argmax_chunk = INT64_MAX;
    for (int64_t c = threadIdx.x; c < chunks; c += kThreads) {
        const Partial p = partial[c];
        if (p.max == top.max && argmax_chunk == INT64_MAX) argmax_chunk = c;
        const float gap = fmaxf(p.max - top.max, kLowest), factor = expf(gap);
        sums.sum += factor * p.sum;
        sums.weighted += factor * (p.weighted + gap * p.sum);
    }
    sums = reduce_block(sums);
    argmax_chunk = reduce_block(argmax_chunk);
    const float log_sum = logf(sums.sum);
    if (threadIdx.x == 0) {
        a.valid[row] = true;
        a.entropy[row] = fmaxf(0.0f, log_sum - sums.weighted / sums.sum);
        a.top1[row] = 1.0f / sums.sum;
        a.top2[row] = expf(top.second - top.max) / sums.sum;
        a.lse[row] = top.max + log_sum;
    }
    const float temperature = temperature_of(a, row);
    if (temperature > 0) {
        draw<T>(a, row, chunks, partial, top.max, temperature);
        return;
    }
    const Chunk<T> chunk(a, row, argmax_chunk);
    int64_t index = INT64_MAX;
#pragma unroll
    for (int j = kPerThread - 1; j >= 0; --j)
        if (chunk.x[j] == top.max) index = Chunk<T>::index(j);
    index = reduce_block(index);
    if (threadIdx.x == 0) {
        a.token[row] = argmax_chunk * kChunk + index;
        a.logprob[row] = -log_sum;
    }
}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("row_statistics: ") + what + ": " + cudaGetErrorString(status));
}

template <typename T>
void launch(const RowStatisticsArguments& a, Partial* partial, cudaStream_t stream) {
    // Rows go in batches: the grid has at most 2^31 - 1 blocks.
    const int64_t chunks = (a.vocabulary + kChunk - 1) / kChunk, batch = ((int64_t{1} << 31) - 1) / chunks;
    for (int64_t first = 0; first < a.rows; first += batch) {
        RowStatisticsArguments part = a;
        part.rows = std::min(batch, a.rows - first);
        part.logits = static_cast<const T*>(a.logits) + first * a.row_stride;
        if (a.temperature) part.temperature += first;
        if (a.uniform) part.uniform += first;
        part.token += first, part.valid += first;
        for (float* RowStatisticsArguments::*field : {&RowStatisticsArguments::logprob, &RowStatisticsArguments::entropy,
                                                      &RowStatisticsArguments::top1, &RowStatisticsArguments::top2,
                                                      &RowStatisticsArguments::lse})
            part.*field += first;
        summarise<T><<<static_cast<unsigned>(part.rows * chunks), kThreads, 0, stream>>>(part, chunks, partial + first * chunks);
        finish<T><<<static_cast<unsigned>(part.rows), kThreads, 0, stream>>>(part, chunks, partial + first * chunks);
    }
    check(cudaGetLastError(), "launch");
}

}  // namespace

int64_t row_statistics_cuda_workspace(int64_t rows, int64_t vocabulary) {
    return rows * ((vocabulary + kChunk - 1) / kChunk) * static_cast<int64_t>(sizeof(Partial));
}

void row_statistics_cuda(const RowStatisticsArguments& a, void* workspace, int device, void* stream) {
    check(cudaSetDevice(device), "device");
    const auto partial = static_cast<Partial*>(workspace);
    const auto queue = static_cast<cudaStream_t>(stream);
    switch (a.dtype) {
        case Dtype::float32: return launch<float>(a, partial, queue);
        case Dtype::bfloat16: return launch<__nv_bfloat16>(a, partial, queue);
        case Dtype::float16: return launch<__half>(a, partial, queue);
    }
    throw std::invalid_argument("row_statistics: unknown dtype");
}

}  // namespace diffpo
