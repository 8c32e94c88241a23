// Prints the best instruction-set level of the processor that the build runs on.
#include <cstdio>

#include "cvg/processor.h"

int main() {
  std::puts(cvg::processor_levels().back().c_str());
}
