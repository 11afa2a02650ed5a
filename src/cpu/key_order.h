// Orders the keys of a scattered mask so that similar columns share tiles.
#pragma once

#include "rules/program.h"

namespace anymask::cpu {

// Fills order [batches][heads / order_divisor][kv_len] with the keys of each place in the order
// that rules/key_rows.h describes, and seen_keys [batches][heads / order_divisor] with how many of
// them some row sees.
void order_keys(const rules::Program& program, int tile_columns, int32_t* order,
                int32_t* seen_keys);

}  // namespace anymask::cpu
