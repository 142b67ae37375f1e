// What the kernels for binary and ternary weights share, whatever the instruction set.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

// Outputs that are computed together: one word of bits, whole panels of every layout.
constexpr int CHUNK = 64;
// Rows of activations that are computed together, and the most planes a code has.
constexpr int TILE = 8;
// Outputs of a panel of weights for floats, and the activations of one block of its sums.
constexpr int FLOAT_PANEL = 16, FLOAT_BLOCK = 32;

// A convolution, or a matrix product seen as one: batch rows, and 1 for every other extent. For each pixel x holds
// [planes][groups][run] bytes, where a run is what one group reads.
struct Geometry {
    int64_t batch, height, width, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_height, stride_width;
    int64_t pad_height, pad_width, dilation_height, dilation_width;
    int64_t planes, groups, run;
    int64_t outputs;  // of one group

    int64_t taps() const { return kernel_height * kernel_width; }
    int64_t pixels() const { return batch * out_height * out_width; }
    int64_t pixel_bytes() const { return planes * groups * run; }
    int64_t chunks() const { return (outputs + CHUNK - 1) / CHUNK; }
};

enum EpilogueKind { INT32 = 0, FLOAT = 1, BITS = 2 };

// acc = base + sum of factors[plane] * count[plane] + taps[t] for each tap t in the padding (taps may be null), and
// then acc itself, acc * scale + bias, or the bit (acc >= threshold) != flip.
struct Epilogue {
    int64_t kind, outputs;  // outputs of all groups
    void *to;               // [pixels][outputs], or [pixels][words] that hold 0
    const int32_t *base, *factors, *taps;
    const float *scale, *bias;
    const int32_t *threshold;
    const uint8_t *flip;
};

// The lowest bits of 8 bytes, as a byte: no two of the 64 products of bits meet in the top byte.
inline uint64_t gather_bits(const uint8_t *bytes) {
    uint64_t eight;
    std::memcpy(&eight, bytes, 8);
    return ((eight & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
}

}  // namespace
