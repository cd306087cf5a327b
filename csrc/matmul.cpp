// Drives the kernels: prepares activations once per call, hands tiles to threads, writes results.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "buffer.h"
#include "elements.h"
#include "matgptq.h"
#include "matrix_matmul.h"
#include "threads.h"
#include "weight.h"

using namespace matgptq;

namespace {

// Tiles per kernel call: their planes stay in the second-level cache while further panels of a batch read them.
constexpr int kTilesPerCall = 4;
// Panels whose activations are multiplied before those of the next ones are read; they should stay in a cache.
constexpr size_t kPanelsTogether = 16;
// Pieces below this cost more to hand over than to compute.
constexpr int64_t kBytesPerPiece = 128 << 10;

struct PanelRange {
    int64_t begin;
    int live;  // rows of the batch in it
    int rows;  // 1, 2, 4 or 8
    int kernel;
};

std::vector<PanelRange> cut_batch(int64_t batch, bool exact) {
    std::vector<PanelRange> ranges;
    const int64_t most = exact ? kMaxExactPanel : kMaxPanel;
    for (int64_t begin = 0; begin < batch; begin += most) {
        const int live = static_cast<int>(batch - begin < most ? batch - begin : most);
        int kernel = 0;
        while ((1 << kernel) < live) ++kernel;
        ranges.push_back({begin, live, 1 << kernel, kernel});
    }
    return ranges;
}

// Activations of a call in the form kernels read, for one size of activation block.
class Activations {
  public:
    Activations(const void* x, int dtype, int64_t stride, int64_t in_features, int64_t columns,
                const std::vector<PanelRange>& ranges, bool exact, int64_t block, int num_threads)
        : block_(block) {
        const int64_t blocks = ceil_div(columns, block), digits = exact ? kDigits : 1;
        int64_t rows = 0;
        for (const PanelRange& range : ranges) rows += range.rows;
        codes_ = allocate<int8_t>(rows * digits * columns);
        scales_ = allocate<float>(rows * blocks);
        sums_ = allocate<int32_t>(rows * digits * blocks);
        std::vector<int64_t> first_row;
        int64_t first = 0;
        for (const PanelRange& range : ranges) {
            first_row.push_back(first);
            panels_.push_back({codes_.get() + first * digits * columns, scales_.get() + first * blocks,
                               sums_.get() + first * digits * blocks});
            first += range.rows;
        }
        parallel_for(static_cast<int64_t>(ranges.size()), 2, num_threads, [&](int64_t begin, int64_t end) {
            const Buffer<float> panel = allocate<float>(kMaxPanel * columns);
            for (int64_t p = begin; p < end; ++p) {
                const PanelRange& range = ranges[static_cast<size_t>(p)];
                for (int b = 0; b < range.rows; ++b) {
                    const int64_t live = b < range.live ? in_features : 0;
                    float* const row = panel.get() + b * columns;
                    read_floats(static_cast<const char*>(x) + (range.begin + b) * stride * element_bytes(dtype), dtype,
                                live, row);
                    std::memset(row + live, 0, static_cast<size_t>(columns - live) * sizeof(float));
                }
                const int64_t row = first_row[static_cast<size_t>(p)];
                kernels().quantize[exact](panel.get(), range.rows, columns, block, codes_.get() + row * digits * columns,
                                          scales_.get() + row * blocks, sums_.get() + row * digits * blocks);
            }
        });
    }

    int64_t block() const { return block_; }
    const Panel& panel(size_t i) const { return panels_[i]; }

