// Row statistics in CUDA. See row_statistics.h for the two stages.
//
// Status: compiled for sm_80, sm_90 and sm_100, not yet run on a device. backends.py therefore never picks it by itself.
//
// Everything is done by single warps: one per (row, chunk), then one per row. A lane keeps its 64 logits in registers between the max
// and the exponentials, so the logits cross the memory bus once. Stage 1 knows no index, no second maximum and no banned id: at full
// bandwidth there are about 14 instructions per bf16 logit. Stage 2 replaces the partial results of chunks that hold a banned id.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "row_statistics.h"

namespace diffpo {
namespace {

constexpr int kWarp = 32;
constexpr int kPerLane = 64;
constexpr int kChunk = kWarp * kPerLane;
constexpr unsigned kAll = ~0u;
constexpr float kLowest = -1e30f;  // stands for -inf in a product with its exponential, so that it is 0 and not NaN
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct alignas(16) Partial {  // of a chunk
    float max;                // of the entries that are not NaN
    float sum;                // sum of exp(x - max); NaN if an entry is NaN or +inf
    float weighted;           // sum of (x - max) exp(x - max)
    float tempered;           // sum of exp((x - max) / T); anything where T = 0
};

__device__ float minus_infinity() { return -__int_as_float(0x7f800000); }
__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }

// The entries in a 32-bit word, and the word that holds -inf only.
template <typename T>
struct Word;
template <>
struct Word<float> {
    static constexpr int kMinusInfinity = 0xff800000;
    __device__ static void unpack(int word, float* x) { x[0] = __int_as_float(word); }
};
template <>
struct Word<__nv_bfloat16> {
    static constexpr int kMinusInfinity = 0xff80ff80;
    __device__ static void unpack(int word, float* x) { x[0] = __int_as_float(word << 16), x[1] = __int_as_float(word & 0xffff0000); }
};
template <>
struct Word<__half> {
    static constexpr int kMinusInfinity = 0xfc00fc00;
    __device__ static void unpack(int word, float* x) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
        x[0] = pair.x, x[1] = pair.y;
    }
};

__device__ float exp_base_2(float x) {  // exp2f without its care for denormal results
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 0 at the maximum exactly; NaN for NaN and +inf.
__device__ float exponent(float x, float max) { return (x - (max > minus_infinity() ? max : 0.0f)) * kLog2E; }

struct Max {
    template <typename T>
    __device__ T operator()(T a, T b) const { return a > b ? a : b; }
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
    template <typename T>
    __device__ T operator()(T a, T b) const { return a + b; }
};
// The combination of every lane's value, given to every lane, always in the same order.
template <typename Combine, typename T>
__device__ T over_warp(T value) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) value = Combine{}(value, __shfl_xor_sync(kAll, value, lane));
    return value;
}

__device__ float temperature_of(const RowStatisticsArguments& a, int64_t row) { return a.temperature ? a.temperature[row] : 0.0f; }
// 1 / T, finite, so that 0 * scale is 0, and positive, so that -inf * scale is -inf.
__device__ float scale_of(float temperature) { return fminf(fmaxf(__fdividef(1.0f, temperature), 1.17549435e-38f), 1e30f); }

// One chunk of a row as float32 in registers; -inf past the row's end. kAligned: every row starts at a multiple of 16 bytes and ends at
// one, so that a load of 16 bytes is either inside the row or outside it.
template <typename T, bool kAligned>
struct Chunk {
    static constexpr int kVector = kAligned ? 16 / sizeof(T) : 1;  // entries in one load
    float x[kPerLane];

    __device__ static int index(int j) { return (j / kVector * kWarp + threadIdx.x) * kVector + j % kVector; }

    __device__ Chunk(const RowStatisticsArguments& a, int64_t row, int64_t chunk) {
        const int64_t begin = chunk * kChunk + threadIdx.x * kVector;
        const T* source = static_cast<const T*>(a.logits) + row * a.row_stride + begin;
        const int left = static_cast<int>(min(a.vocabulary - begin, static_cast<int64_t>(kChunk)));
#pragma unroll
        for (int j = 0; j < kPerLane; j += kVector) {
            const bool inside = j * kWarp < left;
            if constexpr (kAligned) {
                constexpr int fill = Word<T>::kMinusInfinity, per_word = kVector / 4;
                const int4 words = inside ? __ldg(reinterpret_cast<const int4*>(source + j * kWarp)) : int4{fill, fill, fill, fill};
                Word<T>::unpack(words.x, x + j), Word<T>::unpack(words.y, x + j + per_word);
                Word<T>::unpack(words.z, x + j + 2 * per_word), Word<T>::unpack(words.w, x + j + 3 * per_word);
            } else {
                x[j] = inside ? widen(source[j * kWarp]) : minus_infinity();
            }
        }
    }

