// The vector of NEON for bits_count.h and bits_loops.h.

struct Vec {
    using U = uint8x16_t;
    using Count = uint8x16_t;
    using Sum = uint64x2_t;
    using F = float32x4_t;
    using I = uint32x4_t;
    static constexpr int LANES = 2, ROWS = 4, W = 4, FLOAT_ROWS = 2;
    static constexpr int64_t BLOCK = 31;  // words whose counts fit a byte
    static U load(const uint64_t *p) { return vreinterpretq_u8_u64(vld1q_u64(p)); }
    static U set(uint64_t a) { return vreinterpretq_u8_u64(vdupq_n_u64(a)); }
    static U differ(U a, U b) { return veorq_u8(a, b); }
    static U choose(U a, U yes, U no) { return vbslq_u8(a, yes, no); }
    static Count no_count() { return vdupq_n_u8(0); }
    static Sum no_sum() { return vdupq_n_u64(0); }
    static Count count(Count total, U x) { return vaddq_u8(total, vcntq_u8(x)); }
    static Sum widen(Sum total, Count count) { return vpadalq_u32(total, vpaddlq_u16(vpaddlq_u8(count))); }
    static void store_sum(uint32_t *p, Sum a) { vst1_u32(p, vmovn_u64(a)); }

    static F load(const float *p) { return vld1q_f32(p); }
    static F load(const float *p, int n) {
        float lanes[4] = {};
        std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
        return vld1q_f32(lanes);
    }
    static I load(const uint32_t *p) { return vld1q_u32(p); }
    static void store(float *p, F a) { vst1q_f32(p, a); }
    static F set(float a) { return vdupq_n_f32(a); }
    static I none() { return vdupq_n_u32(0); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static uint32_t at_least(F a, F b) {
        const uint32_t bit[4] = {1, 2, 4, 8};
        return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), vld1q_u32(bit)));
    }
    static I mark(I held, F a, F b, uint32_t bit) {
        return vorrq_u32(held, vandq_u32(vcgeq_f32(a, b), vdupq_n_u32(bit)));
    }
    static void store(uint32_t *p, I a) { vst1q_u32(p, a); }
    static I either(I a, I b) { return vorrq_u32(a, b); }
    static I up(I a) { return vshlq_n_u32(a, 1); }
    static I top(I a) { return vandq_u32(a, vdupq_n_u32(0x80000000u)); }
    static I spread(I a) { return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), 31)); }
    static F flip(F a, I sign) { return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), sign)); }
    static F keep(F a, I mask) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), mask)); }
};
