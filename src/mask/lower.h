// Checks a mask against a problem and lowers it to the few kinds that the rules know.
#pragma once

#include "anymask/mask.hpp"
#include "rules/program.h"

namespace anymask {

// Throws InvalidValue or InvalidType naming the mask kind and the argument that does not fit.
rules::Program lower(const Mask& mask, const Problem& problem);

}  // namespace anymask
