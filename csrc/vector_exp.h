// exp over a Vector. Included only by files that are compiled once per instruction set, like vector.h.
#pragma once

#include "vector.h"

namespace diffpo {
namespace {

// exp(z) for -200 <= z <= 88 to about 2 ulp: z log2(e) = n + f with n whole and |f| <= 1/2, then 2^n (1 + f P(f)). P is the polynomial
// of degree 4 that makes the largest relative error of 2^f least, 9.2e-8. Exactly 1 at 0; exactly 0 below about -87.7; a NaN
// stays NaN.
inline Vector exp_of_clamped(Vector z) {
    const Vector to_base_2 = Vector::all(1.44269504f), magic = Vector::all(12582912.0f);  // adding 1.5 2^23 rounds to whole numbers
    const Vector n = fma(z, to_base_2, magic) - magic;
    const Vector f = fms(z, to_base_2, n);
    Vector p = Vector::all(1.326471334e-3f);
    p = fma(p, f, Vector::all(9.671523236e-3f));
    p = fma(p, f, Vector::all(5.550733954e-2f));
    p = fma(p, f, Vector::all(2.402224243e-1f));
    p = fma(p, f, Vector::all(6.931470037e-1f));
    p = fma(p, f, Vector::all(1.0f));
    return times_power_of_two(p, n);
}

// The clamp turns -inf into a finite z whose exp is still exactly 0, so that z exp(z) is 0 and not NaN. A NaN is kept.
inline Vector clamp_low(Vector z) { return max(Vector::all(-200.0f), z); }

}  // namespace
}  // namespace diffpo
