// Caches of keys and values, as the library is given them.
#pragma once

#include "matgptq.h"

namespace matgptq {

// Whether a layer of each sequence can be read.
inline bool are_readable(const matgptq_kv_cache* const* caches, int64_t layer, const int64_t* lengths, int64_t sequences) {
    if (!caches || !lengths || layer < 0) return false;
    for (int64_t i = 0; i < sequences; ++i)
        if (!caches[i] || !caches[i][layer].keys || !caches[i][layer].values || lengths[i] < 1) return false;
    return true;
}

}  // namespace matgptq
