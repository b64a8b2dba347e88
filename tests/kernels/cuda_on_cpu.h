// Enough of CUDA to run single-warp kernels on the CPU: 32 threads that meet at a barrier wherever the lanes exchange values.
// test_cuda_on_cpu.py rewrites csrc/row_statistics.cu for it.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define __global__ static
#define __device__
#define __launch_bounds__(...)

static thread_local struct { int x; } threadIdx;
static thread_local struct { unsigned x; } blockIdx;
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
struct __half2 { __half low, high; };
typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline float __int_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float(uint32_t{x.bits} << 16); }
inline float __half2float(__half x) {
    const uint32_t sign = uint32_t{x.bits} >> 15 << 31, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return __int_as_float(sign | 0x7f800000u | magnitude << 13);                    // inf, NaN
    return std::copysign(__int_as_float(magnitude << 13) * 5.192296858534828e+33f, __int_as_float(sign));  // 2^112: the exponents' bias
}
inline float2 __half22float2(__half2 x) { return {__half2float(x.low), __half2float(x.high)}; }
inline float __fdividef(float a, float b) { return a / b; }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __clz(unsigned bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
template <typename T>
T __ldg(const T* address) { return *address; }

static struct {
    pthread_barrier_t barrier;
    double values[32];
} warp;

inline void __syncwarp() { pthread_barrier_wait(&warp.barrier); }

template <typename T>
T from_lane(T value, int lane) {
    std::memcpy(&warp.values[threadIdx.x], &value, sizeof value);
    __syncwarp();
    std::memcpy(&value, &warp.values[lane], sizeof value);
    __syncwarp();
    return value;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return from_lane(value, lane); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return from_lane(value, threadIdx.x ^ mask); }
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) { return from_lane(value, threadIdx.x >= by ? threadIdx.x - by : threadIdx.x); }
inline unsigned __ballot_sync(unsigned, bool mine) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(from_lane(int{mine}, lane)) << lane;
    return bits;
}

// What kernel<<<blocks, 32>>>(...) becomes: the blocks one after the other.
template <typename Kernel>
void run_blocks(unsigned blocks, const Kernel& kernel) {
    pthread_barrier_init(&warp.barrier, nullptr, 32);
    std::vector<std::thread> lanes;
    for (int lane = 0; lane < 32; ++lane)
        lanes.emplace_back([&kernel, blocks, lane] {
            threadIdx.x = lane;
            for (unsigned block = 0; block < blocks; ++block) {
                blockIdx.x = block;
                kernel();
                __syncwarp();
            }
        });
    for (std::thread& lane : lanes) lane.join();
}
