// Drives the matrix units: codes of a stretch of columns are unpacked once for many rows of activations.
#include "matrix_matmul.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "buffer.h"
#include "elements.h"
#include "threads.h"
#include "weight.h"

namespace matgptq {
namespace {

// From so many rows on, of int8 and of exact activations, these products are the faster ones: unpacking into memory costs
// what three rows of exact activations do otherwise.
constexpr int64_t kMatrixBatch[2] = {9, 5};
// Panels that are multiplied by a stretch of weights before the next one is unpacked: their totals stay in the second-level
// cache.
constexpr int64_t kPanelsTogether = 16;
// Tiles that read a panel's activations while these are in the first-level cache.
constexpr int64_t kTilesTogether = 4;
constexpr int64_t kStretchColumns = 256;

// Rows of a panel that are multiplied: those that there are, and padding.
int rows_of(int64_t panel, int64_t batch) {
    const int64_t live = std::min<int64_t>(batch - panel * kMatrixRows, kMatrixRows);
    return static_cast<int>(ceil_div(live, kMatrixRowStep) * kMatrixRowStep);
}

// Activations of a call in the form the units read, for one size of activation block.
class Activations {
  public:
    Activations(const void* x, int dtype, int64_t stride, int64_t batch, int64_t in_features, const WeightView& view,
                bool exact, int num_threads)
        : block_chunks_(view.block_chunks),
          blocks_(ceil_div(view.chunks, view.block_chunks)),
          panel_bytes_(kMatrixRows * columns() * (exact ? kDigits : 1)),
          codes_(allocate<int8_t>(ceil_div(batch, kMatrixRows) * panel_bytes_)),
          scales_(allocate<float>(ceil_div(batch, kMatrixRows) * kMatrixRows * blocks_)) {
        parallel_for(ceil_div(batch, kMatrixRows), 1, num_threads, [&](int64_t begin, int64_t end) {
            const Buffer<float> rows = allocate<float>(kMatrixRows * columns());
            for (int64_t p = begin; p < end; ++p) {
                const int count = rows_of(p, batch);
                for (int64_t b = 0; b < count; ++b) {
                    const int64_t at = p * kMatrixRows + b, live = at < batch ? in_features : 0;
                    float* const row = rows.get() + b * columns();
                    if (live)
                        read_floats(static_cast<const char*>(x) + at * stride * element_bytes(dtype), dtype, live, row);
                    std::memset(row + live, 0, static_cast<size_t>(columns() - live) * sizeof(float));
                }
                kernels().matrix->quantize[exact](rows.get(), count, columns(), step(), steps(),
                                                  codes_.get() + p * panel_bytes_,
                                                  scales_.get() + p * kMatrixRows * blocks_);
            }
        });
    }

    int64_t block_chunks() const { return block_chunks_; }
    int64_t blocks() const { return blocks_; }
    int64_t columns() const { return blocks_ * block_chunks_ * kChunkColumns; }
    int steps() const { return block_chunks_ > 2 ? 2 : 1; }
    int step() const { return static_cast<int>(block_chunks_ * kChunkColumns) / steps(); }
    const int8_t* codes(int64_t panel, int64_t block) const {
        return codes_.get() + panel * panel_bytes_ + panel_bytes_ / blocks_ * block;
    }
    const float* scales(int64_t panel, int64_t block) const {
        return scales_.get() + (panel * blocks_ + block) * kMatrixRows;
    }

