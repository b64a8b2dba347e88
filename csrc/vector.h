// One small vector type per instruction set. Included only by vector_exp.h and chunk_kernels.cpp, which is compiled once per set; everything is in an
// unnamed namespace and nothing of the standard library is used, so no AVX code can leak into functions that other files share.
//
// max(a, b) and min(a, b) return b if either is NaN, on every set: callers choose by argument order whether a NaN is kept or dropped.
#pragma once

#include <cstdint>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace diffpo {
namespace {

#if defined(__AVX512F__)

struct Vector {
    static constexpr int lanes = 16;
    __m512 v;
    static Vector all(float x) { return {_mm512_set1_ps(x)}; }
    static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    static Vector from_bfloat16(const uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static Vector from_float16(const uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
};
inline Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
inline Vector fms(Vector a, Vector b, Vector c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }  // a b - c
inline Vector max(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vector min(Vector a, Vector b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vector times_power_of_two(Vector a, Vector n) {  // 0 below the normal range, NaN kept
    // Lanes below it are masked off and not left to scalef, which takes some 90 ns for an operand that underflows: a banned token in
    // every row doubled the time of a row of 128.
    return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), a.v, n.v)};
}
inline uint32_t equal_bits(Vector a, Vector b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Vector interleave_low(Vector a, Vector b) {  // a0 b0 a1 b1 ..., of the first half of each
    return {_mm512_permutex2var_ps(a.v, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b.v)};
}
inline Vector interleave_high(Vector a, Vector b) {  // of the second half
    return {_mm512_permutex2var_ps(a.v, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b.v)};
}

#elif defined(__AVX2__)

struct Vector {
    static constexpr int lanes = 8;
    __m256 v;
    static Vector all(float x) { return {_mm256_set1_ps(x)}; }
    static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    static Vector from_bfloat16(const uint16_t* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }
    static Vector from_float16(const uint16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
};
inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
inline Vector fms(Vector a, Vector b, Vector c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }  // a b - c
inline Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vector min(Vector a, Vector b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vector times_power_of_two(Vector a, Vector n) {  // 0 below the normal range, NaN kept
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
    const __m256 product = _mm256_mul_ps(a.v, _mm256_castsi256_ps(power));
    return {_mm256_and_ps(product, _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ))};
}
inline uint32_t equal_bits(Vector a, Vector b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
inline Vector interleave_low(Vector a, Vector b) {  // a0 b0 a1 b1 ..., of the first half of each
    return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20)};
}
inline Vector interleave_high(Vector a, Vector b) {  // of the second half
    return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31)};
}

#else  // any processor: four lanes of the compiler's own vectors

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));

inline float float_of_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline float float_of_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude << 13));     // inf, NaN
    const float scaled = float_of_bits(magnitude << 13) * 5.192296858534828e+33f;               // 2^112: the exponents' bias
    return sign ? -scaled : scaled;
}

struct Vector {
    static constexpr int lanes = 4;
    float4 v;
    static Vector all(float x) { return {float4{x, x, x, x}}; }
    static Vector load(const float* p) {
        Vector out;
        __builtin_memcpy(&out.v, p, sizeof out.v);
        return out;
    }
    void store(float* p) const { __builtin_memcpy(p, &v, sizeof v); }
    static Vector from_bfloat16(const uint16_t* p) {
        return {float4{float_of_bits(uint32_t{p[0]} << 16), float_of_bits(uint32_t{p[1]} << 16),
                       float_of_bits(uint32_t{p[2]} << 16), float_of_bits(uint32_t{p[3]} << 16)}};
    }
    static Vector from_float16(const uint16_t* p) {
        return {float4{float_of_float16(p[0]), float_of_float16(p[1]), float_of_float16(p[2]), float_of_float16(p[3])}};
    }
};
inline Vector select(int4 mask, Vector a, Vector b) {
    return {reinterpret_cast<float4>((mask & reinterpret_cast<int4>(a.v)) | (~mask & reinterpret_cast<int4>(b.v)))};
}
inline Vector operator+(Vector a, Vector b) { return {a.v + b.v}; }
inline Vector operator-(Vector a, Vector b) { return {a.v - b.v}; }
inline Vector operator*(Vector a, Vector b) { return {a.v * b.v}; }
inline Vector fma(Vector a, Vector b, Vector c) { return {a.v * b.v + c.v}; }
inline Vector fms(Vector a, Vector b, Vector c) { return {a.v * b.v - c.v}; }
inline Vector max(Vector a, Vector b) { return select(a.v > b.v, a, b); }
inline Vector min(Vector a, Vector b) { return select(a.v < b.v, a, b); }
inline Vector times_power_of_two(Vector a, Vector n) {  // 0 below the normal range, NaN kept
    const int4 exponent = __builtin_convertvector(n.v, int4) + 127;
    const Vector product = {a.v * reinterpret_cast<float4>(exponent << 23)};
    return select(n.v < Vector::all(-126.0f).v, Vector::all(0.0f), product);
}
inline uint32_t equal_bits(Vector a, Vector b) {
    const int4 equal = a.v == b.v;
    return (equal[0] & 1) | (equal[1] & 2) | (equal[2] & 4) | (equal[3] & 8);
}
inline Vector interleave_low(Vector a, Vector b) {  // a0 b0 a1 b1: the first half of each
    return {float4{a.v[0], b.v[0], a.v[1], b.v[1]}};
}
inline Vector interleave_high(Vector a, Vector b) {  // the second half
    return {float4{a.v[2], b.v[2], a.v[3], b.v[3]}};
}

#endif

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

// Rows become columns. Each pass rotates the bits of an entry's position by one; after log2(lanes) of them, row and column have changed
// places.
inline void transpose(Vector (&rows)[Vector::lanes]) {
    for (int passes = Vector::lanes; passes > 1; passes /= 2) {
        Vector next[Vector::lanes];
        for (int i = 0; i < Vector::lanes / 2; ++i) {
            next[2 * i] = interleave_low(rows[i], rows[i + Vector::lanes / 2]);
            next[2 * i + 1] = interleave_high(rows[i], rows[i + Vector::lanes / 2]);
        }
        for (int i = 0; i < Vector::lanes; ++i) rows[i] = next[i];
    }
}

inline float sum_of_lanes(Vector a) {
    return fold(a, [](float x, float y) { return x + y; });
}

}  // namespace
}  // namespace diffpo
