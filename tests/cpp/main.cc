// Runs all C++ tests; the exit status is 0 if none failed.
#include "test.h"

int main() {
  using namespace flashjax::test;
  test_sequence();
  test_select();
  test_kernels();
  test_check();
  test_attention();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