  private:
    int64_t block_;
    Buffer<int8_t> codes_;
    Buffer<float> scales_;
    Buffer<int32_t> sums_;
    std::vector<Panel> panels_;
};

struct Step {
    const matgptq_product* product;
    WeightView view;
    const Activations* activations;
    int64_t first_tile;  // in the flat numbering over all products
};

void run_tiles(const Step& step, const std::vector<PanelRange>& ranges, size_t first_panel, size_t last_panel,
               bool exact, int y_dtype, int64_t begin, int64_t end) {
    const matgptq_product& product = *step.product;
    const int64_t out_features = product.weight->out_features;
    const auto& table = kernels().product[product.bits - kMinBits][product.weight->slice_bits ? 0 : 1][exact];
    alignas(64) float result[kTilesPerCall * kMaxPanel * kTileRows];
    for (int64_t tile = begin; tile < end; tile += kTilesPerCall) {
        const int64_t last = tile + kTilesPerCall < end ? tile + kTilesPerCall : end;
        for (size_t p = first_panel; p < last_panel; ++p) {
            const PanelRange& range = ranges[p];
            table[range.kernel](step.view, step.activations->panel(p), tile, last, result);
            for (int64_t t = tile; t < last; ++t) {
                const int64_t first = t * kTileRows;
                const int live = static_cast<int>(out_features - first < kTileRows ? out_features - first : kTileRows);
                for (int b = 0; b < range.live; ++b) {
                    const float* from = result + ((t - tile) * range.rows + b) * kTileRows;
                    const int64_t at = (range.begin + b) * product.y_stride + first;
                    for (int i = 0; i < live; ++i)
                        write_float(product.y, y_dtype, at + i, product.bias ? from[i] + product.bias[first + i] : from[i]);
                }
            }
        }
    }
}

}  // namespace

extern "C" int matgptq_matmul(const void* x, int x_dtype, int64_t x_stride, int64_t batch, int64_t in_features,
                              const matgptq_product* products, int num_products, int y_dtype, int activations,
                              int num_threads) {
    if (batch < 0 || num_products < 0 || (num_products && !products)) return MATGPTQ_E_ARGUMENT;
    if ((x_dtype != MATGPTQ_FLOAT32 && x_dtype != MATGPTQ_BFLOAT16) ||
        (y_dtype != MATGPTQ_FLOAT32 && y_dtype != MATGPTQ_BFLOAT16) ||
        (activations != MATGPTQ_EXACT && activations != MATGPTQ_INT8))
        return MATGPTQ_E_ARGUMENT;
    for (int i = 0; i < num_products; ++i) {
        if (!products[i].weight) return MATGPTQ_E_ARGUMENT;
        if (products[i].weight->in_features != in_features) return MATGPTQ_E_SHAPE;
        if (!products[i].weight->serves(products[i].bits)) return MATGPTQ_E_BITS;
        if (batch && !products[i].y) return MATGPTQ_E_ARGUMENT;
    }
    if (batch == 0 || num_products == 0) return MATGPTQ_OK;
    if (!x) return MATGPTQ_E_ARGUMENT;
    try {
        const bool exact = activations == MATGPTQ_EXACT;
        if (takes_matrix_units(batch, exact)) {
            matrix_matmul(x, x_dtype, x_stride, batch, in_features, products, num_products, y_dtype, exact, num_threads);
            return MATGPTQ_OK;
        }
        const std::vector<PanelRange> ranges = cut_batch(batch, exact);
        const int64_t columns = products[0].weight->chunks * kChunkColumns;
        std::vector<std::unique_ptr<Activations>> prepared;
        std::vector<Step> steps;
        int64_t tiles = 0, bytes = 0;
        for (int i = 0; i < num_products; ++i) {
            const matgptq_weight& weight = *products[i].weight;
            const WeightView view = weight.view(products[i].bits);
            const int64_t block = view.block_chunks * kChunkColumns;
            const Activations* found = nullptr;
            for (const auto& candidate : prepared)
                if (candidate->block() == block) found = candidate.get();
            if (!found) {
                prepared.emplace_back(
                    new Activations(x, x_dtype, x_stride, in_features, columns, ranges, exact, block, num_threads));
                found = prepared.back().get();
            }
            steps.push_back({&products[i], view, found, tiles});
            tiles += weight.tiles;
            bytes += matgptq_weight_bytes_read(&weight, products[i].bits);
        }
        for (size_t first = 0; first < ranges.size(); first += kPanelsTogether) {
            const size_t last = ranges.size() - first > kPanelsTogether ? first + kPanelsTogether : ranges.size();
            const int64_t work = bytes * static_cast<int64_t>(last - first);
            const int64_t grain = 1 + kBytesPerPiece * tiles / (work + 1);
            parallel_for(tiles, grain, num_threads, [&](int64_t begin, int64_t end) {
                for (const Step& step : steps) {
                    const int64_t from = begin > step.first_tile ? begin - step.first_tile : 0;
                    const int64_t limit = step.product->weight->tiles;
                    const int64_t to = end - step.first_tile < limit ? end - step.first_tile : limit;
                    if (from < to) run_tiles(step, ranges, first, last, exact, y_dtype, from, to);
                }
            });
        }
        return MATGPTQ_OK;
    } catch (const std::bad_alloc&) {
        return MATGPTQ_E_MEMORY;
    }
}

