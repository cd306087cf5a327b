// What a transformer block does to a few vectors between its products. Every intermediate result that the formulas write
// as [..] is rounded to `dtype`, as transformers rounds it; sums are float32, in a fixed order, so that results are the
// same on every instruction set. NaN and infinity propagate. All in the calling thread.
#pragma once

#include <cstdint>

namespace matgptq {

// If update is not null first x = [x + update], in place; then out = [weight * [x / sqrt(mean(x^2) + eps)]], for `rows`
// rows of `size`. `out` may be `x` only without update. With `from_one` it is out = [(1 + weight) * x / sqrt(..)].
void rms_norm(void* x, const void* update, const void* weight, float eps, void* out, int64_t rows, int64_t size,
              bool from_one, int dtype);
// Rotary embedding of `heads` vectors of `size` (even), in place: x = [[x * cos] + [(-second half, first half) * sin]],
// with cos and sin of `size` elements.
void rotate(void* x, const void* cosine, const void* sine, int64_t heads, int64_t size, int dtype);
// out = [[activation(gate)] * up], `size` elements, with a matgptq_activation.
void gated_product(const void* gate, const void* up, void* out, int64_t size, int activation, int dtype);
// x = [x + update], `size` elements, in place.
void add(void* x, const void* update, int64_t size, int dtype);

}  // namespace matgptq
