// The loops of fake_quantize.cpp, over a `Vec` of its instruction set; included once for each of them.

enum Codes { PLAIN, WITH_ZERO, ODD_ONES };

template <Codes KIND>
static inline Vec::F codes(Vec::F v, Vec::F zero, Vec::F qmin, Vec::F qmax) {
    if (KIND == ODD_ONES) {
        const Vec::F half = Vec::floor(Vec::mul(v, Vec::set(0.5f)));
        return Vec::clamp(Vec::add(Vec::add(half, half), Vec::set(1.0f)), qmin, qmax);
    }
    Vec::F code = Vec::rint(v);
    if (KIND == PLAIN) return Vec::clamp(code, qmin, qmax);  // adding 0 would turn -0 into +0
    return Vec::sub(Vec::clamp(Vec::add(code, zero), qmin, qmax), zero);
}

template <Codes KIND, bool MASK>
static void forward_rows(const Forward &f, const Quantizer &q, int64_t row, int64_t rows, int64_t inner) {
    using F = Vec::F;
    const F qmin = Vec::set(q.qmin), qmax = Vec::set(q.qmax);
    const float *x = f.x;
    float *y = f.y;
    Bits bits{f.mask};
    for (int64_t r = row; r < row + rows; ++r, x += inner, y += inner) {
        const float z = q.zero_at(r % f.scales);
        const F scale = Vec::set(q.scale[r % f.scales]), zero = Vec::set(z);
        const F lo = Vec::set(q.qmin - q.margin() - z), hi = Vec::set(q.qmax + q.margin() - z);
        int64_t i = 0;
        for (; i + Vec::W <= inner; i += Vec::W) {
            const F v = Vec::div(Vec::load(x + i), scale);
            Vec::store(y + i, Vec::mul(codes<KIND>(v, zero, qmin, qmax), scale));
            if (MASK) bits.append(Vec::bits(Vec::inside(v, lo, hi)), Vec::W);
        }
        const int left = static_cast<int>(inner - i);
        if (left) {
            const F v = Vec::div(Vec::load(x + i, left), scale);
            Vec::store(y + i, Vec::mul(codes<KIND>(v, zero, qmin, qmax), scale), left);
            if (MASK) bits.append(Vec::bits(Vec::inside(v, lo, hi)) & ((1u << left) - 1u), left);
        }
    }
    if (MASK) bits.flush();
}

// `rows` rows from number `row` on; the pointers stand at the first.
void forward(const Forward &f, const Quantizer &q, int64_t row, int64_t rows, int64_t inner) {
    auto *run = q.zero_kind == ODD    ? (f.mask ? forward_rows<ODD_ONES, true> : forward_rows<ODD_ONES, false>)
                : q.zero_kind == NONE ? (f.mask ? forward_rows<PLAIN, true> : forward_rows<PLAIN, false>)
                                      : (f.mask ? forward_rows<WITH_ZERO, true> : forward_rows<WITH_ZERO, false>);
    run(f, q, row, rows, inner);
}

// Sums run in float over this many vectors, then in double: short enough to lose nothing, long enough to cost
// nothing.
constexpr int BLOCK = 32;

struct Constants {
    Vec::F scale, zero, qmin, qmax, lo, hi;
};

// Adds one vector to the sums of its scale (`moved`) and of its zero point (`beyond`), and returns gx.
template <Codes KIND, bool INSIDE_SCALE>
static inline Vec::F backward_step(const Constants &k, Vec::F g, Vec::F x, Vec::F &moved, Vec::F &beyond) {
    using F = Vec::F;
    const F v = Vec::div(x, k.scale);
    const Vec::M inside = Vec::inside(v, k.lo, k.hi);
    const F c = codes<KIND>(v, k.zero, k.qmin, k.qmax);
    const F ds = INSIDE_SCALE ? Vec::sub(c, Vec::keep(inside, v)) : Vec::drop(inside, c);
    moved = Vec::add(moved, Vec::mul(g, ds));
    beyond = Vec::add(beyond, Vec::drop(inside, g));
    return Vec::keep(inside, g);
}

template <Codes KIND, bool INSIDE_SCALE>
static Sums backward_row(const Backward &b, const Quantizer &q, int64_t s, int64_t offset, int64_t inner) {
    using F = Vec::F;
    const float z = q.zero_at(s);
    const Constants k{Vec::set(q.scale[s]),
                      Vec::set(z),
                      Vec::set(q.qmin),
                      Vec::set(q.qmax),
                      Vec::set(q.qmin - q.margin() - z),
                      Vec::set(q.qmax + q.margin() - z)};
    const float *g = b.g + offset, *x = b.x + offset;
    float *gx = b.gx + offset;
    const F none = Vec::set(0.0f);
    Vec::D scale_sum = Vec::nothing(), zero_sum = Vec::nothing();
    const int64_t whole = inner / Vec::W * Vec::W;
    for (int64_t i = 0; i < whole;) {
        F moved = none, beyond = none;
        const int64_t stop = i + BLOCK * Vec::W < whole ? i + BLOCK * Vec::W : whole;
        for (; i < stop; i += Vec::W) {
            const F out = backward_step<KIND, INSIDE_SCALE>(k, Vec::load(g + i), Vec::load(x + i), moved, beyond);
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
        Vec::store(gx + whole, backward_step<KIND, INSIDE_SCALE>(k, g_left, x_left, moved, beyond), left);
        scale_sum = Vec::widen(scale_sum, moved);
        zero_sum = Vec::widen(zero_sum, beyond);
    }
    return {Vec::sum(scale_sum), Vec::sum(zero_sum)};
}

// One row of scale number `s`, of `inner` elements from `offset` on.
Sums backward(const Backward &b, const Quantizer &q, int64_t s, int64_t offset, int64_t inner) {
    auto *run = q.zero_kind == ODD    ? (b.inside_scale ? backward_row<ODD_ONES, true> : backward_row<ODD_ONES, false>)
                : q.zero_kind == NONE ? (b.inside_scale ? backward_row<PLAIN, true> : backward_row<PLAIN, false>)
                                      : (b.inside_scale ? backward_row<WITH_ZERO, true> : backward_row<WITH_ZERO, false>);
    return run(b, q, s, offset, inner);
}
