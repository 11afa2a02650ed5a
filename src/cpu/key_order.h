// Orders the keys of a scattered mask so that similar columns share tiles.
#pragma once

#include "rules/program.h"

namespace anymask::cpu {

// Fills order [batches][heads / order_divisor][kv_len] with the keys of each place in the order
// that rules/key_rows.h describes.
void order_keys(const rules::Program& program, int tile_columns, int32_t* order);

}  // namespace anymask::cpu
