#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "layout.h"
#include "matgptq.h"

namespace matgptq {

// Blocks of memory aligned to huge pages, handed out in 64-byte aligned pieces and freed together.
class Blocks {
  public:
    explicit Blocks(int64_t block_bytes) : block_bytes_(block_bytes) {}
    ~Blocks();
    Blocks(const Blocks&) = delete;
    Blocks& operator=(const Blocks&) = delete;
    uint8_t* take(int64_t bytes);  // zeroed; nullptr when out of memory
    int64_t taken() const {
        std::lock_guard<std::mutex> lock(mutex_);
        return taken_;
    }

  private:
    mutable std::mutex mutex_;
    std::vector<void*> blocks_;
    int64_t block_bytes_;
    uint8_t* free_ = nullptr;
    int64_t left_ = 0;
    int64_t taken_ = 0;
};

}  // namespace matgptq

struct matgptq_arena {
    std::shared_ptr<matgptq::Blocks> blocks;
};

struct matgptq_weight {
    std::shared_ptr<matgptq::Blocks> memory;
    int64_t out_features, in_features, group_size;
    int64_t tiles, chunks, groups, plane_stride, plane_bytes;
    int slice_bits;  // 0: resident parent
    int num_planes;
    const uint8_t* planes;
    int64_t bytes;
    matgptq::ScaleSet scales[matgptq::kWidths];  // data is null for a width that is not served

    bool serves(int bits) const {
        return bits >= matgptq::kMinBits && bits <= matgptq::kParentBits && scales[bits - matgptq::kMinBits].data;
    }
    int planes_read(int bits) const { return slice_bits || bits == matgptq::kParentBits ? bits : bits + 1; }
    matgptq::WeightView view(int bits) const;
};
