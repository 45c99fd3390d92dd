// Which of the compiled instruction sets this processor has.

#include "kernels.h"
#include "parallel.h"

namespace million_experts {

OpenMP openmp;

namespace generic {
extern const Kernels kernels;
}
#if defined(ME_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

const Kernels* const* supported_kernels(size_t* count) {
  static const Kernels* found[4];
  static const size_t number = [] {
    size_t n = 0;
    found[n++] = &generic::kernels;
#if defined(ME_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      found[n++] = &avx2::kernels;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found[n++] = &avx512::kernels;
        if (__builtin_cpu_supports("avx512bf16")) found[n++] = &avx512_bf16::kernels;
      }
    }
#endif
    return n;
  }();
  *count = number;
  return found;
}

}  // namespace million_experts