    // Sets the entry at a position of the chunk to -inf.
    __device__ void exclude(int position) {
        if (position / kVector % kWarp != threadIdx.x) return;
        const int wanted = position / (kVector * kWarp) * kVector + position % kVector;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j)
            if (j == wanted) x[j] = minus_infinity();
    }

    __device__ void ban(const RowStatisticsArguments& a, int64_t chunk) {
#pragma unroll 1
        for (int64_t b = 0; b < a.banned_count; ++b)
            if (a.banned[b] / kChunk == chunk) exclude(static_cast<int>(a.banned[b] % kChunk));
    }

    // The first position of the chunk that holds `value`, or kChunk.
    __device__ int find(float value) const {
        int found = kPerLane;
#pragma unroll
        for (int j = kPerLane - 1; j >= 0; --j)
            if (x[j] == value) found = j;
        return -over_warp<Max>(found < kPerLane ? -index(found) : -kChunk);
    }

    __device__ float max() const {
        float result = x[0];
#pragma unroll
        for (int j = 1; j < kPerLane; ++j) result = fmaxf(result, x[j]);
        return over_warp<Max>(result);
    }

    // The lane's sum of f(x), eight at a time: a running float32 sum of many equal terms errs to the same side at every step.
    template <typename F>
    __device__ float sum(const F& f) const {
        float total = 0;
#pragma unroll
        for (int j = 0; j < kPerLane; j += 8) {
            float part = f(x[j]);
#pragma unroll
            for (int k = 1; k < 8; ++k) part += f(x[j + k]);
            total = j == 0 ? part : total + part;
        }
        return total;
    }

    __device__ Partial summary(float temperature) const {
        const float max = this->max();
        const float total = over_warp<Sum>(sum([&](float v) { return exp_base_2(exponent(v, max)); }));
        const float weighted = over_warp<Sum>(sum([&](float v) {
            const float z = exponent(v, max);
            return fmaxf(z, kLowest) * exp_base_2(z);
        }));
        float tempered = total;
        if (temperature > 0 && temperature != 1) {
            const float scale = scale_of(temperature);
            tempered = over_warp<Sum>(sum([&](float v) { return exp_base_2(exponent(v, max) * scale); }));
        }
        return {max, total, weighted * kLn2, tempered};
    }
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWarp) summarise(RowStatisticsArguments a, unsigned chunks, Partial* partials) {
    const int64_t row = blockIdx.x / chunks;
    const Partial partial = Chunk<T, kAligned>(a, row, blockIdx.x % chunks).summary(temperature_of(a, row));
    if (threadIdx.x == 0) partials[blockIdx.x] = partial;
}

// Finds the first unit that takes a running sum of weights above a threshold, and the sum ahead of it. Where rounding leaves the sum
// short of the threshold, that is the last unit with a positive weight; one of weight 0 is never chosen.
struct Walk {
    double threshold;
    double sum = 0;
    int64_t unit = 0;
    double before = 0;
    bool done = false;

    // The warp's next 32 units, from `base`, one per lane.
    __device__ void step(int64_t base, double weight) {
        const int lane = threadIdx.x;
        double inclusive = weight;
#pragma unroll
        for (int width = 1; width < kWarp; width *= 2) {
            const double below = __shfl_up_sync(kAll, inclusive, width);
            if (lane >= width) inclusive += below;
        }
        const unsigned positive = __ballot_sync(kAll, weight > 0);
        const unsigned above = __ballot_sync(kAll, weight > 0 && sum + inclusive > threshold);
        if (positive != 0) {
            const int chosen = above != 0 ? __ffs(above) - 1 : kWarp - 1 - __clz(positive);
            unit = base + chosen;
            before = sum + __shfl_sync(kAll, inclusive - weight, chosen);
        }
        done = above != 0;
        sum += __shfl_sync(kAll, inclusive, kWarp - 1);
    }
};

struct Draw {
    int64_t token;
    float gap;  // x - max
    float logprob;
};

