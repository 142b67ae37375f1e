// The loops of fake_quantize.cpp, over a `Vec` of its instruction set; included once for each of them.

static inline Vec::F codes(Vec::F v, Vec::F zero, bool has_zero, Vec::F qmin, Vec::F qmax) {
    Vec::F code = Vec::rint(v);
    if (!has_zero) return Vec::clamp(code, qmin, qmax);  // adding 0 would turn -0 into +0
    return Vec::sub(Vec::clamp(Vec::add(code, zero), qmin, qmax), zero);
}

template <bool HAS_ZERO, bool MASK>
static void forward_rows(const Forward &f, const Quantizer &q, int64_t row, int64_t rows, int64_t inner) {
    using F = Vec::F;
    const F qmin = Vec::set(q.qmin), qmax = Vec::set(q.qmax);
    const float *x = f.x;
    float *y = f.y;
    Bits bits{f.mask};
    for (int64_t r = row; r < row + rows; ++r, x += inner, y += inner) {
        const float z = q.zero_at(r % f.scales);
        const F scale = Vec::set(q.scale[r % f.scales]), zero = Vec::set(z);
        const F lo = Vec::set(q.qmin - z), hi = Vec::set(q.qmax - z);
        int64_t i = 0;
        for (; i + Vec::W <= inner; i += Vec::W) {
            const F v = Vec::div(Vec::load(x + i), scale);
            Vec::store(y + i, Vec::mul(codes(v, zero, HAS_ZERO, qmin, qmax), scale));
            if (MASK) bits.append(Vec::bits(Vec::inside(v, lo, hi)), Vec::W);
        }
        const int left = static_cast<int>(inner - i);
        if (left) {
            const F v = Vec::div(Vec::load(x + i, left), scale);
            Vec::store(y + i, Vec::mul(codes(v, zero, HAS_ZERO, qmin, qmax), scale), left);
            if (MASK) bits.append(Vec::bits(Vec::inside(v, lo, hi)) & ((1u << left) - 1u), left);
        }
    }
    if (MASK) bits.flush();
}

// `rows` rows from number `row` on; the pointers stand at the first.
void forward(const Forward &f, const Quantizer &q, int64_t row, int64_t rows, int64_t inner) {
    const bool has_zero = q.zero_kind != NONE;
    auto *run = has_zero ? (f.mask ? forward_rows<true, true> : forward_rows<true, false>)
                         : (f.mask ? forward_rows<false, true> : forward_rows<false, false>);
    run(f, q, row, rows, inner);
}

// Sums run in float over this many vectors, then in double: short enough to lose nothing, long enough to cost
// nothing.
constexpr int BLOCK = 32;

struct Constants {
    Vec::F scale, zero, qmin, qmax, lo, hi;
};

// Adds one vector to the sums of its scale (`moved`) and of its zero point (`beyond`), and returns gx.
template <bool HAS_ZERO, bool INSIDE_SCALE>
static inline Vec::F backward_step(const Constants &k, Vec::F g, Vec::F x, Vec::F &moved, Vec::F &beyond) {
    using F = Vec::F;
    const F v = Vec::div(x, k.scale);
    const Vec::M inside = Vec::inside(v, k.lo, k.hi);
    const F c = codes(v, k.zero, HAS_ZERO, k.qmin, k.qmax);
    const F ds = INSIDE_SCALE ? Vec::sub(c, Vec::keep(inside, v)) : Vec::drop(inside, c);
    moved = Vec::add(moved, Vec::mul(g, ds));
    beyond = Vec::add(beyond, Vec::drop(inside, g));
    return Vec::keep(inside, g);
}

template <bool HAS_ZERO, bool INSIDE_SCALE>
static Sums backward_row(const Backward &b, const Quantizer &q, int64_t s, int64_t offset, int64_t inner) {
    using F = Vec::F;
    const float z = q.zero_at(s);
    const Constants k{Vec::set(q.scale[s]), Vec::set(z),          Vec::set(q.qmin),
                      Vec::set(q.qmax),     Vec::set(q.qmin - z), Vec::set(q.qmax - z)};
    const float *g = b.g + offset, *x = b.x + offset;
    float *gx = b.gx + offset;
    const F none = Vec::set(0.0f);
    Vec::D scale_sum = Vec::nothing(), zero_sum = Vec::nothing();
    const int64_t whole = inner / Vec::W * Vec::W;
    for (int64_t i = 0; i < whole;) {
        F moved = none, beyond = none;
        const int64_t stop = i + BLOCK * Vec::W < whole ? i + BLOCK * Vec::W : whole;
        for (; i < stop; i += Vec::W) {
            const F out = backward_step<HAS_ZERO, INSIDE_SCALE>(k, Vec::load(g + i), Vec::load(x + i), moved, beyond);
            Vec::store(gx + i, out);
        }
        scale_sum = Vec::widen(scale_sum, moved);
        zero_sum = Vec::widen(zero_sum, beyond);
    }
    const int left = static_cast<int>(inner - whole);
    if (left) {
        // lanes past the end hold 0, and add 0 to both sums
        const F g_left = Vec::load(g + whole, left), x_left = Vec::load(x + whole, left);
        F moved = none, beyond = none;
        Vec::store(gx + whole, backward_step<HAS_ZERO, INSIDE_SCALE>(k, g_left, x_left, moved, beyond), left);
        scale_sum = Vec::widen(scale_sum, moved);
        zero_sum = Vec::widen(zero_sum, beyond);
    }
    return {Vec::sum(scale_sum), Vec::sum(zero_sum)};
}

// One row of scale number `s`, of `inner` elements from `offset` on.
Sums backward(const Backward &b, const Quantizer &q, int64_t s, int64_t offset, int64_t inner) {
    const bool has_zero = q.zero_kind != NONE;
    auto *run = has_zero ? (b.inside_scale ? backward_row<true, true> : backward_row<true, false>)
                         : (b.inside_scale ? backward_row<false, true> : backward_row<false, false>);
    return run(b, q, s, offset, inner);
}
