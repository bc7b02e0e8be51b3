#include "decoder_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

#define SPEAR_ROWS "decoder_forward.h"
#include "foreach_isa.h"

namespace spear {

DecoderForward decoder_forward_for(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::decoder_forward;
    if (isa == Isa::avx2) return avx2::decoder_forward;
#endif
    return generic::decoder_forward;
}

}  // namespace spear
