// What the tensor-core kernels of TTT-MLP share: the fast weights in the registers of a block, and products with them.
//
// A block of D / 8 warps holds one chain, or a cluster of SPLIT = 2 blocks does, each with half of the hidden columns.
// D = 96 takes a cluster: a block of 384 threads has 168 registers for each.
// Warp i owns SLICE = 32 / SPLIT hidden columns f of both layers, as fp32 accumulators of the transposed weights, so
// that an update, which accumulates, is a product into them; D / SPLIT registers a lane for each layer:
//     W1^T [SLICE f, D]: w1[i][j] is the 16 x 8 tile of f tile i and d tile j
//     W2^T [D, SLICE f]: w2[m][n] is the 16 x 8 tile of d tile m and f tile n
// Rounded in pairs (`First`, `Second`) they are, as they lie, the B operands of xk w1 and x2 w2; with every 8 x 8 block
// transposed (`transpose`) those of .. w1^T and .. w2^T.
//
// Of tokens [16, SLICE f] a warp has accumulators z[FT][4]: tile n is f = 8n .. 8n + 7. Rounded (`Columns`) they are
// the A operand of a product over f and the B operand [f, token]; transposed, the A operand [f, token] and the B
// operand [token, f]. So nothing but tokens and sums over f goes through shared memory.
//
// Lanes: g = lane / 4 and t = lane % 4, as in device.cuh.
#pragma once
#include "device.cuh"

