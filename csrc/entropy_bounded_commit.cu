// What a denoising step commits, in CUDA: one block per row, one launch.
//
// Status: compiled for sm_80, sm_90 and sm_100, not yet run on a device. backends.py therefore never picks it by itself.
//
// The window's positions are sorted as 64-bit keys (proxy above, place in the window below): runs of 32 by warp shuffle, then merged by
// rank, which takes a third of the instructions of a bitonic network at 2048. A thread then owns kPerThread neighbours of the sorted
// order, and one scan over (sum - max, max) finds the prefix.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "entropy_bounded_commit.h"

namespace diffpo {
namespace {

constexpr int kMaxThreads = 1024;
constexpr unsigned kAllLanes = ~0u;

__device__ double infinity() { return __longlong_as_double(0x7ff0000000000000); }

__device__ double load(const FloatRows& values, int64_t row, int64_t column) {
    const int64_t i = row * values.row_stride + column;
    switch (values.type) {
        case FloatType::float32: return static_cast<const float*>(values.data)[i];
        case FloatType::float64: return static_cast<const double*>(values.data)[i];
        case FloatType::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(values.data)[i]);
        case FloatType::float16: return __half2float(static_cast<const __half*>(values.data)[i]);
    }
    return 0;
}

// float -> int in the same order; NaN as +inf, -0 as 0. The largest int stays free.
__device__ int ascending(float proxy) {
    const int bits = isnan(proxy) ? 0x7f800000 : proxy == 0 ? 0 : __float_as_int(proxy);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Sorts one key per lane by a bitonic network of shuffles.
__device__ int64_t sort_warp(int64_t key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int size = 2; size <= 32; size *= 2) {
#pragma unroll
        for (int stride = size / 2; stride > 0; stride /= 2) {
            const int64_t other = __shfl_xor_sync(kAllLanes, key, stride);
            const bool keep_smaller = ((lane & size) == 0) == ((lane & stride) == 0);
            key = (key < other) == keep_smaller ? key : other;
        }
    }
    return key;
}

// How many of the kSize ascending keys (a power of two) lie below `key`.
template <int kSize>
__device__ int count_below(const int64_t* keys, int64_t key) {
    const int64_t* next = keys;
#pragma unroll
    for (int step = kSize / 2; step > 0; step /= 2)
        if (next[step - 1] < key) next += step;
    return static_cast<int>(next - keys) + (*next < key);
}

// Sorts keys that all differ, in shared memory, given in ascending runs of kSize: two neighbouring runs are merged by sending each key
// to the sum of its ranks in both, from one buffer to the other, until one run is left. Returns where it lies.
template <int kPerThread, int kSize = 32>
__device__ const int64_t* merge(int64_t* from, int64_t* to) {
    if constexpr (kSize < kPerThread * kMaxThreads) {
        const int threads = blockDim.x;
        if (kSize < kPerThread * threads) {
            int place[kPerThread];
#pragma unroll
            for (int e = 0; e < kPerThread; ++e) {
                const int i = e * threads + threadIdx.x;
                place[e] = (i & ~kSize) + count_below<kSize>(from + ((i ^ kSize) & -kSize), from[i]);
            }
#pragma unroll
            for (int e = 0; e < kPerThread; ++e) to[place[e]] = from[e * threads + threadIdx.x];
            __syncthreads();
            return merge<kPerThread, 2 * kSize>(to, from);
        }
    }
    return from;
}

// A run of costs. Joining neighbours adds without a subtraction: s1 + s2 - max(m1, m2) = (s1 - m1) + (s2 - m2) + min(m1, m2).
struct Run {
    double excess, highest;  // sum - max, max
};
__device__ Run join(Run a, Run b) { return {a.excess + b.excess + min(a.highest, b.highest), max(a.highest, b.highest)}; }

__device__ Run scan_warp(Run run) {
    for (int step = 1; step < 32; step *= 2) {
        const Run before{__shfl_up_sync(kAllLanes, run.excess, step), __shfl_up_sync(kAllLanes, run.highest, step)};
        if (threadIdx.x % 32 >= step) run = join(before, run);
    }
    return run;
}

// The join of all threads before this one.
__device__ Run scan_block(Run mine) {
    __shared__ Run total[kMaxThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Run inclusive = scan_warp(mine);
    if (lane == 31) total[warp] = inclusive;
    __syncthreads();
    if (warp == 0) total[lane] = scan_warp(lane < blockDim.x / 32 ? total[lane] : Run{0, 0});
    __syncthreads();
    const Run before = warp == 0 ? Run{0, 0} : total[warp - 1];
    const Run in_warp{__shfl_up_sync(kAllLanes, inclusive.excess, 1), __shfl_up_sync(kAllLanes, inclusive.highest, 1)};
    return lane == 0 ? before : join(before, in_warp);
}

// The smallest of the block's values, given to every thread.
__device__ int smallest_of_block(int value) {
    __shared__ int smallest;
    if (threadIdx.x == 0) smallest = INT_MAX;
    __syncthreads();
    value = __reduce_min_sync(kAllLanes, value);
    if (threadIdx.x % 32 == 0) atomicMin(&smallest, value);
    __syncthreads();
    return smallest;
}

template <int kPerThread>
__global__ void __launch_bounds__(kMaxThreads, 1) commit(EntropyBoundedCommitArguments a) {
    __shared__ int64_t buffer[2][kPerThread * kMaxThreads];
    const int64_t row = blockIdx.x;
    // Everything that is also written is read ahead of the first barrier: other threads write it below.
    const int64_t start = a.start ? a.start[row] : a.start_of_all, end = a.end ? a.end[row] : a.end_of_all;
    const int64_t step = a.nfe ? a.nfe[row] : 0;
    const double gamma = a.gamma.data ? load(a.gamma, row, 0) : a.gamma_of_all;
    const int64_t first = max(start, int64_t{0}), last = min(end, a.length);
    int64_t* tokens = a.tokens.data + row * a.tokens.row_stride;
    bool* committed = a.committed + row * a.length;

    int64_t key[kPerThread];
    int count = 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
        const int place = e * blockDim.x + threadIdx.x;
        const int64_t position = first + place;
        const bool active = position < last && place < a.max_window && tokens[position] == a.mask_id;
        const int upper = active ? ascending(static_cast<float>(load(a.proxy, row, position))) : INT_MAX;
        key[e] = static_cast<int64_t>(upper) << 32 | place;
        count += __syncthreads_count(active);
    }
    for (int64_t l = threadIdx.x; l < a.length; l += blockDim.x) committed[l] = false;  // ahead of the barriers below
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) buffer[0][e * blockDim.x + threadIdx.x] = sort_warp(key[e]);
    __syncthreads();
    const int64_t* sorted = merge<kPerThread>(buffer[0], buffer[1]);

