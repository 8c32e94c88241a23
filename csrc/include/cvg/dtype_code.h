// Element types by name, for compilers too that have no _Float16.
#pragma once

namespace cvg {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

}  // namespace cvg
