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

float largest(const float* x, int n) {
    Vector top = Vector::all(kMinusInfinity);
    for (int i = 0; i < n; i += Vector::lanes) top = max(Vector::load(x + i), top);
    return fold(top, [](float x, float y) { return x > y ? x : y; });
}

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

// `scaled` is known when this is compiled: row statistics, whose scale is 1, need no product.
template <bool scaled>
void exp_sums_of(const float* x, int n, float max_value, float scale, float* sum_out, float* weighted_out, const char* next,
                 int entry_size) {
    const Vector shift = Vector::all(max_value), factor = Vector::all(scale);
    Vector total = Vector::all(0), total_weighted = Vector::all(0);
    for (int begin = 0; begin < n; begin += kRun) {
        const int end = begin + kRun < n ? begin + kRun : n;
        Vector sum[2] = {Vector::all(0), Vector::all(0)}, weighted[2] = {Vector::all(0), Vector::all(0)};
        const auto add = [&](int i, int k) {
            __builtin_prefetch(next + static_cast<int64_t>(i) * entry_size);
            const Vector gap = Vector::load(x + i) - shift, z = clamp_low(scaled ? gap * factor : gap);
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

void exp_sums(const float* x, int n, float max_value, float scale, float* sum, float* weighted, const char* next, int entry_size) {
    (scale == 1 ? exp_sums_of<false> : exp_sums_of<true>)(x, n, max_value, scale, sum, weighted, next, entry_size);
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

void gradient(float* x, int n, const RowGradient& row) {
    const Vector shift = Vector::all(row.max), scale = Vector::all(row.scale), log_sum = Vector::all(row.log_sum);
    const Vector by_logprob = Vector::all(-row.by_logprob), by_entropy = Vector::all(-row.by_entropy);
    const Vector entropy = Vector::all(row.entropy);
    for (int i = 0; i < n; i += Vector::lanes) {
        // A logit formed again, by another product, may exceed the max. A NaN is kept.
        const Vector log_p = clamp_low(min(Vector::all(0), fms(Vector::load(x + i) - shift, scale, log_sum)));
        (exp_of_clamped(log_p) * fma(by_entropy, log_p + entropy, by_logprob)).store(x + i);
    }
}

int first_equal(const float* x, int n, float value) {
    const Vector wanted = Vector::all(value);
    for (int i = 0; i < n; i += Vector::lanes)
        if (const uint32_t bits = equal_bits(Vector::load(x + i), wanted)) return i + __builtin_ctz(bits);
    return n;
}

// A tile of sums that registers hold: weight rows x vectors of columns. Eight weight rows, and not more, because rows of a power of two
// bytes fall into the same set of the first cache, which holds 12 lines.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPrefetch = 16;  // columns of a weight row in one cache line

// Every weight is read once and spread over a vector; no sum runs across lanes.
template <int rows, int vectors>
void linear_tile(const LinearBlock& block, const float* hidden, const float* weight, float* out) {
    for (int r = 0; r < rows; ++r)
        for (int k = 0; k < vectors; ++k) Vector::all(0).store(out + r * block.width + k * Vector::lanes);
    for (int64_t begin = 0; begin < block.depth; begin += kRun) {
        const int64_t end = begin + kRun < block.depth ? begin + kRun : block.depth;
        Vector sum[rows][vectors];
        for (auto& row : sum)
            for (Vector& entry : row) entry = Vector::all(0);
        for (int64_t line = begin; line < end; line += kPrefetch) {
            // The next tile's line, for reading, into the second cache: the first is full of this tile and of hidden.
            for (int r = 0; r < rows; ++r) __builtin_prefetch(weight + (rows + r) * block.weight_stride + line, 0, 2);
            const int64_t stop = line + kPrefetch < end ? line + kPrefetch : end;
            for (int64_t d = line; d < stop; ++d) {
                Vector h[vectors];
                for (int k = 0; k < vectors; ++k) h[k] = Vector::load(hidden + d * block.width + k * Vector::lanes);
                for (int r = 0; r < rows; ++r) {
                    const Vector w = Vector::all(weight[r * block.weight_stride + d]);
                    for (int k = 0; k < vectors; ++k) sum[r][k] = fma(w, h[k], sum[r][k]);
                }
            }
        }
        for (int r = 0; r < rows; ++r)
            for (int k = 0; k < vectors; ++k) {
                float* total = out + r * block.width + k * Vector::lanes;
                (Vector::load(total) + sum[r][k]).store(total);
            }
    }
}

template <int vectors>
void linear_columns(const LinearBlock& block, int first_column, float* sums) {
    const float* hidden = block.hidden + first_column;
    int v = 0;
    for (; v + kTileRows <= block.rows; v += kTileRows)
        linear_tile<kTileRows, vectors>(block, hidden, block.weight + v * block.weight_stride, sums + v * block.width);
    for (; v < block.rows; ++v)
        linear_tile<1, vectors>(block, hidden, block.weight + v * block.weight_stride, sums + v * block.width);
}

void linear(const LinearBlock& block) {
    alignas(64) float sums[kLinearRows * kLinearColumns];  // [rows, width]
    constexpr int step = 2 * Vector::lanes;
    for (int c = 0; c < block.columns; c += step)
        block.width - c >= step ? linear_columns<2>(block, c, sums + c) : linear_columns<1>(block, c, sums + c);
    for (int c = 0; c < block.columns; c += Vector::lanes)
        for (int v = 0; v < block.rows; v += Vector::lanes) {
            Vector entries[Vector::lanes];
            const int rows = block.rows - v < Vector::lanes ? block.rows - v : Vector::lanes;
            for (int i = 0; i < Vector::lanes; ++i)
                entries[i] = i < rows ? Vector::load(sums + (v + i) * block.width + c) : Vector::all(0);
            transpose(entries);
            for (int i = 0; i < Vector::lanes && c + i < block.columns; ++i) {
                float* out = block.out + (c + i) * block.out_stride + v;
                if (rows == Vector::lanes) {
                    entries[i].store(out);
                } else {
                    float last[Vector::lanes];
                    entries[i].store(last);
                    for (int j = 0; j < rows; ++j) out[j] = last[j];
                }
            }
        }
}

}  // namespace

#define DIFFPO_STRING_(x) #x
#define DIFFPO_STRING(x) DIFFPO_STRING_(x)
#define DIFFPO_JOIN_(a, b) a##b
#define DIFFPO_JOIN(a, b) DIFFPO_JOIN_(a, b)

const ChunkKernels& DIFFPO_JOIN(chunk_kernels_, DIFFPO_INSTRUCTION_SET)() {
    static constexpr ChunkKernels kernels = {
        DIFFPO_STRING(DIFFPO_INSTRUCTION_SET), widen_bfloat16, widen_float16, narrow_bfloat16, narrow_float16, largest,
        top_two, exp_sums, exp_sum, first_equal, gradient, linear};
    return kernels;
}

}  // namespace diffpo