namespace ttt {

constexpr int CHUNK = 16;  // tokens of one product
#ifndef TTT_SPLIT
#define TTT_SPLIT 1
#endif
#if TTT_SPLIT > 1
#define TTT_CLUSTER __cluster_dims__(TTT_SPLIT, 1, 1)
#else
#define TTT_CLUSTER
#endif
constexpr int SPLIT = TTT_SPLIT;   // blocks of a chain
constexpr int SLICE = 32 / SPLIT;  // hidden columns of one warp
constexpr int FT = SLICE / 8, FK = SLICE / 16;

template <int N> struct alignas(N % 4 ? 8 : 16) Floats { float x[N]; };
using Four = Floats<4>;
struct alignas(16) Words { uint32_t x[4]; };
struct alignas(8) Two { float x[2]; };
struct alignas(8) Pair { uint32_t x[2]; };

template <int D> struct Sizes {
    static constexpr int F = 4 * D, OWN = F / SPLIT, WARPS = OWN / SLICE, THREADS = 32 * WARPS;
    static constexpr int ROW = D + 8;             // of a tile of tokens in shared memory: no bank conflicts
    static constexpr int PIECE = D > 64 ? 32 : D; // columns of a warp's part of [16, D] that are in registers at once
    // Where rows are summed: how many d of a token a thread has, and how many lanes, a power of two, have the token. In
    // sixes (D = 96) the last third of the warps has no place.
    static constexpr int EACH = D % 3 ? 4 : 6, LANES = D / EACH, PLACES = CHUNK * LANES, PLACE_WARPS = PLACES / 32;
    static constexpr int PARTIAL = CHUNK * ROW;   // floats of one warp's part of [16, D]
    static constexpr int RECORD = (8 * D * D + F) / SPLIT;  // floats of a block's fast weights: w1, w2, b1
};

// --- Operands ---

// Columns of one warp's 16 tokens, rounded: x[n][h] is the pair [token g + 8h, f = 8n + 2t].
struct Columns { uint32_t x[FT][2]; };

template <typename T> TTT_INLINE Columns round_columns(const float (&z)[FT][4]) {
    Columns y;
#pragma unroll
    for (int n = 0; n < FT; n++)
        for (int h = 0; h < 2; h++) y.x[n][h] = pack<T>(z[n][2 * h], z[n][2 * h + 1]);
    return y;
}
// x[n][h] becomes the pair [f = 8n + g, token 8h + 2t].
TTT_INLINE Columns transpose(const Columns& a) {
    Columns y;
#pragma unroll
    for (int n = 0; n < FT; n++)
        for (int h = 0; h < 2; h++) y.x[n][h] = movmatrix(a.x[n][h]);
    return y;
}

// Fast weights of one warp, rounded, 8 x 8 blocks: of W1^T x[i][j][h] is block f = 16i + 8h, d = 8j.
template <int D> struct First {
    uint32_t x[FK][D / 8][2];
    // Blocks 4q .. 4q + 3: x[i][j][0], x[i][j][1], x[i][j + 1][0], x[i][j + 1][1] with q = i D / 16 + j / 2.
    TTT_INLINE void quad(uint32_t (&r)[4], int q) const {
        const int i = q / (D / 16), j = q % (D / 16) * 2;
        r[0] = x[i][j][0], r[1] = x[i][j][1], r[2] = x[i][j + 1][0], r[3] = x[i][j + 1][1];
    }
};
// Of W2^T x[m][n][h] is block d = 16m + 8h, f = 8n.
template <int D> struct Second {
    uint32_t x[D / 16][FT][2];
    TTT_INLINE void quad(uint32_t (&r)[4], int q) const {
        const int m = q / FK, n = q % FK * 2;
        r[0] = x[m][n][0], r[1] = x[m][n][1], r[2] = x[m][n + 1][0], r[3] = x[m][n + 1][1];
    }
};
// Either of them in shared memory, block after block: read where it is used, as it is or with every block transposed.
template <bool TRANSPOSED> struct Blocks {
    const uint32_t* p;
    int lane;
    TTT_INLINE void quad(uint32_t (&r)[4], int q) const {
        if (TRANSPOSED) ldmatrix_x4_trans(r, p + 128 * q + 4 * lane);
        else ldmatrix_x4(r, p + 128 * q + 4 * lane);
    }
};

template <typename T, int D> TTT_INLINE First<D> round_first(const float (&w)[FK][D / 8][4]) {
    First<D> y;
#pragma unroll
    for (int i = 0; i < FK; i++)
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            for (int h = 0; h < 2; h++) y.x[i][j][h] = pack<T>(w[i][j][2 * h], w[i][j][2 * h + 1]);
    return y;
}
template <typename T, int D> TTT_INLINE Second<D> round_second(const float (&w)[D / 16][FT][4]) {
    Second<D> y;
#pragma unroll
    for (int m = 0; m < D / 16; m++)
#pragma unroll
        for (int n = 0; n < FT; n++)
            for (int h = 0; h < 2; h++) y.x[m][n][h] = pack<T>(w[m][n][2 * h], w[m][n][2 * h + 1]);
    return y;
}
template <int D> TTT_INLINE First<D> transpose(const First<D>& a) {
    First<D> y;
#pragma unroll
    for (int i = 0; i < FK; i++)
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            for (int h = 0; h < 2; h++) y.x[i][j][h] = movmatrix(a.x[i][j][h]);
    return y;
}
template <int D> TTT_INLINE Second<D> transpose(const Second<D>& a) {
    Second<D> y;
#pragma unroll
    for (int m = 0; m < D / 16; m++)
#pragma unroll
        for (int n = 0; n < FT; n++)
            for (int h = 0; h < 2; h++) y.x[m][n][h] = movmatrix(a.x[m][n][h]);
    return y;
}

// --- Operands out of tiles of tokens in shared memory, rows of ROW numbers ---

// A = tile[row .. row + 15, col .. col + 15].
template <int ROW, typename T> TTT_INLINE void load_a(uint32_t (&a)[4], const T* tile, int row, int col, int lane) {
    ldmatrix_x4(a, tile + (row + lane % 16) * ROW + col + lane / 16 * 8);
}
// A = tile[row .. row + 15, col .. col + 15]^T.
template <int ROW, typename T>
TTT_INLINE void load_a_trans(uint32_t (&a)[4], const T* tile, int row, int col, int lane) {
    ldmatrix_x4_trans(a, tile + (row + lane % 8 + lane / 16 * 8) * ROW + col + lane / 8 % 2 * 8);
}
// B = tile[row .. row + 15, col .. col + 15] of two products: b[0], b[1] columns 0 to 7, b[2], b[3] columns 8 to 15.
template <int ROW, typename T> TTT_INLINE void load_b(uint32_t (&b)[4], const T* tile, int row, int col, int lane) {
    ldmatrix_x4_trans(b, tile + (row + lane % 16) * ROW + col + lane / 16 * 8);
}
// B = tile[row .. row + 15, col .. col + 15]^T of two products.
template <int ROW, typename T>
TTT_INLINE void load_b_trans(uint32_t (&b)[4], const T* tile, int row, int col, int lane) {
    ldmatrix_x4(b, tile + (row + lane % 8 + lane / 16 * 8) * ROW + col + lane / 8 % 2 * 8);
}

// z [16, SLICE f] = b [f]
TTT_INLINE void start_columns(float (&z)[FT][4], const float* b, int t) {
#pragma unroll
    for (int k = 0; k < FT; k++) {
        Two x = *reinterpret_cast<const Two*>(b + 8 * k + 2 * t);
        z[k][0] = z[k][2] = x.x[0], z[k][1] = z[k][3] = x.x[1];
    }
}

// --- Products; each adds to its first argument ---

// z [16, SLICE f] += x [16, D] w1: x are 16 rows of a tile.
template <typename T, int D, typename W>
TTT_INLINE void times_first(float (&z)[FT][4], const T* tile, int row, const W& w1, int lane) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[4], b[4];
        load_a<D + 8>(a, tile, row, 16 * k, lane);
#pragma unroll
        for (int i = 0; i < FK; i++) {
            w1.quad(b, i * (D / 16) + k);
            mma<T>(z[2 * i], a, b[0], b[2]);
            mma<T>(z[2 * i + 1], a, b[1], b[3]);
        }
    }
}
// z [16, SLICE f] += y [16, D] w2^T, of w2 transposed: y are 16 rows of a tile.
template <typename T, int D, typename W>
TTT_INLINE void times_second_t(float (&z)[FT][4], const T* tile, int row, const W& w2_t, int lane) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[4], b[4];
        load_a<D + 8>(a, tile, row, 16 * k, lane);
