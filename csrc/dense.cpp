// Drives the kernels for dense weights: x once in the order that they multiply in, rows of the weight over threads.
#include <new>

#include "buffer.h"
#include "elements.h"
#include "layout.h"
#include "matgptq.h"
#include "threads.h"

using namespace matgptq;

namespace {

// Rows that all of a batch multiplies before the next ones are read; they stay in the second-level cache meanwhile.
constexpr int64_t kBlockBytes = 128 << 10;
constexpr int64_t kBlockRows = 64;
// Pieces below this cost more to hand over than to compute.
constexpr int64_t kBytesPerPiece = 128 << 10;

}  // namespace

extern "C" int matgptq_dense(const void* x, int x_dtype, int64_t x_stride, int64_t batch, int64_t in_features,
                             const void* weight, int weight_dtype, int64_t weight_stride, int64_t out_features,
                             const float* bias, void* y, int y_dtype, int64_t y_stride, int num_threads) {
    for (const int dtype : {x_dtype, y_dtype})
        if (dtype != MATGPTQ_FLOAT32 && dtype != MATGPTQ_BFLOAT16) return MATGPTQ_E_ARGUMENT;
    if (weight_dtype < MATGPTQ_FLOAT32 || weight_dtype > MATGPTQ_FLOAT16) return MATGPTQ_E_ARGUMENT;
    if (batch < 0 || in_features < 0 || out_features < 0) return MATGPTQ_E_ARGUMENT;
    if (batch == 0 || out_features == 0) return MATGPTQ_OK;
    if (!y || (in_features && (!x || !weight))) return MATGPTQ_E_ARGUMENT;
    try {
        const bool in_pairs = weight_dtype == MATGPTQ_BFLOAT16;
        const int64_t columns = ceil_div(in_features, kDenseColumns) * kDenseColumns;
        const Buffer<float> values = allocate<float>(batch * columns);
        for (int64_t b = 0; b < batch; ++b) {
            const char* from = static_cast<const char*>(x) + b * x_stride * element_bytes(x_dtype);
            float* to = values.get() + b * columns;
            for (int64_t c = 0; c < columns; ++c) {
                // Even columns of a chunk in front of its odd ones: see load_halves.
                const int64_t within = c % kDenseColumns;
                const int64_t place = in_pairs ? within / 2 + (within % 2) * (kDenseColumns / 2) : within;
                to[c - within + place] = c < in_features ? read_float(from, x_dtype, c) : 0.0f;
            }
        }
        const DenseWeight rows{static_cast<const uint8_t*>(weight), weight_stride * element_bytes(weight_dtype),
                               in_features};
        const int64_t row_bytes = rows.row_bytes > 0 ? rows.row_bytes : 1;
        int64_t block = kBlockBytes / row_bytes / 4 * 4;
        block = block < 4 ? 4 : block > kBlockRows ? kBlockRows : block;
        const int64_t grain = 1 + kBytesPerPiece / (row_bytes * batch);
        parallel_for(out_features, grain, num_threads, [&](int64_t begin, int64_t end) {
            float result[4 * kBlockRows];
            for (int64_t first = begin; first < end; first += block) {
                const int64_t last = first + block < end ? first + block : end;
                int64_t step;
                for (int64_t b = 0; b < batch; b += step) {
                    const int kernel = batch - b >= 4 ? 2 : batch - b >= 2 ? 1 : 0;
                    step = int64_t{1} << kernel;
                    kernels().dense[weight_dtype][kernel](rows, first, last, values.get() + b * columns, columns,
                                                          result, kBlockRows);
                    for (int64_t i = 0; i < step; ++i)
                        for (int64_t row = first; row < last; ++row) {
                            const float value = result[i * kBlockRows + row - first];
                            write_float(y, y_dtype, (b + i) * y_stride + row, bias ? value + bias[row] : value);
                        }
                }
            }
        });
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}