template <typename T, bool kAligned>
__device__ Draw draw(const RowStatisticsArguments& a, int64_t row, unsigned chunks, const Partial* partials, float row_max, float temperature) {
    const float scale = scale_of(temperature);
    const auto factor = [&](unsigned c) { return exp_base_2(exponent(partials[c].max, row_max) * scale); };
    const auto weight = [&](unsigned c) { return c < chunks ? static_cast<double>(factor(c)) * partials[c].tempered : 0.0; };
    double total = 0;
    for (unsigned c = threadIdx.x; c < chunks; c += kWarp) total += weight(c);
    total = over_warp<Sum>(total);

    Walk over_chunks{a.uniform[row] * total};
    for (unsigned c = 0; c < chunks && !over_chunks.done; c += kWarp) over_chunks.step(c, weight(c + threadIdx.x));
    const unsigned chosen = static_cast<unsigned>(over_chunks.unit);

    // Inside the chunk weights are relative to its own maximum: none that stage 1 counted is lost to underflow. They go through shared
    // memory, so that a lane sums neighbouring entries; a gap after every 32 keeps the lanes out of each other's banks.
    __shared__ float terms[kChunk + kChunk / kWarp];
    const auto term = [&](int i) { return terms + i + i / kWarp; };
    const float chunk_max = partials[chosen].max;
    Chunk<T, kAligned> chunk(a, row, chosen);
    chunk.ban(a, chosen);
    constexpr int kVector = Chunk<T, kAligned>::kVector;
    float* mine = term(chunk.index(0));
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
        mine[j / kVector * kVector * (kWarp + 1) + j % kVector] = exp_base_2(exponent(chunk.x[j], chunk_max) * scale);
    __syncwarp();
    float sum = 0;
#pragma unroll 4
    for (int i = 0; i < kPerLane; ++i) sum += *term(threadIdx.x * kPerLane + i);
    Walk over_lanes{(over_chunks.threshold - over_chunks.before) / factor(chosen)};
    over_lanes.step(0, sum);
    Walk over_entries{over_lanes.threshold - over_lanes.before};
    const int first = static_cast<int>(over_lanes.unit) * kPerLane;
    for (int i = first; i < first + kPerLane && !over_entries.done; i += kWarp) over_entries.step(i, *term(i + threadIdx.x));
    const int64_t token = chosen * int64_t{kChunk} + over_entries.unit;
    const float x = widen(static_cast<const T*>(a.logits)[row * a.row_stride + token]);
    return {token, x - row_max, (x - row_max) * scale - logf(static_cast<float>(total))};
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWarp, 16) finish(RowStatisticsArguments a, unsigned chunks, Partial* all_partials) {
    const int64_t row = blockIdx.x;
    Partial* partials = all_partials + row * chunks;
    const float temperature = temperature_of(a, row);
    for (int64_t b = 0; b < a.banned_count; ++b) {
        const int64_t c = a.banned[b] / kChunk;
        if (b > 0 && c == a.banned[b - 1] / kChunk) continue;  // they are sorted: each chunk is redone once
        Chunk<T, kAligned> chunk(a, row, c);
        chunk.ban(a, c);
        const Partial partial = chunk.summary(temperature);
        if (threadIdx.x == 0) partials[c] = partial;
    }
    __syncwarp();

    float row_max = minus_infinity();
#pragma unroll 1
    for (unsigned c = threadIdx.x; c < chunks; c += kWarp) row_max = fmaxf(row_max, partials[c].max);
    row_max = over_warp<Max>(row_max);
    float sum = 0, weighted = 0;
    int argmax_chunk = -1;  // the first, so the largest of the negated numbers
#pragma unroll 1
    for (unsigned c = threadIdx.x; c < chunks; c += kWarp) {
        const Partial p = partials[c];
        const float gap = exponent(p.max, row_max), factor = exp_base_2(gap);
        sum += factor * p.sum;
        weighted += factor * (p.weighted + fmaxf(gap, kLowest) * kLn2 * p.sum);
        if (p.max == row_max && argmax_chunk < 0) argmax_chunk = static_cast<int>(c);
    }
    sum = over_warp<Sum>(sum);
    weighted = over_warp<Sum>(weighted);
    argmax_chunk = -over_warp<Max>(argmax_chunk < 0 ? -INT32_MAX : -argmax_chunk);

    const float nan = __int_as_float(0x7fc00000);
    Draw chosen{-1, nan, nan};
    float entropy = nan, top1 = nan, top2 = nan, odds = nan, lse = nan;
    const bool valid = sum > 0;  // a NaN or +inf anywhere made it NaN; without a finite logit it is 0
    if (valid) {
        Chunk<T, kAligned> chunk(a, row, argmax_chunk);
        chunk.ban(a, argmax_chunk);
        const int index = chunk.find(row_max);
        chunk.exclude(index);
        float second = chunk.max();
        odds = chunk.sum([&](float v) { return exp_base_2(exponent(v, row_max)); });  // without the largest: it would swallow small ones
#pragma unroll 1
        for (unsigned c = threadIdx.x; c < chunks; c += kWarp) {
            if (c == static_cast<unsigned>(argmax_chunk)) continue;
            second = fmaxf(second, partials[c].max);
            odds += exp_base_2(exponent(partials[c].max, row_max)) * partials[c].sum;
        }
        odds = over_warp<Sum>(odds);
        sum = 1 + odds;
        const float log_sum = log1pf(odds);
        entropy = fmaxf(0.0f, log_sum - weighted / sum);
        top1 = 1 / sum;
        top2 = exp_base_2(exponent(over_warp<Max>(second), row_max)) / sum;
        lse = row_max + log_sum;
        chosen = temperature > 0 ? draw<T, kAligned>(a, row, chunks, partials, row_max, temperature)
                                 : Draw{argmax_chunk * int64_t{kChunk} + index, 0, -log_sum};
    }
    if (threadIdx.x != 0) return;
    a.token[row] = chosen.token;
    a.logprob[row] = chosen.logprob;
    a.entropy[row] = entropy;
    a.confidence[row] = exp_base_2(chosen.gap * kLog2E) * top1;
    a.top1[row] = top1;
    a.top2[row] = top2;
    a.odds[row] = odds;
    a.lse[row] = lse;
    a.valid[row] = valid;
}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("row_statistics: ") + what + ": " + cudaGetErrorString(status));
}

