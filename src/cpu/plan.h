// Builds a plan on the host.
#pragma once

#include "plan/view.h"
#include "rules/tile_class.h"

namespace anymask::cpu {

// Fills everything that `plan` points to (see plan::forward_only). `lowered` is the program with
// its dense leaves unpacked.
void build_plan(const rules::Program& lowered, const plan::Plan& plan);

// The exact class of one tile: rules::tile_class, then the bits where it says `some`.
rules::TileClass exact_class(const rules::Program& program, rules::Place place,
                             const rules::Tile& tile);

}  // namespace anymask::cpu
