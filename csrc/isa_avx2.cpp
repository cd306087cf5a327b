// AVX2, FMA and F16C (Haswell, Zen and later).
#include "layout.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "avx2.h"
#include "kernel_table.h"

const matgptq::Kernels* matgptq::avx2_kernels() {
    static const Kernels table = make_kernels<Avx2>("avx2");
    return &table;
}

#else

const matgptq::Kernels* matgptq::avx2_kernels() { return nullptr; }

#endif
