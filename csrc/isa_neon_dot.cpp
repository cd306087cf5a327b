// NEON with dot products of bytes (ARMv8.2 and later: Graviton 2, Apple M1, Grace).
#include "layout.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include "kernel_table.h"
#include "neon.h"

const matgptq::Kernels* matgptq::neon_dot_kernels() {
    static const Kernels table = make_kernels<Neon>("neon_dot");
    return &table;
}

#else

const matgptq::Kernels* matgptq::neon_dot_kernels() { return nullptr; }

#endif