#pragma unroll
        for (int n = 0; n < FK; n++) {
            w2_t.quad(b, k * FK + n);
            mma<T>(z[2 * n], a, b[0], b[1]);
            mma<T>(z[2 * n + 1], a, b[2], b[3]);
        }
    }
}
TTT_INLINE void as_a(uint32_t (&a)[4], const Columns& x, int k) {  // columns f = 16k .. 16k + 15
    a[0] = x.x[2 * k][0], a[1] = x.x[2 * k][1], a[2] = x.x[2 * k + 1][0], a[3] = x.x[2 * k + 1][1];
}
TTT_INLINE void as_a_trans(uint32_t (&a)[4], const Columns& x_t, int k) {  // rows f = 16k .. 16k + 15
    a[0] = x_t.x[2 * k][0], a[1] = x_t.x[2 * k + 1][0], a[2] = x_t.x[2 * k][1], a[3] = x_t.x[2 * k + 1][1];
}

template <int P> TTT_INLINE void fill(float (&y)[P][4], float x) {
#pragma unroll
    for (int n = 0; n < P; n++)
        for (int e = 0; e < 4; e++) y[n][e] = x;
}
template <int P> TTT_INLINE void scale_rows(float (&y)[P][4], const float (&step)[2]) {
#pragma unroll
    for (int n = 0; n < P; n++)
        for (int e = 0; e < 4; e++) y[n][e] *= step[e / 2];
}