extern "C" int matgptq_dequantize(const matgptq_weight* weight, int bits, int64_t row_begin, int64_t row_end, void* out,
                                  int dtype, int64_t out_stride, int num_threads) {
    if (!weight || (dtype != MATGPTQ_FLOAT32 && dtype != MATGPTQ_BFLOAT16)) return MATGPTQ_E_ARGUMENT;
    if (!weight->serves(bits)) return MATGPTQ_E_BITS;
    if (row_begin < 0 || row_begin > row_end || row_end > weight->out_features) return MATGPTQ_E_SHAPE;
    if (row_begin == row_end) return MATGPTQ_OK;
    if (!out) return MATGPTQ_E_ARGUMENT;
    const WeightView view = weight->view(bits);
    const Kernels& table = kernels();
    const DequantizeKernel dequantize = table.dequantize[bits - kMinBits][weight->slice_bits ? 0 : 1];
    const float unit = static_cast<float>(1 << (kParentBits - bits));
    const int64_t size = dtype == MATGPTQ_FLOAT32 ? 4 : 2;
    const int64_t first_tile = row_begin / kTileRows;
    parallel_for(ceil_div(row_end, kTileRows) - first_tile, 2, num_threads, [&](int64_t begin, int64_t end) {
        float scales[kTileRows];
        for (int64_t tile = first_tile + begin; tile < first_tile + end; ++tile) {
            const int64_t from = row_begin > tile * kTileRows ? row_begin - tile * kTileRows : 0;
            const int64_t to = row_end - tile * kTileRows < kTileRows ? row_end - tile * kTileRows : kTileRows;
            char* const rows = static_cast<char*>(out) + (tile * kTileRows + from - row_begin) * out_stride * size;
            for (int64_t chunk = 0; chunk < view.chunks; ++chunk) {
                if (chunk % view.group_chunks == 0) {
                    const int64_t index = (tile * view.groups + chunk / view.group_chunks) * kTileRows;
                    for (int i = 0; i < kTileRows; ++i)
                        scales[i] = unit * (view.scales.half
                                                ? half_to_float(static_cast<const uint16_t*>(view.scales.data)[index + i])
                                                : static_cast<const float*>(view.scales.data)[index + i]);
                }
                const int64_t column = chunk * kChunkColumns;
                const int64_t left = weight->in_features - column;
                const ChunkTarget target{rows + column * size, out_stride * size, static_cast<int>(from),
                                         static_cast<int>(to), static_cast<int>(left < kChunkColumns ? left : kChunkColumns),
                                         dtype == MATGPTQ_BFLOAT16};
                dequantize(view, tile, chunk, scales, target);
            }
        }
    });
    return MATGPTQ_OK;
}

extern "C" uint64_t matgptq_read(const void* memory, int64_t bytes, int num_threads) {
    if (!memory || bytes <= 0) return 0;
    const uint8_t* from = static_cast<const uint8_t*>(memory);
    std::atomic<uint64_t> sum{0};
    parallel_for(bytes / 256, 1024, num_threads, [&](int64_t begin, int64_t end) {
        sum += kernels().read(from + begin * 256, (end - begin) * 256);
    });
    for (int64_t i = bytes / 256 * 256; i + 8 <= bytes; i += 8) {
        uint64_t word;
        std::memcpy(&word, from + i, 8);
        sum += word;
    }
    return sum;
}
