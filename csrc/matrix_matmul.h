// Products of many rows, where the processor has matrix units for bytes.
#pragma once

#include "matgptq.h"

namespace matgptq {

bool takes_matrix_units(int64_t batch, bool exact);

// As matgptq_matmul, whose arguments have been looked at; throws std::bad_alloc.
void matrix_matmul(const void* x, int x_dtype, int64_t x_stride, int64_t batch, int64_t in_features,
                   const matgptq_product* products, int num_products, int y_dtype, bool exact, int num_threads);

}  // namespace matgptq