  private:
    int64_t block_chunks_, blocks_, panel_bytes_;
    Buffer<int8_t> codes_;
    Buffer<float> scales_;
};

struct Step {
    const matgptq_product* product;
    WeightView view;
    const Activations* activations;
    int64_t first_tile;  // in the flat numbering over all products
};

// What a thread keeps of the tiles that it is at.
struct Workspace {
    Buffer<int8_t> weights = allocate<int8_t>(kTilesTogether * kTileRows * kStretchColumns);
    Buffer<float> weight_scales = allocate<float>(kTilesTogether * kTileRows * kStretchColumns / kChunkColumns);
    Buffer<float> totals = allocate<float>(kTilesTogether * kPanelsTogether * kMatrixRows * kTileRows);
};

struct Range {
    int64_t begin, end;
};

void run_tiles(const Step& step, Range panels, Range tiles, int64_t batch, bool exact, int y_dtype, Workspace& room) {
    const MatrixKernels& matrix = *kernels().matrix;
    const Activations& x = *step.activations;
    const matgptq_product& product = *step.product;
    const auto unpack = matrix.unpack[product.bits - kMinBits][product.weight->slice_bits ? 0 : 1];
    const int64_t block_columns = x.block_chunks() * kChunkColumns, stretch = kStretchColumns / block_columns;
    const auto totals = [&](int64_t panel, int64_t tile) {
        return room.totals.get() +
               ((panel - panels.begin) * kTilesTogether + tile - tiles.begin) * kMatrixRows * kTileRows;
    };
    int rows = 0;
    for (int64_t block = 0; block < x.blocks(); block += stretch) {
        const int64_t blocks = std::min(stretch, x.blocks() - block);
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
            unpack(step.view, tile, block, blocks,
                   room.weights.get() + (tile - tiles.begin) * blocks * block_columns * kTileRows,
                   room.weight_scales.get() + (tile - tiles.begin) * blocks * kTileRows);
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
            if (rows != rows_of(panel, batch)) matrix.begin(x.step(), rows = rows_of(panel, batch));
            const auto multiply = matrix.multiply[exact][rows / kMatrixRowStep - 1];
            for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
                multiply({x.codes(panel, block), x.scales(panel, block),
                          room.weights.get() + (tile - tiles.begin) * blocks * block_columns * kTileRows,
                          room.weight_scales.get() + (tile - tiles.begin) * blocks * kTileRows, blocks, x.step(),
                          x.steps(), totals(panel, tile), block == 0});
        }
    }
    matrix.finish();
    const int64_t bytes = element_bytes(y_dtype);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
            const int64_t row = panel * kMatrixRows, column = tile * kTileRows;
            matrix.store(totals(panel, tile),
                         {static_cast<char*>(product.y) + (row * product.y_stride + column) * bytes,
                          product.y_stride * bytes, static_cast<int>(std::min<int64_t>(kMatrixRows, batch - row)),
                          static_cast<int>(std::min<int64_t>(kTileRows, product.weight->out_features - column)),
                          product.bias ? product.bias + column : nullptr, y_dtype == MATGPTQ_BFLOAT16});
        }
}

}  // namespace

bool takes_matrix_units(int64_t batch, bool exact) { return kernels().matrix && batch >= kMatrixBatch[exact]; }

void matrix_matmul(const void* x, int x_dtype, int64_t x_stride, int64_t batch, int64_t in_features,
                   const matgptq_product* products, int num_products, int y_dtype, bool exact, int num_threads) {
    std::vector<std::unique_ptr<Activations>> prepared;
    std::vector<Step> steps;
    int64_t tiles = 0;
    for (int i = 0; i < num_products; ++i) {
        const matgptq_weight& weight = *products[i].weight;
        const WeightView view = weight.view(products[i].bits);
        const Activations* found = nullptr;
        for (const auto& candidate : prepared)
            if (candidate->block_chunks() == view.block_chunks) found = candidate.get();
        if (!found) {
            prepared.emplace_back(new Activations(x, x_dtype, x_stride, batch, in_features, view, exact, num_threads));
            found = prepared.back().get();
        }
        steps.push_back({&products[i], view, found, tiles});
        tiles += weight.tiles;
    }
    // Some pieces for each thread, since one may be slower than another, and not so small that activations are read often.
    const int64_t pieces = ceil_div(tiles, 4 * static_cast<int64_t>(std::max(num_threads, 1)));
    const int64_t grain = std::min(std::max<int64_t>(pieces, 4), kTilesTogether);
    const int64_t panels = ceil_div(batch, kMatrixRows);
    for (int64_t panel = 0; panel < panels; panel += kPanelsTogether) {
        const Range together{panel, std::min(panel + kPanelsTogether, panels)};
        parallel_for(tiles, grain, num_threads, [&](int64_t begin, int64_t end) {
            Workspace room;
            for (const Step& step : steps) {
                const int64_t limit = std::min(end - step.first_tile, step.product->weight->tiles);
                for (int64_t tile = std::max<int64_t>(begin - step.first_tile, 0); tile < limit; tile += kTilesTogether)
                    run_tiles(step, together, {tile, std::min(tile + kTilesTogether, limit)}, batch, exact, y_dtype, room);
            }
        });
    }
}

}  // namespace matgptq
