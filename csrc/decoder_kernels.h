// Entry of the decoder's kernels, compiled for several instruction sets.
#pragma once

#include "decoder.h"
#include "isa.h"

namespace spear {

// Runs one forward pass; every thread of a team calls it with its index, inside one OpenMP parallel region.
using DecoderForward = void (*)(const DecoderCall& call, int64_t thread, int64_t threads);

DecoderForward decoder_forward_for(Isa isa);

}  // namespace spear
