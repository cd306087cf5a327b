// The exponential function, and the activations that are made of it. Nothing is fused: results are the same on every
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

// 1 / (1 + exp(-x)).
template <class S>
MATGPTQ_INLINE typename S::Floats logistic(typename S::Floats x) {
    using Floats = typename S::Floats;
    const Floats zero = S::broadcast(0.0f), one = S::broadcast(1.0f);
    // With e = exp(-|x|) it is 1 / (1 + e) for x >= 0 and e / (1 + e) below, and nothing overflows.
    const Floats e = exp_not_positive<S>(S::min(S::subtract(zero, x), x));
    return S::divide(S::select(S::less(x, zero), e, one), S::add(one, e));
}

// x / (1 + exp(-x)) in place; `size` is a multiple of 16.
template <class S>
void silu(float* x, int64_t size) {
    for (int64_t i = 0; i < size; i += S::kLanes) {
        const typename S::Floats value = S::load_floats(x + i);
        S::store(x + i, S::multiply(value, logistic<S>(value)));
    }
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in place, which is x times the logistic function of twice what is
// under the tanh; `size` is a multiple of 16.
template <class S>
void gelu_tanh(float* x, int64_t size) {
    using Floats = typename S::Floats;
    const Floats slope = S::broadcast(1.5957691216057308f), cubic = S::broadcast(0.044715f * 1.5957691216057308f);
    for (int64_t i = 0; i < size; i += S::kLanes) {
        const Floats value = S::load_floats(x + i);
        const Floats inner = S::add(slope, S::multiply(cubic, S::multiply(value, value)));
        S::store(x + i, S::multiply(value, logistic<S>(S::multiply(value, inner))));
    }
}

}  // namespace
}  // namespace matgptq
