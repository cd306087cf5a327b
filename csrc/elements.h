// Elements of the two dtypes that cross the interface, at any alignment.
#pragma once

#include <cstdint>
#include <cstring>

#include "matgptq.h"

namespace matgptq {

// static: a copy compiled for one instruction set must not be linked into another.
static inline int64_t element_bytes(int dtype) { return dtype == MATGPTQ_FLOAT32 ? 4 : 2; }

static inline float from_bfloat16(uint16_t half) {
    const uint32_t word = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// To nearest, ties to even; a NaN stays one whatever its payload.
static inline uint16_t to_bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint32_t rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((word & 0x7FFFFFFF) > 0x7F800000 ? (word >> 16) | 0x40 : rounded);
}

static inline float read_float(const void* x, int dtype, int64_t index) {
    if (dtype == MATGPTQ_FLOAT32) {
        float value;
        std::memcpy(&value, static_cast<const char*>(x) + index * 4, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, static_cast<const char*>(x) + index * 2, 2);
    return from_bfloat16(half);
}

static inline void read_floats(const void* x, int dtype, int64_t count, float* to) {
    if (dtype == MATGPTQ_FLOAT32)
        std::memcpy(to, x, static_cast<size_t>(count) * 4);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = read_float(x, MATGPTQ_BFLOAT16, i);
}

static inline void write_float(void* y, int dtype, int64_t index, float value) {
    if (dtype == MATGPTQ_FLOAT32) {
        std::memcpy(static_cast<char*>(y) + index * 4, &value, 4);
        return;
    }
    const uint16_t half = to_bfloat16(value);
    std::memcpy(static_cast<char*>(y) + index * 2, &half, 2);
}

}  // namespace matgptq