    int64_t position[kPerThread];
    double cost[kPerThread];
    Run mine{0, 0};
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
        const int n = threadIdx.x * kPerThread + e;
        position[e] = first + static_cast<int>(sorted[n]);
        const double value = n < count ? load(a.entropy, row, position[e]) : 0.0;
        cost[e] = isnan(value) ? infinity() : fmax(value, 0.0);
        mine = join(mine, {0, cost[e]});
    }
    Run run = scan_block(mine);
    int refused = INT_MAX;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
        const int n = threadIdx.x * kPerThread + e;
        run = join(run, {0, cost[e]});
        const double price = run.highest == infinity() ? infinity() : a.ranked ? (n + 2) * cost[e] : run.excess;
        if (n > 0 && n < count && !(price <= gamma)) refused = min(refused, n);
    }
    const int accepted = min(smallest_of_block(refused), count);

    const int64_t new_step = step + (count > 0);
    bool left = false;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
        const int n = threadIdx.x * kPerThread + e;
        const int64_t l = position[e];
        if (n < accepted) {
            const int64_t token = a.proposal.data[row * a.proposal.row_stride + l];
            tokens[l] = token;
            committed[l] = true;
            if (a.commit_step.data) a.commit_step.data[row * a.commit_step.row_stride + l] = new_step;
            if (a.logprob.data) {
                char* to = a.logprob.data + row * a.logprob.row_stride + l * a.logprob_size;
                const char* from = a.proposal_logprob.data + row * a.proposal_logprob.row_stride + l * a.logprob_size;
                if (a.logprob_size == 4) *reinterpret_cast<int*>(to) = *reinterpret_cast<const int*>(from);
                else if (a.logprob_size == 8) *reinterpret_cast<int64_t*>(to) = *reinterpret_cast<const int64_t*>(from);
                else *reinterpret_cast<short*>(to) = *reinterpret_cast<const short*>(from);
            }
            left |= token == a.mask_id;
        } else {
            left |= n < count;
        }
    }
    const bool full = !__syncthreads_or(left) && last - first <= a.max_window;
    if (threadIdx.x != 0) return;
    if (a.nfe) a.nfe[row] = new_step;
    if (a.advance && full) {
        a.start[row] = last;
        a.end[row] = min(2 * end - start, a.length);
    }
}

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("entropy_bounded_commit_: ") + what + ": " + cudaGetErrorString(status));
}

}  // namespace

void entropy_bounded_commit_cuda(const EntropyBoundedCommitArguments& a, int device, void* stream) {
    if (a.max_window > kMaxCudaWindow) throw std::invalid_argument("entropy_bounded_commit_: the CUDA kernel sorts at most 2048 positions");
    check(cudaSetDevice(device), "device");
    int places = 32;  // the smallest power of two that holds the window
    while (places < a.max_window) places *= 2;
    const auto queue = static_cast<cudaStream_t>(stream);
    const auto blocks = static_cast<unsigned>(a.rows);
    if (places <= kMaxThreads) commit<1><<<blocks, places, 0, queue>>>(a);
    else commit<2><<<blocks, kMaxThreads, 0, queue>>>(a);
    check(cudaGetLastError(), "launch");
}

}  // namespace diffpo
