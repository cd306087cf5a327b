// The same with VNNI and GFNI, in vectors of 256 bits: what Intel's processors for laptops have since Alder Lake.
#include "layout.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__GFNI__) && \
    (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__)))

#include "avx2.h"
#include "kernel_table.h"

const matgptq::Kernels* matgptq::avx_vnni_kernels() {
    static const Kernels table = make_kernels<Avx2>("avx_vnni");
    return &table;
}

#else

const matgptq::Kernels* matgptq::avx_vnni_kernels() { return nullptr; }

#endif
