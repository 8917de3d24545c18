// Rows whose codes are steps of a range: kivi and token2 (kvl-format.h).

#pragma once

#include "kvl-format.h"

namespace kvl {

// One row that shares nothing with others.
void affine_encode(kvl_row row, const float * x, int d, void * out);
void affine_decode(kvl_row row, const void * in, int d, float * out);

} // namespace kvl
