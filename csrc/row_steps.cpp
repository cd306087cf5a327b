// Plain loops over short vectors, written so that compilers vectorize them without reordering a sum.
#include "row_steps.h"

#include <cmath>
#include <cstring>

#include "elements.h"
#include "layout.h"

namespace matgptq {
namespace {

struct Float32 {
    using Stored = float;
    static float load(float value) { return value; }
    static float store(float value) { return value; }
};

struct BFloat16 {
    using Stored = uint16_t;
    static float load(uint16_t value) { return from_bfloat16(value); }
    static uint16_t store(float value) { return to_bfloat16(value); }
};

template <typename T>
float rounded(float value) {
    return T::load(T::store(value));
}

// Partial sums, so that the order of a sum is fixed and several are in flight.
constexpr int kLanes = 16;

template <typename T>
float sum_of_squares(const typename T::Stored* x, int64_t size) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
            const float value = T::load(x[i + lane]);
            lanes[lane] += value * value;
        }
    for (; i < size; ++i) {
        const float value = T::load(x[i]);
        lanes[i % kLanes] += value * value;
    }
    for (int step = kLanes / 2; step; step /= 2)
        for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
    return lanes[0];
}

template <typename T>
void add(typename T::Stored* x, const typename T::Stored* update, int64_t size) {
    for (int64_t i = 0; i < size; ++i) x[i] = T::store(T::load(x[i]) + T::load(update[i]));
}

template <typename T>
void rms_norm(void* x_, const void* update_, const void* weight_, float eps, void* out_, int64_t rows, int64_t size,
              bool from_one) {
    using Stored = typename T::Stored;
    const Stored* weight = static_cast<const Stored*>(weight_);
    for (int64_t row = 0; row < rows; ++row) {
        Stored* x = static_cast<Stored*>(x_) + row * size;
        Stored* out = static_cast<Stored*>(out_) + row * size;
        if (update_) add<T>(x, static_cast<const Stored*>(update_) + row * size, size);
        const float factor = 1.0f / std::sqrt(sum_of_squares<T>(x, size) / static_cast<float>(size) + eps);
        if (from_one)
            for (int64_t i = 0; i < size; ++i) out[i] = T::store(T::load(x[i]) * factor * (1.0f + T::load(weight[i])));
        else
            for (int64_t i = 0; i < size; ++i)
                out[i] = T::store(T::load(weight[i]) * rounded<T>(T::load(x[i]) * factor));
    }
}

template <typename T>
void rotate(void* x_, const void* cosine_, const void* sine_, int64_t heads, int64_t size) {
    using Stored = typename T::Stored;
    const Stored *cosine = static_cast<const Stored*>(cosine_), *sine = static_cast<const Stored*>(sine_);
    const int64_t half = size / 2;
    for (int64_t head = 0; head < heads; ++head) {
        Stored* x = static_cast<Stored*>(x_) + head * size;
        for (int64_t i = 0; i < half; ++i) {
            const float first = T::load(x[i]), second = T::load(x[half + i]);
            const float kept = rounded<T>(first * T::load(cosine[i]));
            const float turned = rounded<T>(-second * T::load(sine[i]));
            const float kept_second = rounded<T>(second * T::load(cosine[half + i]));
            const float turned_second = rounded<T>(first * T::load(sine[half + i]));
            x[i] = T::store(kept + turned);
            x[half + i] = T::store(kept_second + turned_second);
        }
    }
}

// Values that are activated together.
constexpr int64_t kPiece = 256;

template <typename T>
void gated_product(const void* gate_, const void* up_, void* out_, int64_t size, int activation) {
    using Stored = typename T::Stored;
    const Stored *gate = static_cast<const Stored*>(gate_), *up = static_cast<const Stored*>(up_);
    Stored* out = static_cast<Stored*>(out_);
    alignas(64) float values[kPiece] = {};
    for (int64_t begin = 0; begin < size; begin += kPiece) {
        const int64_t count = size - begin < kPiece ? size - begin : kPiece;
        for (int64_t i = 0; i < count; ++i) values[i] = T::load(gate[begin + i]);
        kernels().activation[activation](values, ceil_div(count, 16) * 16);
        for (int64_t i = 0; i < count; ++i)
            out[begin + i] = T::store(rounded<T>(values[i]) * T::load(up[begin + i]));
    }
}

}  // namespace

void rms_norm(void* x, const void* update, const void* weight, float eps, void* out, int64_t rows, int64_t size,
              bool from_one, int dtype) {
    (dtype == MATGPTQ_FLOAT32 ? rms_norm<Float32> : rms_norm<BFloat16>)(x, update, weight, eps, out, rows, size, from_one);
}

void rotate(void* x, const void* cosine, const void* sine, int64_t heads, int64_t size, int dtype) {
    (dtype == MATGPTQ_FLOAT32 ? rotate<Float32> : rotate<BFloat16>)(x, cosine, sine, heads, size);
}

void gated_product(const void* gate, const void* up, void* out, int64_t size, int activation, int dtype) {
    (dtype == MATGPTQ_FLOAT32 ? gated_product<Float32> : gated_product<BFloat16>)(gate, up, out, size, activation);
}

void add(void* x, const void* update, int64_t size, int dtype) {
    if (dtype == MATGPTQ_FLOAT32) add<Float32>(static_cast<float*>(x), static_cast<const float*>(update), size);
    else add<BFloat16>(static_cast<uint16_t*>(x), static_cast<const uint16_t*>(update), size);
}

}  // namespace matgptq