// Of y [16, D] the next may have P x 8 columns from `from` on alone, a constant once loops are unrolled.
// y [16, D] += x [16, SLICE f] w2.
template <typename T, int D, typename W, int P>
TTT_INLINE void times_second(float (&y)[P][4], const Columns& x, const W& w2, int from = 0) {
#pragma unroll
    for (int k = 0; k < FK; k++) {
        uint32_t a[4], b[4];
        as_a(a, x, k);
#pragma unroll
        for (int m = 0; m < P / 2; m++) {
            w2.quad(b, (from / 16 + m) * FK + k);
            mma<T>(y[2 * m], a, b[0], b[2]);
            mma<T>(y[2 * m + 1], a, b[1], b[3]);
        }
    }
}
// y [16, D] += x [16, SLICE f] w1^T, of w1 transposed.
template <typename T, int D, typename W, int P>
TTT_INLINE void times_first_t(float (&y)[P][4], const Columns& x, const W& w1_t, int from = 0) {
#pragma unroll
    for (int k = 0; k < FK; k++) {
        uint32_t a[4], b[4];
        as_a(a, x, k);
#pragma unroll
        for (int n = 0; n < P / 2; n++) {
            w1_t.quad(b, k * (D / 16) + from / 16 + n);
            mma<T>(y[2 * n], a, b[0], b[1]);
            mma<T>(y[2 * n + 1], a, b[2], b[3]);
        }
    }
}
// W1^T [SLICE f, D] += x^T [SLICE f, 16] y [16, D], of x transposed: y are 16 rows of a tile.
template <typename T, int D>
TTT_INLINE void update_first(float (&w1)[FK][D / 8][4], const Columns& x_t, const T* tile, int row, int lane) {
    uint32_t a[FK][4];
#pragma unroll
    for (int i = 0; i < FK; i++) as_a_trans(a[i], x_t, i);
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        uint32_t b[4];
        load_b<D + 8>(b, tile, row, 8 * j, lane);
#pragma unroll
        for (int i = 0; i < FK; i++) {
            mma<T>(w1[i][j], a[i], b[0], b[1]);
            mma<T>(w1[i][j + 1], a[i], b[2], b[3]);
        }
    }
}
// W2^T [D, SLICE f] += y^T [D, 16] x [16, SLICE f], of x transposed: y are 16 rows of a tile.
template <typename T, int D>
TTT_INLINE void update_second(float (&w2)[D / 16][FT][4], const Columns& x_t, const T* tile, int row, int lane) {
#pragma unroll
    for (int m = 0; m < D / 16; m++) {
        uint32_t a[4];
        load_a_trans<D + 8>(a, tile, row, 16 * m, lane);
#pragma unroll
        for (int n = 0; n < FT; n++) mma<T>(w2[m][n], a, x_t.x[n][0], x_t.x[n][1]);
    }
}
// z [16, SLICE f] += p [16, 16 tokens] x [16, SLICE f], of x transposed.
template <typename T> TTT_INLINE void times_columns(float (&z)[FT][4], const uint32_t (&p)[4], const Columns& x_t) {
#pragma unroll
    for (int n = 0; n < FT; n++) mma<T>(z[n], p, x_t.x[n][0], x_t.x[n][1]);
}
// y [16, D] += p [16, 16 tokens] of 16 rows of a tile.
template <typename T, int D, int P>
TTT_INLINE void times_rows(float (&y)[P][4], const uint32_t (&p)[4], const T* tile, int row, int lane, int from = 0) {
#pragma unroll
    for (int n = 0; n < P; n += 2) {
        uint32_t b[4];
        load_b<D + 8>(b, tile, row, from + 8 * n, lane);
        mma<T>(y[n], p, b[0], b[1]);
        mma<T>(y[n + 1], p, b[2], b[3]);
    }
}
// s [16, 16] += x [16, SLICE f] y^T [SLICE f, 16]
template <typename T> TTT_INLINE void scores(float (&s)[2][4], const Columns& x, const Columns& y) {
#pragma unroll
    for (int k = 0; k < FK; k++) {
        uint32_t a[4];
        as_a(a, x, k);
#pragma unroll
        for (int n = 0; n < 2; n++) mma<T>(s[n], a, y.x[2 * k][n], y.x[2 * k + 1][n]);
    }
}
// s [16, 16] += 16 rows of tile a times 16 rows of tile b, transposed.
template <typename T, int D>
TTT_INLINE void row_scores(float (&s)[2][4], const T* tile_a, int row_a, const T* tile_b, int row_b, int lane) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[4], b[4];
        load_a<D + 8>(a, tile_a, row_a, 16 * k, lane);
        load_b_trans<D + 8>(b, tile_b, row_b, 16 * k, lane);
        mma<T>(s[0], a, b[0], b[1]);
        mma<T>(s[1], a, b[2], b[3]);
    }
}
// A square of scores as an A operand.
template <typename T> TTT_INLINE void round_scores(uint32_t (&a)[4], const float (&s)[2][4]) {
    a[0] = pack<T>(s[0][0], s[0][1]), a[1] = pack<T>(s[0][2], s[0][3]);
    a[2] = pack<T>(s[1][0], s[1][1]), a[3] = pack<T>(s[1][2], s[1][3]);
}

