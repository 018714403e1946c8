#pragma once
#include "../machine.h"

namespace emulator {
Box box_at(const void* map, int c0, int c1, int c2, int c3);  // of an encoded tensor map
}
