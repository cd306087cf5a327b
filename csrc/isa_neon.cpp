// NEON as every AArch64 has it.
#include "layout.h"

#if defined(__aarch64__) && defined(__ARM_NEON)

#include "kernel_table.h"
#include "neon.h"

namespace matgptq {
const Kernels* neon_kernels() {
    static const Kernels table = make_kernels<Neon>("neon");
    return &table;
}
}  // namespace matgptq

#else

namespace matgptq {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace matgptq

#endif
