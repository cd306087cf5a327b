// Memory that begins on a cache line and frees itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace matgptq {

struct AlignedDelete {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

// Uninitialised; throws std::bad_alloc.
template <class T>
Buffer<T> allocate(int64_t count) {
    return Buffer<T>(
        static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count ? count : 1), std::align_val_t(64))));
}

}  // namespace matgptq