// --- Sums over f: what each warp has of [16, D] goes through shared memory, and is summed in the order of warps ---

// Where this thread has what was summed: a token, and EACH d.
template <int D> struct Place {
    int token, d;
    TTT_INLINE Place(int thread)
        : token(thread / Sizes<D>::LANES), d(Sizes<D>::EACH * (thread % Sizes<D>::LANES)) {}
};
// Whether it has a place.
template <int D> TTT_INLINE bool has_place(int thread) {
    return Sizes<D>::PLACES == Sizes<D>::THREADS || thread < Sizes<D>::PLACES;
}
template <int D> using Values = Floats<Sizes<D>::EACH>;
template <int D, int P> TTT_INLINE void store_partial(float* partial, const float (&y)[P][4], int lane, int from = 0) {
    float* row = partial + lane / 4 * Sizes<D>::ROW + lane % 4 * 2 + from;
#pragma unroll
    for (int n = 0; n < P; n++) {
        *reinterpret_cast<Two*>(row + 8 * n) = {y[n][0], y[n][1]};
        *reinterpret_cast<Two*>(row + 8 * Sizes<D>::ROW + 8 * n) = {y[n][2], y[n][3]};
    }
}
template <int D> TTT_INLINE Values<D> sum_partials(const float* partials, const Place<D>& at) {
    Values<D> sum = {};
#pragma unroll
    for (int w = 0; w < Sizes<D>::WARPS; w++) {
        const float* from = partials + w * Sizes<D>::PARTIAL + at.token * Sizes<D>::ROW + at.d;
        Values<D> part = *reinterpret_cast<const Values<D>*>(from);
        for (int i = 0; i < Sizes<D>::EACH; i++) sum.x[i] += part.x[i];
    }
    return sum;
}

