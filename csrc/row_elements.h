// Rows of float32 or bfloat16 as they lie in memory, two vectors at a time.
#pragma once

#include "layout.h"

namespace matgptq {
namespace {

// 2 kLanes neighbours of bfloat16 as even and odd ones: the two halves of a word become floats by a shift and a mask.
// Of float32 kLanes neighbours, and those `distance` elements behind them.
template <class S, bool Half>
MATGPTQ_INLINE void load_halves(const uint8_t* from, int distance, typename S::Floats* halves) {
    if constexpr (Half) {
        S::load_pairs(from, halves[0], halves[1]);
    } else {
        const float* values = reinterpret_cast<const float*>(from);
        halves[0] = S::load_floats(values);
        halves[1] = S::load_floats(values + distance);
    }
}

}  // namespace
}  // namespace matgptq
