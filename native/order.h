// The sizes of the canonical order of summation, as in reference/order.py.
#pragma once

constexpr unsigned int kVectorSize = 8;  // elements of 16 bits in a vector
constexpr unsigned int kVectorBytes = 16;
constexpr unsigned int kNumSegments = 8;
constexpr unsigned int kNumLanes = 32;