// Sum over the lanes of a token.
template <int D> TTT_INLINE float sum_token(float x) {
#pragma unroll
    for (int mask = Sizes<D>::LANES / 2; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
// Sum over the tokens of a warp: the same d in its other lanes.
template <int D> TTT_INLINE float sum_tokens(float x) {
#pragma unroll
    for (int mask = 16; mask >= Sizes<D>::LANES; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// Sums over 16 tokens, of columns: part[2n + e] is this lane's part of f = 8n + 2t + e. Gives each lane the sum of one
// column, `column_of(lane)`: each stage halves what a lane still has to sum.
TTT_INLINE float sum_columns(const float (&part)[2 * FT], int lane) {
    float x[2 * FT];
    for (int i = 0; i < 2 * FT; i++) x[i] = part[i];
    int mask = 16;
#pragma unroll
    for (int half = FT; half; half /= 2, mask /= 2) {
        const bool upper = lane & mask;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float other = shuffle_xor(upper ? x[i] : x[i + half], mask);
            x[i] = (upper ? x[i + half] : x[i]) + other;
        }
    }
    for (; mask >= 4; mask /= 2) x[0] += shuffle_xor(x[0], mask);
    return x[0];
}
// With q = lane / (8 / FT / 2 * 4) the part [q]; with SPLIT = 2 two lanes have the same, and `owns_column` one of them.
TTT_INLINE int column_of(int lane) {
    const int q = lane / (32 / (2 * FT));
    return q / 2 * 8 + lane % 4 * 2 + q % 2;
}
TTT_INLINE bool owns_column(int lane) { return lane / 4 % (4 / FT) == 0; }

// --- LayerNorm over D, of the d of a `Place` ---

template <int N> struct Normed { float x_hat[N], rstd; };
using Norm = Normed<4>;
template <int D> using NormOf = Normed<Sizes<D>::EACH>;

template <int D> TTT_INLINE NormOf<D> normalise(const Values<D>& z, float eps) {
    constexpr int EACH = Sizes<D>::EACH;
    NormOf<D> norm;
    float sum = z.x[0];
    for (int i = 1; i < EACH; i++) sum += z.x[i];
    float mean = sum_token<D>(sum) * (1.0f / D);
    float square = 0;
    for (int i = 0; i < EACH; i++) norm.x_hat[i] = z.x[i] - mean, square += norm.x_hat[i] * norm.x_hat[i];
    norm.rstd = rsqrt(sum_token<D>(square) * (1.0f / D) + eps);
    for (int i = 0; i < EACH; i++) norm.x_hat[i] *= norm.rstd;
    return norm;
}
// rstd (d - mean(d) - x_hat mean(d x_hat))
template <int D> TTT_INLINE Values<D> project(const Values<D>& d, const NormOf<D>& norm) {
    constexpr int EACH = Sizes<D>::EACH;
    float sum = 0, along = 0;
    for (int i = 0; i < EACH; i++) sum += d.x[i], along += d.x[i] * norm.x_hat[i];
    sum = sum_token<D>(sum) * (1.0f / D), along = sum_token<D>(along) * (1.0f / D);
    Values<D> y;
    for (int i = 0; i < EACH; i++) y.x[i] = norm.rstd * (d.x[i] - sum - norm.x_hat[i] * along);
    return y;
}

// --- gelu, tanh form: z sigmoid(v) with v = 2 sqrt(2 / pi) (z + 0.044715 z^3) ---

constexpr float GELU_SCALE = 1.5957691216057308f, GELU_CUBIC = 0.044715f, LOG2_E = 1.4426950408889634f;

TTT_INLINE float gelu_sigmoid(float z) {
    return reciprocal(1 + exp2(z * (-LOG2_E * GELU_SCALE - LOG2_E * GELU_SCALE * GELU_CUBIC * (z * z))));
}
struct Gelu { float value, first; };
TTT_INLINE Gelu gelu_first(float z) {
    float s = gelu_sigmoid(z), slope = GELU_SCALE + 3 * GELU_SCALE * GELU_CUBIC * (z * z), x = z * s;
    return {x, s + x * (1 - s) * slope};
}
struct GeluSecond { float value, first, second; };
TTT_INLINE GeluSecond gelu_second(float z) {
    float s = gelu_sigmoid(z), other = 1 - s, x = z * s;
    float slope = GELU_SCALE + 3 * GELU_SCALE * GELU_CUBIC * (z * z), bend = 6 * GELU_SCALE * GELU_CUBIC * z;
    return {x, s + x * other * slope, s * other * (2 * slope + z * (bend + (other - s) * slope * slope))};
}

// --- Tokens ---

struct View { const void* p; int64_t b, t, h; };  // a tensor B T H D or B T H, and its strides

// M rows of D numbers to shared memory; `aligned`: every row at a multiple of 16 bytes.
template <typename T, int D, int M>
TTT_INLINE void load_tokens(T* tile, const T* p, int64_t stride, bool aligned, int thread) {
    constexpr int PIECES = D / 8, ROWS = Sizes<D>::THREADS / PIECES;  // rows that the block copies at once
    const int first = thread / PIECES, col = thread % PIECES * 8;
    const T* from = p + first * stride + col;
    T* to = tile + first * Sizes<D>::ROW + col;
    if (M < ROWS && first >= M) return;
    if (aligned) {
#pragma unroll
        for (int row = 0; row < M; row += ROWS) copy_async_16(to + row * Sizes<D>::ROW, from + row * stride);
    } else
#pragma unroll 1
        for (int row = 0; row < M; row += ROWS)
#pragma unroll 1
            for (int k = 0; k < 8; k++) to[row * Sizes<D>::ROW + k] = from[row * stride + k];
}
// Of two tensors the same 16 rows, each by half of the threads.
template <typename T, int D>
TTT_INLINE void load_two(
    T* tile_a, const T* p_a, int64_t stride_a, T* tile_b, const T* p_b, int64_t stride_b, bool aligned, int thread
) {
    constexpr int PIECES = D / 8, HALF = CHUNK * PIECES;
    static_assert(2 * HALF == Sizes<D>::THREADS);
    const bool b = thread >= HALF;
    const int row = thread % HALF / PIECES, col = thread % PIECES * 8;
    const T* from = (b ? p_b : p_a) + row * (b ? stride_b : stride_a) + col;
    T* to = (b ? tile_b : tile_a) + row * Sizes<D>::ROW + col;
    if (aligned) copy_async_16(to, from);
    else
#pragma unroll 1
        for (int k = 0; k < 8; k++) to[k] = from[k];
}
// A number to shared memory, for which no register waits: the 4 bytes that it is in, which become it once they are
// there.
template <typename T> TTT_INLINE void copy_number(float* to, const T* from) {
    copy_async_4(to, reinterpret_cast<const void*>(reinterpret_cast<int64_t>(from) & ~int64_t(3)));
}
template <typename T> TTT_INLINE void convert_number(float* to, const T* from) {
    const uint32_t word = __float_as_uint(*to);
    *to = to_float(T{uint16_t(reinterpret_cast<int64_t>(from) & 2 ? word >> 16 : word)});
}
template <typename T> TTT_INLINE void store_four(T* p, const float (&x)[4]) {
    *reinterpret_cast<Pair*>(p) = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
}
template <typename T> TTT_INLINE Four load_four(const T* p) {
    Pair two = *reinterpret_cast<const Pair*>(p);
    float2 a = unpack<T>(two.x[0]), b = unpack<T>(two.x[1]);
    return {a.x, a.y, b.x, b.y};
}
// The same of an address that need not be a multiple of 8 bytes.
template <typename T> TTT_INLINE Four load_four(const T* p, bool aligned) {
    if (aligned) return load_four(p);
    return {to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

// The same of what a `Place` has.
template <typename T, int N> TTT_INLINE void store_values(T* p, const float (&x)[N]) {
    if constexpr (N == 4) store_four(p, x);
    else
#pragma unroll
        for (int i = 0; i < N; i += 2) reinterpret_cast<uint32_t*>(p)[i / 2] = pack<T>(x[i], x[i + 1]);
}
template <int D, typename T> TTT_INLINE Values<D> load_values(const T* p, bool aligned = true) {
    if constexpr (Sizes<D>::EACH == 4) return load_four(p, aligned);
    else {
        Values<D> y;
#pragma unroll
        for (int i = 0; i < Sizes<D>::EACH; i += 2)
            if (aligned) {
                const float2 two = unpack<T>(reinterpret_cast<const uint32_t*>(p)[i / 2]);
                y.x[i] = two.x, y.x[i + 1] = two.y;
            } else y.x[i] = to_float(p[i]), y.x[i + 1] = to_float(p[i + 1]);
        return y;
    }
}

// The x_hat of a `Place`, for the backward in 16 bits: an fp16 number, or beside fp16 tensors, where that would be the
// largest error of all in g_z2 (small, if LN(z2) is near its target), a whole number of steps: |x_hat| < sqrt(D).
template <typename T> constexpr bool IN_STEPS = false;
template <> constexpr bool IN_STEPS<fp16> = true;
template <int D> constexpr float STEPS = 32767.0f / (D <= 16 ? 4 : D <= 36 ? 6 : D <= 64 ? 8 : 10);
template <typename T, int D> TTT_INLINE void store_hat(fp16* p, const float (&x)[Sizes<D>::EACH]) {
    if constexpr (IN_STEPS<T>) {
        auto steps = [](float y) { return int(y * STEPS<D> + (y < 0 ? -0.5f : 0.5f)); };
#pragma unroll
        for (int i = 0; i < Sizes<D>::EACH; i += 2)
            reinterpret_cast<uint32_t*>(p)[i / 2] = (uint32_t(steps(x[i])) & 0xffff) | uint32_t(steps(x[i + 1])) << 16;
    } else store_values(p, x);
}
template <typename T, int D> TTT_INLINE Values<D> load_hat(const fp16* p) {
    if constexpr (IN_STEPS<T>) {
        Values<D> y;
#pragma unroll
        for (int i = 0; i < Sizes<D>::EACH; i += 2) {
            const uint32_t two = reinterpret_cast<const uint32_t*>(p)[i / 2];
            y.x[i] = short(two & 0xffff) * (1 / STEPS<D>), y.x[i + 1] = short(two >> 16) * (1 / STEPS<D>);
        }
        return y;
    } else return load_values<D>(p);
}

// Columns of a warp in its own slot of memory, each lane's words for itself.
constexpr int SLOT_WORDS = 64 * FT;
TTT_INLINE void keep(uint32_t* slot, const Columns& x, int lane) {
#pragma unroll
    for (int n = 0; n < FT; n += 2)
        reinterpret_cast<Words*>(slot)[16 * n + lane] = {x.x[n][0], x.x[n][1], x.x[n + 1][0], x.x[n + 1][1]};
}
TTT_INLINE Columns kept(const uint32_t* slot, int lane) {
    Columns x;
#pragma unroll
    for (int n = 0; n < FT; n += 2) {
        const Words y = reinterpret_cast<const Words*>(slot)[16 * n + lane];
        x.x[n][0] = y.x[0], x.x[n][1] = y.x[1], x.x[n + 1][0] = y.x[2], x.x[n + 1][1] = y.x[3];
    }
    return x;
}

// --- Fast weights in global memory ---

// w1 [D, F] and w2 [F, D] of one chain, from or to the accumulators of the warp whose columns start at `first`.
template <int D>
TTT_INLINE void load_weights(
    float (&w1)[FK][D / 8][4], float (&w2)[D / 16][FT][4], const float* p_w1, const float* p_w2, int first, int lane
) {
    constexpr int F = 4 * D;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        int row = g + e / 2 * 8, col = 2 * t + e % 2;
#pragma unroll
        for (int i = 0; i < FK; i++)
#pragma unroll
            for (int j = 0; j < D / 8; j++) w1[i][j][e] = p_w1[(8 * j + col) * F + first + 16 * i + row];
#pragma unroll
        for (int m = 0; m < D / 16; m++)
#pragma unroll
            for (int n = 0; n < FT; n++) w2[m][n][e] = p_w2[(first + 8 * n + col) * D + 16 * m + row];
    }
}
template <int D>
TTT_INLINE void store_weights(
    float* p_w1, float* p_w2, const float (&w1)[FK][D / 8][4], const float (&w2)[D / 16][FT][4], int first, int lane
) {
    constexpr int F = 4 * D;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        int row = g + e / 2 * 8, col = 2 * t + e % 2;
#pragma unroll
        for (int i = 0; i < FK; i++)
#pragma unroll
            for (int j = 0; j < D / 8; j++) p_w1[(8 * j + col) * F + first + 16 * i + row] = w1[i][j][e];
#pragma unroll
        for (int m = 0; m < D / 16; m++)
#pragma unroll
            for (int n = 0; n < FT; n++) p_w2[(first + 8 * n + col) * D + 16 * m + row] = w2[m][n][e];
    }
}
// The accumulators as they lie, 16 bytes of each lane after another: the records of 8 D D floats that only kernels
// read.
template <int D>
TTT_INLINE void save_weights(
    float* record, const float (&w1)[FK][D / 8][4], const float (&w2)[D / 16][FT][4], int thread
) {
    Four* to = reinterpret_cast<Four*>(record) + thread;
#pragma unroll
    for (int k = 0; k < FK * D / 8; k++) {
        const float(&a)[4] = w1[k / (D / 8)][k % (D / 8)];
        const float(&b)[4] = w2[k / FT][k % FT];
        to[k * Sizes<D>::THREADS] = {a[0], a[1], a[2], a[3]};
        to[(FK * D / 8 + k) * Sizes<D>::THREADS] = {b[0], b[1], b[2], b[3]};
    }
}
template <int D>
TTT_INLINE void restore_weights(
    float (&w1)[FK][D / 8][4], float (&w2)[D / 16][FT][4], const float* record, int thread
) {
    const Four* from = reinterpret_cast<const Four*>(record) + thread;
#pragma unroll
    for (int k = 0; k < FK * D / 8; k++) {
        Four a = from[k * Sizes<D>::THREADS], b = from[(FK * D / 8 + k) * Sizes<D>::THREADS];
        for (int e = 0; e < 4; e++) w1[k / (D / 8)][k % (D / 8)][e] = a.x[e], w2[k / FT][k % FT][e] = b.x[e];
    }
}

}  // namespace ttt
