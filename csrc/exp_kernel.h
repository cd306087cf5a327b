// The exponential function, and the activation that is made of it. Nothing is fused: results are the same on every
// instruction set.
#pragma once

#include <initializer_list>

#include "layout.h"

namespace matgptq {
namespace {

// exp(x) for x <= 0 to within 2 units in the last place, 0 below -87; NaN stays one. 2^n e^r with |r| <= ln(2) / 2.
template <class S>
MATGPTQ_INLINE typename S::Floats exp_not_positive(typename S::Floats x) {
    using Floats = typename S::Floats;
    const auto constant = [](float value) { return S::broadcast(value); };
    const Floats clamped = S::max(constant(-87.0f), x);  // of a number and NaN, the second
    const Floats shifted = S::add(S::multiply(clamped, constant(1.44269504f)), constant(12582912.0f));
    const Floats n = S::subtract(shifted, constant(12582912.0f));
    const Floats r = S::add(S::subtract(clamped, S::multiply(n, constant(0.693359375f))),
                            S::multiply(n, constant(2.12194440e-4f)));
    Floats p = constant(1.9875691500e-4f);
    for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = S::add(S::multiply(p, r), constant(term));
    p = S::add(S::add(S::multiply(S::multiply(p, r), r), r), constant(1.0f));
    return S::select(S::less(x, constant(-87.0f)), constant(0.0f), S::multiply(p, S::power_of_two(shifted)));
}

// x / (1 + exp(-x)) in place; `size` is a multiple of 16.
template <class S>
void silu(float* x, int64_t size) {
    using Floats = typename S::Floats;
    const Floats zero = S::broadcast(0.0f), one = S::broadcast(1.0f);
    for (int64_t i = 0; i < size; i += S::kLanes) {
        // With e = exp(-|x|) it is x / (1 + e) for x >= 0 and x e / (1 + e) below, and nothing overflows.
        const Floats value = S::load_floats(x + i);
        const Floats e = exp_not_positive<S>(S::min(S::subtract(zero, value), value));
        const Floats share = S::divide(S::select(S::less(value, zero), e, one), S::add(one, e));
        S::store(x + i, S::multiply(value, share));
    }
}

}  // namespace
}  // namespace matgptq