int64_t chunks_of(int64_t vocabulary) { return (vocabulary + kChunk - 1) / kChunk; }

template <typename T, bool kAligned>
void launch(const RowStatisticsArguments& a, Partial* partials, cudaStream_t stream) {
    // Rows go in batches: the grid has at most 2^31 - 1 blocks.
    const int64_t chunks = chunks_of(a.vocabulary), batch = ((int64_t{1} << 31) - 1) / chunks;
    for (int64_t first = 0; first < a.rows; first += batch) {
        RowStatisticsArguments part = a;
        part.rows = std::min(batch, a.rows - first);
        part.logits = static_cast<const T*>(a.logits) + first * a.row_stride;
        if (a.temperature) part.temperature += first;
        if (a.uniform) part.uniform += first;
        part.token += first, part.valid += first;
        for (float* RowStatisticsArguments::*field : {&RowStatisticsArguments::logprob, &RowStatisticsArguments::entropy,
                                                      &RowStatisticsArguments::confidence, &RowStatisticsArguments::top1,
                                                      &RowStatisticsArguments::top2, &RowStatisticsArguments::odds,
                                                      &RowStatisticsArguments::lse})
            part.*field += first;
        const auto width = static_cast<unsigned>(chunks);
        summarise<T, kAligned><<<static_cast<unsigned>(part.rows * chunks), kWarp, 0, stream>>>(part, width, partials + first * chunks);
        finish<T, kAligned><<<static_cast<unsigned>(part.rows), kWarp, 0, stream>>>(part, width, partials + first * chunks);
    }
    check(cudaGetLastError(), "launch");
}

template <typename T>
void choose_and_launch(const RowStatisticsArguments& a, Partial* partials, cudaStream_t stream) {
    constexpr int64_t vector = 16 / sizeof(T);
    const bool aligned = reinterpret_cast<uintptr_t>(a.logits) % 16 == 0 && a.row_stride % vector == 0 && a.vocabulary % vector == 0;
    aligned ? launch<T, true>(a, partials, stream) : launch<T, false>(a, partials, stream);
}

}  // namespace

int64_t row_statistics_cuda_workspace(int64_t rows, int64_t vocabulary) {
    return rows * chunks_of(vocabulary) * static_cast<int64_t>(sizeof(Partial));
}

void row_statistics_cuda(const RowStatisticsArguments& a, void* workspace, int device, void* stream) {
    check(cudaSetDevice(device), "device");
    const auto partials = static_cast<Partial*>(workspace);
    const auto queue = static_cast<cudaStream_t>(stream);
    switch (a.dtype) {
        case Dtype::float32: return choose_and_launch<float>(a, partials, queue);
        case Dtype::bfloat16: return choose_and_launch<__nv_bfloat16>(a, partials, queue);
        case Dtype::float16: return choose_and_launch<__half>(a, partials, queue);
    }
    throw std::invalid_argument("row_statistics: unknown dtype");
}

}  // namespace diffpo
