// The inner loops, written once over Vector. DIFFPO_INSTRUCTION_SET names the table this compilation defines.
#include "chunk_kernels.h"

#include "vector_exp.h"

namespace diffpo {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

template <Vector (*load)(const uint16_t*)>
void widen(const uint16_t* x, int n, float* out) {
    int i = 0;
    for (; i + Vector::lanes <= n; i += Vector::lanes) load(x + i).store(out + i);
    if (i == n) return;
    uint16_t rest[Vector::lanes] = {};
    for (int j = i; j < n; ++j) rest[j - i] = x[j];
    float wide[Vector::lanes];
    load(rest).store(wide);
    for (int j = i; j < n; ++j) out[j] = wide[j - i];
}

void widen_bfloat16(const uint16_t* x, int n, float* out) { widen<Vector::from_bfloat16>(x, n, out); }
void widen_float16(const uint16_t* x, int n, float* out) { widen<Vector::from_float16>(x, n, out); }

void top_two(const float* x, int n, float* max_out, float* second_out) {
    Vector first = Vector::all(kMinusInfinity), second = first;
    for (int i = 0; i < n; i += Vector::lanes) {
        const Vector v = Vector::load(x + i);
        second = max(min(v, first), second);
        first = max(v, first);
    }
    float top[Vector::lanes], next[Vector::lanes];
    first.store(top);
    second.store(next);
    for (int width = Vector::lanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) {
            const float a = top[i], b = top[i + width], c = next[i], d = next[i + width];
            const float lesser = a < b ? a : b, below = c > d ? c : d;
            top[i] = a > b ? a : b;
            next[i] = lesser > below ? lesser : below;
        }
    *max_out = top[0];
    *second_out = next[0];
}

// A running sum in float32 loses up to half an ulp at each step, and always to the same side where the terms are equal: after this many
// entries it is put aside and a new one started.
constexpr int kRun = 512;

void exp_sums(const float* x, int n, float max_value, float* sum_out, float* weighted_out, const char* next, int entry_size) {
    const Vector shift = Vector::all(max_value);
    Vector total = Vector::all(0), total_weighted = Vector::all(0);
    for (int begin = 0; begin < n; begin += kRun) {
        const int end = begin + kRun < n ? begin + kRun : n;
        Vector sum[2] = {Vector::all(0), Vector::all(0)}, weighted[2] = {Vector::all(0), Vector::all(0)};
        const auto add = [&](int i, int k) {
            __builtin_prefetch(next + static_cast<int64_t>(i) * entry_size);
            const Vector z = clamp_low(Vector::load(x + i) - shift);
            const Vector e = exp_of_clamped(z);
            sum[k] = sum[k] + e;
            weighted[k] = fma(z, e, weighted[k]);
        };
        int i = begin;
        for (; i + 2 * Vector::lanes <= end; i += 2 * Vector::lanes) {
            add(i, 0);
            add(i + Vector::lanes, 1);
        }
        for (; i < end; i += Vector::lanes) add(i, 0);
        total = total + (sum[0] + sum[1]);
        total_weighted = total_weighted + (weighted[0] + weighted[1]);
    }
    *sum_out = sum_of_lanes(total);
    *weighted_out = sum_of_lanes(total_weighted);
}

float exp_sum(const float* x, int n, float max_value, float scale, float* terms) {
    const Vector shift = Vector::all(max_value), factor = Vector::all(scale);
    Vector total = Vector::all(0);
    for (int begin = 0; begin < n; begin += kRun) {
        const int end = begin + kRun < n ? begin + kRun : n;
        Vector sum = Vector::all(0);
        for (int i = begin; i < end; i += Vector::lanes) {
            const Vector e = exp_of_clamped(clamp_low((Vector::load(x + i) - shift) * factor));
            if (terms) e.store(terms + i);
            sum = sum + e;
        }
        total = total + sum;
    }
    return sum_of_lanes(total);
}

int first_equal(const float* x, int n, float value) {
    const Vector wanted = Vector::all(value);
    for (int i = 0; i < n; i += Vector::lanes)
        if (const uint32_t bits = equal_bits(Vector::load(x + i), wanted)) return i + __builtin_ctz(bits);
    return n;
}

}  // namespace

#define DIFFPO_STRING_(x) #x
#define DIFFPO_STRING(x) DIFFPO_STRING_(x)
#define DIFFPO_JOIN_(a, b) a##b
#define DIFFPO_JOIN(a, b) DIFFPO_JOIN_(a, b)

const ChunkKernels& DIFFPO_JOIN(chunk_kernels_, DIFFPO_INSTRUCTION_SET)() {
    static constexpr ChunkKernels kernels = {
        DIFFPO_STRING(DIFFPO_INSTRUCTION_SET), widen_bfloat16, widen_float16, top_two, exp_sums, exp_sum, first_equal};
    return kernels;
}

}  // namespace diffpo
