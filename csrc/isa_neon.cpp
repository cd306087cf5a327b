// NEON as every AArch64 has it.
#include "layout.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "kernel_table.h"
#include "neon.h"

const matgptq::Kernels* matgptq::neon_kernels() {
    static const Kernels table = make_kernels<Neon>("neon");
    return &table;
}

#else

const matgptq::Kernels* matgptq::neon_kernels() { return nullptr; }

#endif
