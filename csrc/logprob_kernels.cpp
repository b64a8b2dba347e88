// The inner loops, written once over Vector. DIFFPO_INSTRUCTION_SET names the table this compilation defines.
#include "logprob_kernels.h"

#include "vector_exp.h"

namespace diffpo {
namespace {

uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

void narrow_bfloat16(const float* x, int n, uint16_t* out) {
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(x[i]);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

#if defined(__AVX512F__) || defined(__F16C__)
void narrow_vector(const float* x, uint16_t* out) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(_mm512_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(_mm256_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
uint16_t float16_of_float(float x) {
    const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to inf
    if (magnitude < 0x38800000u) {  // denormal in float16: adding 1/2 puts its last bit at float32's
        const float shifted = float_of_bits(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
void narrow_vector(const float* x, uint16_t* out) {
    for (int i = 0; i < Vector::lanes; ++i) out[i] = float16_of_float(x[i]);
}
#endif

void narrow_float16(const float* x, int n, uint16_t* out) {
    int i = 0;
    for (; i + Vector::lanes <= n; i += Vector::lanes) narrow_vector(x + i, out + i);
    if (i == n) return;
    float rest[Vector::lanes] = {};
    uint16_t narrow[Vector::lanes];
    for (int j = i; j < n; ++j) rest[j - i] = x[j];
    narrow_vector(rest, narrow);
    for (int j = i; j < n; ++j) out[j] = narrow[j - i];
}

// Combines the lanes by halves; the widths are known when this is compiled, which makes each half one instruction.
template <int width = Vector::lanes / 2, typename Combine>
inline float fold(float* lane, const Combine& combine) {
    for (int i = 0; i < width; ++i) lane[i] = combine(lane[i], lane[i + width]);
    if constexpr (width > 1) return fold<width / 2>(lane, combine);
    return lane[0];
}

template <typename Combine>
inline float fold(Vector a, const Combine& combine) {
    float lane[Vector::lanes];
    a.store(lane);
    return fold(lane, combine);
}

inline float sum(Vector a) {
    return fold(a, [](float x, float y) { return x + y; });
}

float largest(const float* x, int n) {
    Vector top = Vector::all(-__builtin_inff());
    for (int i = 0; i < n; i += Vector::lanes) top = max(Vector::load(x + i), top);
    return fold(top, [](float x, float y) { return x > y ? x : y; });
}

void exp_sums(const float* x, int n, float max_value, float scale, float* sum_out, float* weighted_out) {
    const Vector shift = Vector::all(max_value), factor = Vector::all(scale);
    Vector total = Vector::all(0), weighted = Vector::all(0);
    for (int i = 0; i < n; i += Vector::lanes) {
        const Vector z = clamp_low((Vector::load(x + i) - shift) * factor);
        const Vector e = exp_of_clamped(z);
        total = total + e;
        weighted = fma(z, e, weighted);
    }
    *sum_out = sum(total);
    *weighted_out = sum(weighted);
}

void gradient(float* x, int n, const RowGradient& row) {
    const Vector shift = Vector::all(row.max), scale = Vector::all(row.scale), log_sum = Vector::all(row.log_sum);
    const Vector by_logprob = Vector::all(-row.by_logprob), by_entropy = Vector::all(-row.by_entropy);
    const Vector entropy = Vector::all(row.entropy);
    for (int i = 0; i < n; i += Vector::lanes) {
        const Vector log_p = clamp_low(fms(Vector::load(x + i) - shift, scale, log_sum));
        (exp_of_clamped(log_p) * fma(by_entropy, log_p + entropy, by_logprob)).store(x + i);
    }
}

}  // namespace

#define DIFFPO_STRING_(x) #x
#define DIFFPO_STRING(x) DIFFPO_STRING_(x)
#define DIFFPO_JOIN_(a, b) a##b
#define DIFFPO_JOIN(a, b) DIFFPO_JOIN_(a, b)

const LogprobKernels& DIFFPO_JOIN(logprob_kernels_, DIFFPO_INSTRUCTION_SET)() {
    static constexpr LogprobKernels kernels = {
        DIFFPO_STRING(DIFFPO_INSTRUCTION_SET), narrow_bfloat16, narrow_float16, largest, exp_sums, gradient};
    return kernels;
}

}  // namespace diffpo
