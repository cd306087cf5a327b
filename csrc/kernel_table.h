// All kernels of one instruction set, from the class that describes it.
#pragma once

#include "attention_kernel.h"
#include "dense_kernel.h"
#include "product_kernels.h"
#include "refit_kernel.h"
#include "sweep_kernel.h"

namespace matgptq {

// Isa lives in its file's anonymous namespace, so that code for one processor is never taken for another.
template <class Isa>
Kernels make_kernels(const char* name) {
    Kernels table{};
    table.name = name;
    fill_products<Isa>(table);
    fill_dense<Isa>(table);
    fill_attention<Isa>(table);
    table.activation[MATGPTQ_SILU] = silu<Isa>;
    table.activation[MATGPTQ_GELU_TANH] = gelu_tanh<Isa>;
    fill_sweep<Isa>(table);
    fill_refit<Isa>(table);
    return table;
}

}  // namespace matgptq
