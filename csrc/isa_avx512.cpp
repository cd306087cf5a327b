// Intel's and AMD's processors with AVX-512: see avx512.h.
#include "layout.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && defined(__GFNI__)

#include "avx512.h"
#include "kernel_table.h"

const matgptq::Kernels* matgptq::avx512_kernels() {
    static const Kernels table = make_kernels<Avx512>("avx512");
    return &table;
}

#else

const matgptq::Kernels* matgptq::avx512_kernels() { return nullptr; }

#endif
