// What the tensor-core kernels of TTT-Linear share: tiles in shared memory, and the recurrence over the fast weights.
//
// A block runs one chain (batch, head). The first D / 16 warps are its recurrence: warp i keeps columns e of
// [16 i, 16 i + 16) of w1 as accumulators of w1^T [16 e, D], so that a product's accumulators, rounded in pairs, are at
// once the B operand of z1 [M, 16 e] = xk w1, and the update w1^T -= (eta_last lr g_z1)^T xk adds to them where they
// are. The other warps are readers, which load tokens and compute what no later mini-batch waits for.
//
// w1 and b1 are kept less their mean over e. A LayerNorm does not see it, every g_z1 has mean 0 over e, so that no
// update changes it, and z1 comes out with a mean near 0: its variance is then E[z1^2] - E[z1]^2 without cancellation,
// and all sums over e that the inner gradient takes cross the warps in one exchange.
//
// With fp16, w1 and b1 are kept 256 times larger: eta_last lr g_z1 would be subnormal.
#pragma once
#include "device.cuh"

namespace ttt {

struct View { void* p; int64_t batch, token, head; };  // a tensor B T H D or B T H; strides in numbers

TTT_INLINE int lane_id() { return threadIdx.x % 32; }
TTT_INLINE int row_in_tile() { return lane_id() / 4; }         // g of an accumulator, and g + 8
TTT_INLINE int column_in_tile() { return lane_id() % 4 * 2; }  // 2t, and 2t + 1

// Rows of D numbers, each followed by 16 bytes, which spread the rows of an 8 x 8 matrix over all banks.
template <typename T_, int D_> struct Tile {
    static constexpr int ROW = D_ + 8;
    T_* p;
    TTT_INLINE T_* at(int row, int column) const { return p + row * ROW + column; }
    // What this lane points ldmatrix at for four matrices: rows 0 and 8 of columns 0, then of columns 8 ...
    TTT_INLINE const T_* by_columns(int row, int column) const {
        return at(row + lane_id() % 16, column + lane_id() / 16 * 8);
    }
    // ... or columns 0 and 8 of rows 0, then of rows 8. What is one operand of mma has to lie in neighbouring registers.
    TTT_INLINE const T_* by_rows(int row, int column) const {
        return at(row + lane_id() % 8 + lane_id() / 16 * 8, column + lane_id() / 8 % 2 * 8);
    }
    TTT_INLINE void set(int row, int column, uint32_t pair) const {
        *reinterpret_cast<uint32_t*>(at(row, column)) = pair;
    }
    TTT_INLINE uint32_t get(int row, int column) const { return *reinterpret_cast<const uint32_t*>(at(row, column)); }
};

template <int D, int ROWS> constexpr int tile_bytes = 2 * ROWS * (D + 8);

// fp16 only: what fast weights are multiplied by, and scores without lr divided by.
template <typename T> constexpr float weight_scale = 1.0f;
template <> constexpr float weight_scale<fp16> = 256.0f;
template <typename T> constexpr float score_scale = 1.0f;
template <> constexpr float score_scale<fp16> = 64.0f;

enum Pass { FORWARD, AGAIN, REVERSE };  // the forward; in the backward, the forward again, and the way back

// Sizes, warps and shared memory of a chain in one pass.
template <Pass PASS, typename T_, int D_, int M_, bool CAUSAL_, int GROUPS_, int SLOTS_, int STAGES_> struct Plan {
    using T = T_;
    static constexpr int D = D_, M = M_, GROUPS = GROUPS_, SLOTS = SLOTS_, STAGES = STAGES_;
    static constexpr bool CAUSAL = CAUSAL_;
    static constexpr int TILES = M / 16;
    static constexpr int WARPS = D / 16;                 // of the recurrence
    static constexpr int TEAM = TILES < 4 ? TILES : 4;   // readers of a mini-batch; team i reads every n = i mod GROUPS
    static constexpr int READERS = TEAM * GROUPS;
    static constexpr int TURN = 16 * (TILES / TEAM);     // tokens of a reader
    static constexpr int THREADS = 32 * (WARPS + READERS);
    static constexpr int HAND_OVER = 32 * (WARPS + TEAM);  // threads at a barrier of a slot
    static constexpr float SCALE = PASS == REVERSE ? 1.0f : weight_scale<T>;

    static constexpr int TOKENS = tile_bytes<D, M>, PAIRS = CAUSAL ? tile_bytes<M, M> : 0;
    // xq, xk, xv, lr; and d_out; or d_z1_bar, scores and d_attn, x_hat, and what Again keeps of each token.
    static constexpr int STAGE =
        (PASS == FORWARD ? 3 : 4) * TOKENS + 4 * M + (PASS == REVERSE ? 2 * PAIRS + 4 * M * D + 32 * M : 0);
    // w1^T, b1 and g_z1; or d_w1^T, g_z1, d_z1 and d_xv.
    static constexpr int SLOT =
        tile_bytes<D, D> + (PASS == REVERSE ? 3 * TOKENS : 4 * D + (CAUSAL ? TOKENS : 0));
    static constexpr int EXCHANGE = WARPS * M * 32;
    // gamma and beta, token_eta, means of w1 and b1; sums for d_ln_weight, d_ln_bias, d_token_eta.
    static constexpr int SUMS = PASS == FORWARD ? 0 : (READERS + 1) * 8 * D + (GROUPS * M + WARPS + 3) / 4 * 16;
    static constexpr int FIXED = 8 * D + 4 * M + 4 * D + 16 + SUMS;
    static constexpr int BYTES = FIXED + 2 * EXCHANGE + 16 * M + GROUPS * (STAGES * STAGE + SLOTS * SLOT);
    // Where one team reads every mini-batch, the recurrence waits for tokens when it starts on one, and for the slot when
    // it fills it. Else both are one barrier: while a team reads, the recurrence is at another one's mini-batches.
    static constexpr bool APART = GROUPS == 1 && STAGES >= SLOTS + 2;
    static constexpr int AHEAD = APART ? STAGES - SLOTS - 2 : STAGES - 2 * SLOTS;  // turns that may still be on their way
    static_assert(AHEAD >= 0, "tokens come a turn before they are needed");
    static_assert(2 + (APART ? 2 + 2 * SLOTS : 2 * GROUPS * SLOTS) <= 16, "there are 16 named barriers");

    unsigned char* shared;
    TTT_INLINE float4* ln() const { return reinterpret_cast<float4*>(shared); }  // gamma, gamma, beta, beta
    TTT_INLINE float* token_eta() const { return reinterpret_cast<float*>(shared + 8 * D); }
    TTT_INLINE float* mean() const { return token_eta() + M; }  // of w1 over e, D of them, and of b1
    TTT_INLINE float* eps() const { return mean() + D + 1; }
    TTT_INLINE float* ln_sums(int reader) const { return mean() + D + 4 + reader * 2 * D; }  // the last: the recurrence's
    TTT_INLINE float* eta_sums() const { return ln_sums(READERS + 1); }
    TTT_INLINE float4* exchange(int i) const { return reinterpret_cast<float4*>(shared + FIXED + i * EXCHANGE); }
    TTT_INLINE float4* of_tokens() const { return exchange(2); }

    TTT_INLINE unsigned char* stage(int i) const { return shared + FIXED + 2 * EXCHANGE + 16 * M + i * STAGE; }
    TTT_INLINE Tile<T, D> tokens(int i, int which) const { return {reinterpret_cast<T*>(stage(i) + which * TOKENS)}; }
    TTT_INLINE Tile<T, D> xq(int i) const { return tokens(i, 0); }
    TTT_INLINE Tile<T, D> xk(int i) const { return tokens(i, 1); }
    TTT_INLINE Tile<T, D> xv(int i) const { return tokens(i, 2); }
    TTT_INLINE Tile<T, D> d_out(int i) const { return tokens(i, 3); }
    TTT_INLINE Tile<T, D> d_z1_bar(int i) const { return tokens(i, 3); }
    TTT_INLINE float* lr(int i) const {
        return reinterpret_cast<float*>(stage(i) + (PASS == FORWARD ? 3 : 4) * TOKENS);
    }
    TTT_INLINE float4* kept(int i) const { return reinterpret_cast<float4*>(lr(i) + M); }      // two of each token
    TTT_INLINE float4* x_hat(int i) const { return kept(i) + 2 * M; }
    TTT_INLINE Tile<T, M> scores(int i) const { return {reinterpret_cast<T*>(x_hat(i) + M * D / 4)}; }
    TTT_INLINE Tile<T, M> d_attn(int i) const { return {scores(i).p + PAIRS / 2}; }

    TTT_INLINE unsigned char* slot(int i) const { return stage(GROUPS * STAGES) + i * SLOT; }
    TTT_INLINE Tile<T, D> w(int i) const { return {reinterpret_cast<T*>(slot(i))}; }  // w1^T, or d_w1^T
    TTT_INLINE Tile<T, D> g(int i) const { return {reinterpret_cast<T*>(slot(i) + tile_bytes<D, D>)}; }
    TTT_INLINE Tile<T, D> d_z1(int i) const { return {g(i).p + TOKENS / 2}; }
    TTT_INLINE Tile<T, D> d_xv(int i) const { return {g(i).p + TOKENS}; }
    TTT_INLINE float* b(int i) const { return reinterpret_cast<float*>(slot(i) + SLOT - 4 * D); }

    // Named barriers: among the recurrence's warps; the tokens have come (and the slot is free); it is free; it is full.
    static constexpr int BETWEEN = 1;
    TTT_INLINE static int come(int turn, int slot) { return APART ? 2 + turn % 2 : 2 + slot; }
    TTT_INLINE static int free(int slot) { return 4 + slot; }
    TTT_INLINE static int full(int slot) { return (APART ? 4 : 2) + GROUPS * SLOTS + slot; }
    // The recurrence's side: before it reads tokens, before it fills a slot, when it has.
    TTT_INLINE static void wait_for_tokens(int n, int slot) { named_sync(come(n, slot), HAND_OVER); }
    TTT_INLINE static void wait_for_slot(int n, int slot) {
        if (APART && n >= SLOTS) named_sync(free(slot), HAND_OVER);
    }
    TTT_INLINE static void hand_over(int slot) { named_arrive(full(slot), HAND_OVER); }
};

// A counter through the slots and stages of all teams, mini-batch by mini-batch.
template <typename P> struct Place {
    int group = 0, in_slots = 0, in_stages = 0;
    TTT_INLINE int slot() const { return group * P::SLOTS + in_slots; }
    TTT_INLINE int stage() const { return group * P::STAGES + in_stages; }
    TTT_INLINE void next_turn() {
        in_slots = in_slots + 1 == P::SLOTS ? 0 : in_slots + 1;
        in_stages = in_stages + 1 == P::STAGES ? 0 : in_stages + 1;
    }
    TTT_INLINE void next() {
        if (++group == P::GROUPS) {
            group = 0;
            next_turn();
        }
    }
};

// s [16, 16] = x rows^T, with the 16 rows from `row`.
template <typename T, int D>
TTT_INLINE void product_16(float (&s)[2][4], const uint32_t (&x)[D / 16][4], const Tile<T, D>& rows, int row) {
#pragma unroll
    for (int i = 0; i < 4; i++) s[0][i] = s[1][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t r[4];
        ldmatrix_x4(r, rows.by_rows(row, 16 * k));
        mma<T>(s[0], x[k], r[0], r[1]);
        mma<T>(s[1], x[k], r[2], r[3]);
    }
}

TTT_INLINE void sum_over_rows(float (&part)[2][2]) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) part[i / 2][i % 2] += shuffle_xor(part[i / 2][i % 2], mask);
}

// Fast weights of one warp: w1^T [16 e, D] as accumulators, and rounded; b1 of the four columns e that a lane has in
// accumulators [16 tokens, 16 e], which are 8 h + column_in_tile() + j from the warp's first.
template <typename P> struct Weights {
    float w[P::D / 8][4], b[2][2];
    uint32_t rounded[P::D / 8][2];

    TTT_INLINE void round() {
#pragma unroll
        for (int j = 0; j < P::D / 8; j++) {
            rounded[j][0] = pack<typename P::T>(w[j][0] / P::SCALE, w[j][1] / P::SCALE);
            rounded[j][1] = pack<typename P::T>(w[j][2] / P::SCALE, w[j][3] / P::SCALE);
        }
    }

    // From and to w1 [D, D] and b1 [D] of a chain, whose means over e are `mean` [D + 1].
    TTT_INLINE void load(const float* w1, const float* b1, const float* mean, int first) {
        const int g = row_in_tile(), t = column_in_tile();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int d = 8 * j + t + i % 2, e = first + g + i / 2 * 8;
                w[j][i] = (w1[d * P::D + e] - mean[d]) * P::SCALE;
            }
        each_bias([&](int h, int j, int e) { b[h][j] = (b1[first + e] - mean[P::D]) * P::SCALE; });
    }
    TTT_INLINE void store(float* w1, float* b1, const float* mean, int first) const {
        const int g = row_in_tile(), t = column_in_tile();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int d = 8 * j + t + i % 2, e = first + g + i / 2 * 8;
                w1[d * P::D + e] = w[j][i] / P::SCALE + mean[d];
            }
        each_bias([&](int h, int j, int e) { if (g == 0) b1[first + e] = b[h][j] / P::SCALE + mean[P::D]; });
    }

    // From and to memory in the order of the accumulators, D (D + 1) numbers a chain.
    TTT_INLINE void save(float* place, int warp) const {
        float4* mine = reinterpret_cast<float4*>(place) + warp * (P::D / 8) * 32 + lane_id();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++) mine[j * 32] = make_float4(w[j][0], w[j][1], w[j][2], w[j][3]);
        float* bias = place + P::D * P::D + 16 * warp;
        each_bias([&](int h, int j, int e) { if (row_in_tile() == 0) bias[e] = b[h][j]; });
    }
    TTT_INLINE void restore(const float* place, int warp) {
        const float4* mine = reinterpret_cast<const float4*>(place) + warp * (P::D / 8) * 32 + lane_id();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++) {
            const float4 x = mine[j * 32];
            w[j][0] = x.x, w[j][1] = x.y, w[j][2] = x.z, w[j][3] = x.w;
        }
        const float* bias = place + P::D * P::D + 16 * warp;
        each_bias([&](int h, int j, int e) { b[h][j] = bias[e]; });
    }

    // To the readers of a slot, as rows e of w1^T.
    TTT_INLINE void show(const Tile<typename P::T, P::D>& tile, int first) const {
        const int row = first + row_in_tile(), t = column_in_tile();
#pragma unroll
        for (int j = 0; j < P::D / 8; j++) {
            tile.set(row, 8 * j + t, rounded[j][0]);
            tile.set(row + 8, 8 * j + t, rounded[j][1]);
        }
    }
    TTT_INLINE void show(const Tile<typename P::T, P::D>& tile, float* bias, int first) const {
        show(tile, first);
        each_bias([&](int h, int j, int e) { if (row_in_tile() == 0) bias[first + e] = b[h][j] / P::SCALE; });
    }

    // w1^T += a x, where `a` [16 e, 16 tokens] is an A operand, and x the tokens from `token` on.
    TTT_INLINE void add(const uint32_t (&a)[4], const Tile<typename P::T, P::D>& x, int token) {
        using T = typename P::T;
#pragma unroll
        for (int j = 0; j < P::D / 8; j += 2) {
            uint32_t pair[4];
            ldmatrix_x4_trans(pair, x.by_columns(token, 8 * j));
            mma<T>(w[j], a, pair[0], pair[1]);
            mma<T>(w[j + 1], a, pair[2], pair[3]);
        }
    }
    // The same with rounded accumulators [16 tokens, 16 e], `g` [column half][row half], transposed.
    TTT_INLINE void add(const uint32_t (&g)[2][2], const Tile<typename P::T, P::D>& x, int token) {
        const uint32_t a[4] = {movmatrix(g[0][0]), movmatrix(g[1][0]), movmatrix(g[0][1]), movmatrix(g[1][1])};
        add(a, x, token);
    }
    // And with rows of a tile, [16 tokens, 16 e], transposed.
    TTT_INLINE void add(const Tile<typename P::T, P::D>& g, int first, const Tile<typename P::T, P::D>& x, int token) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, g.by_rows(token, first));
        add(a, x, token);
    }
    // b1 += the sums over all lanes' rows of `part`, in fp32: where xk is small, z1 is b1.
    TTT_INLINE void add_bias(float (&part)[2][2]) {
        sum_over_rows(part);
        each_bias([&](int h, int j, int) { b[h][j] += part[h][j]; });
    }

  private:
    template <typename Each> TTT_INLINE static void each_bias(Each each) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 2; j++) each(h, j, 8 * h + column_in_tile() + j);
    }
};

// Sums of `N` values over the columns of a warp's tile, `values` [row half][N]: each step leaves a lane half of them.
// Then lane 4g + 2r + i has those of row g + 8r, and of their two halves the i-th.
template <int N> TTT_INLINE void sum_columns(const float (&values)[2][2 * N], float (&half)[N]) {
    const bool low = lane_id() & 2, second = lane_id() & 1;
    float row[2 * N];
#pragma unroll
    for (int i = 0; i < 2 * N; i++)
        row[i] = (low ? values[1][i] : values[0][i]) + shuffle_xor(low ? values[0][i] : values[1][i], 2);
#pragma unroll
    for (int i = 0; i < N; i++)
        half[i] = (second ? row[i + N] : row[i]) + shuffle_xor(second ? row[i] : row[i + N], 1);
}

// sums += sums over the rows of a tile of 8 `N` values: lane 4l + i gets the l-th `N` of those that quads' lanes i have.
template <int N> TTT_INLINE void add_rows(const float (&values)[8 * N], float (&sums)[N]) {
    const bool first = lane_id() & 16, second = lane_id() & 8, third = lane_id() & 4;
    float x[4 * N], y[2 * N];
#pragma unroll
    for (int i = 0; i < 4 * N; i++)
        x[i] = (first ? values[i + 4 * N] : values[i]) + shuffle_xor(first ? values[i] : values[i + 4 * N], 16);
#pragma unroll
    for (int i = 0; i < 2 * N; i++)
        y[i] = (second ? x[i + 2 * N] : x[i]) + shuffle_xor(second ? x[i] : x[i + 2 * N], 8);
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] += (third ? y[i + N] : y[i]) + shuffle_xor(third ? y[i] : y[i + N], 4);
}

// Six sums of each token over all D columns: put down by every warp for its own columns ...
template <typename P>
TTT_INLINE void put_sums(float4* exchange, int warp, int tile, const float (&values)[2][6]) {
    float half[3];
    sum_columns(values, half);
    const int lane = lane_id(), token = 16 * tile + row_in_tile() + (lane & 2 ? 8 : 0);
    exchange[(warp * P::M + token) * 2 + (lane & 1)] = make_float4(half[0], half[1], half[2], 0.0f);
}
// ... and added up, after a barrier, by lanes 2i and 2i + 1 for token i of the tile.
template <typename P> TTT_INLINE void get_sums(const float4* exchange, int tile, float (&sums)[6]) {
    float4 own = exchange[32 * tile + lane_id()];
#pragma unroll
    for (int i = 1; i < P::WARPS; i++) {
        const float4 part = exchange[2 * i * P::M + 32 * tile + lane_id()];
        own.x += part.x, own.y += part.y, own.z += part.z;
    }
    const float4 other = make_float4(shuffle_xor(own.x, 1), shuffle_xor(own.y, 1), shuffle_xor(own.z, 1), 0.0f);
    const bool second = lane_id() & 1;
    sums[0] = second ? other.x : own.x, sums[3] = second ? own.x : other.x;
    sums[1] = second ? other.y : own.y, sums[4] = second ? own.y : other.y;
    sums[2] = second ? other.z : own.z, sums[5] = second ? own.z : other.z;
}

// What follows from a token's sums, four numbers of `work_out(tile)` by lanes 2i and 2i + 1, for every warp's accumulators:
// each warp works out a tile for itself, or, where there are many, its share of them for all.
template <typename P, typename WorkOut> struct OfTokens {
    static constexpr bool SHARED = P::TILES >= 4;
    const P& at;
    WorkOut work_out;
    TTT_INLINE OfTokens(const P& at, int warp, WorkOut work_out) : at(at), work_out(work_out) {
        if (!SHARED) return;
        for (int m = warp; m < P::TILES; m += P::WARPS) {
            const float4 mine = work_out(m);
            if (lane_id() % 2 == 0) at.of_tokens()[16 * m + lane_id() / 2] = mine;
        }
        named_sync(P::BETWEEN, 32 * P::WARPS);
    }
    // Of rows g and g + 8 of a tile.
    TTT_INLINE void get(int tile, float4 (&of)[2]) const {
        if (SHARED) {
            of[0] = at.of_tokens()[16 * tile + row_in_tile()];
            of[1] = at.of_tokens()[16 * tile + row_in_tile() + 8];
            return;
        }
        const float4 mine = work_out(tile);
        const int from = 2 * row_in_tile();
#pragma unroll
        for (int r = 0; r < 2; r++)
            of[r] = make_float4(shuffle(mine.x, from + 16 * r), shuffle(mine.y, from + 16 * r),
                                shuffle(mine.z, from + 16 * r), shuffle(mine.w, from + 16 * r));
    }
};

// gamma and beta of the four columns that a lane has in its warp's accumulators [16 tokens, 16 e].
template <typename P> struct Columns {
    float gamma[2][2], beta[2][2], mean_gamma_squared = 0.0f;
    TTT_INLINE Columns(const P& at, int first) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float4 ln = at.ln()[(first + 8 * h + column_in_tile()) / 2];
            gamma[h][0] = ln.x, gamma[h][1] = ln.y, beta[h][0] = ln.z, beta[h][1] = ln.w;
        }
        for (int j = 0; j < P::D / 2; j++) {
            const float4 ln = at.ln()[j];
            mean_gamma_squared += ln.x * ln.x + ln.y * ln.y;
        }
        mean_gamma_squared /= P::D;
    }
    // beta - target of a tile's accumulators, where target = xv - xk.
    TTT_INLINE void less_target(const P& at, int stage, int tile, int first, float (&x)[2][4]) const {
        uint32_t k4[4], v4[4];
        ldmatrix_x4(k4, at.xk(stage).by_columns(16 * tile, first));
        ldmatrix_x4(v4, at.xv(stage).by_columns(16 * tile, first));
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 k = unpack<typename P::T>(k4[2 * h + r]), v = unpack<typename P::T>(v4[2 * h + r]);
                x[h][2 * r] = beta[h][0] - (v.x - k.x);
                x[h][2 * r + 1] = beta[h][1] - (v.y - k.y);
            }
    }
};

// xk of a mini-batch, as A operands of one tile; where there is only one, loaded before the weights are there.
template <typename P> struct Operand {
    uint32_t x[P::D / 16][4];
    TTT_INLINE void load(const Tile<typename P::T, P::D>& xk, int tile) {
#pragma unroll
        for (int k = 0; k < P::D / 16; k++) ldmatrix_x4(x[k], xk.by_columns(16 * tile, 16 * k));
    }
};

// z = xk w of a warp's columns [16 tokens, 16 e], for every tile; `first` is the first tile's operand.
template <typename P>
TTT_INLINE void through(const Weights<P>& weights, const Tile<typename P::T, P::D>& xk, Operand<P>& first,
                        float (&z)[P::TILES][2][4]) {
    using T = typename P::T;
#pragma unroll
    for (int m = 0; m < P::TILES; m++) {
        if (m > 0) first.load(xk, m);
        float odd[2][4] = {};  // where there is one tile, two sums that do not wait for each other
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) z[m][h][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < P::D / 16; k++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                mma<T>(P::TILES == 1 && k % 2 ? odd[h] : z[m][h], first.x[k], weights.rounded[2 * k][h],
                       weights.rounded[2 * k + 1][h]);
        if (P::TILES == 1)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) z[m][h][i] += odd[h][i];
    }
}

// The inner gradient in the accumulators of one warp, from z1 and rest = beta - target of a tile. With
// p = gamma (gamma x_hat + rest) and x_hat = z1 rstd - shift, g_z1 = rstd (p - mean(p) - x_hat along), where along is
// mean(p x_hat): all its means follow from six sums over z1 and rest, which cross the warps together.
template <typename P> struct Gradient {
    using T = typename P::T;
    static constexpr int D = P::D;
    const P& at;
    const int warp, first;
    const float eps, to_step;
    const Columns<P> columns;
    float gamma_squared[2][2];
    float bias[2][2] = {};  // what the mini-batch adds to b1, still to be summed over lanes

    TTT_INLINE Gradient(const P& at, int warp)
        : at(at), warp(warp), first(16 * warp), eps(*at.eps()), to_step(-P::SCALE * at.token_eta()[P::M - 1]),
          columns(at, first) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 2; j++) gamma_squared[h][j] = columns.gamma[h][j] * columns.gamma[h][j];
    }

    // Sums over this warp's columns of z1, z1^2, gamma u, u^2, rest u and gamma rest, with u = gamma z1.
    TTT_INLINE void put(float4* exchange, int tile, const float (&z)[2][4], const float (&rest)[2][4]) const {
        float sums[2][6];
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float gamma = columns.gamma[h][i % 2], x = z[h][i], u = gamma * x;
                float(&of)[6] = sums[i / 2];
                const bool start = h == 0 && i % 2 == 0;
                of[0] = start ? x : of[0] + x;
                of[1] = start ? x * x : of[1] + x * x;
                of[2] = start ? gamma * u : of[2] + gamma * u;
                of[3] = start ? u * u : of[3] + u * u;
                of[4] = start ? rest[h][i] * u : of[4] + rest[h][i] * u;
                of[5] = start ? rest[h][i] * gamma : of[5] + rest[h][i] * gamma;
            }
        put_sums<P>(exchange, warp, tile, sums);
    }

    // rstd, shift, mean(p) and along of token lane / 2 of the tile.
    template <typename Keep> TTT_INLINE float4 work_out(const float4* exchange, int n, int tile, const Keep& keep) const {
        float sums[6];
        get_sums<P>(exchange, tile, sums);
        const float mean = sums[0] / D, mean_u = sums[2] / D, mean_rest = sums[5] / D;
        const float rstd = rsqrt(max(sums[1] / D - mean * mean, 0.0f) + eps);
        const float along_x = rstd * (mean_u - mean * columns.mean_gamma_squared);  // mean(gamma^2 x_hat)
        const float along_x2 = rstd * rstd *                                        // mean(gamma^2 x_hat^2)
            (sums[3] / D - 2.0f * mean * mean_u + mean * mean * columns.mean_gamma_squared);
        const float4 of = make_float4(rstd, mean * rstd, along_x + mean_rest,
                                      along_x2 + rstd * (sums[4] / D - mean * mean_rest));
        keep.token(n, warp, tile, of, along_x, along_x2);
        return of;
    }

    // Rounded -SCALE eta_last lr g_z1, for the update, and g_z1, for readers: [column half][row half].
    template <typename Keep>
    TTT_INLINE void finish(const float4 (&of)[2], const float* lr, int n, int tile, const float (&z)[2][4],
                           const float (&rest)[2][4], uint32_t (&step)[2][2], uint32_t (&seen)[2][2], const Keep& keep) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float factor = to_step * lr[16 * tile + row_in_tile() + 8 * r], rstd = of[r].x;
            float x_hat[2][2], g[2][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    x_hat[h][j] = z[h][2 * r + j] * rstd - of[r].y;
                    const float p = columns.gamma[h][j] * rest[h][2 * r + j] - of[r].z;  // less gamma^2 x_hat
                    g[h][j] = rstd * (p + x_hat[h][j] * (gamma_squared[h][j] - of[r].w));
                    bias[h][j] = tile == 0 && r == 0 ? factor * g[h][j] : bias[h][j] + factor * g[h][j];
                }
                step[h][r] = pack<T>(factor * g[h][0], factor * g[h][1]);
                seen[h][r] = pack<T>(g[h][0], g[h][1]);
            }
            keep.x_hat(n, warp, tile, r, x_hat);
        }
    }

    TTT_INLINE void show(const Tile<T, D>& to, int tile, const uint32_t (&seen)[2][2]) const {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                to.set(16 * tile + row_in_tile() + 8 * r, first + 8 * h + column_in_tile(), seen[h][r]);
    }
};

template <typename P> TTT_INLINE void add_bias(float (&z)[2][4], const Weights<P>& weights) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) z[h][i] += weights.b[h][i % 2] / P::SCALE;
}

// The chain of mini-batches, by one of its warps: (w1, b1) -> z1 -> g_z1 -> (w1', b1'). `keep` may write down what passes.
template <typename P, typename Keep>
TTT_INLINE void recurrence(const P& at, Weights<P>& weights, int warp, int mini_batches, Keep& keep) {
    using T = typename P::T;
    constexpr int TILES = P::TILES;
    Gradient<P> gradient(at, warp);
    Place<P> place;
    for (int n = 0; n < mini_batches; n++, place.next()) {
        const int slot = place.slot(), stage = place.stage();
        const Tile<T, P::D> xk = at.xk(stage);
        float4* exchange = at.exchange(n & 1);
        P::wait_for_tokens(n, slot);
        Operand<P> x;  // all that does not wait for the weights comes before them
        x.load(xk, 0);
        float z[TILES][2][4], rest[TILES][2][4];
#pragma unroll
        for (int m = 0; m < TILES; m++) gradient.columns.less_target(at, stage, m, gradient.first, rest[m]);
        weights.round();
        through(weights, xk, x, z);
        if (P::CAUSAL) weights.add_bias(gradient.bias);
        keep.start(n, weights, warp);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            add_bias(z[m], weights);
            gradient.put(exchange, m, z[m], rest[m]);
        }
        named_sync(P::BETWEEN, 32 * P::WARPS);
        P::wait_for_slot(n, slot);
        if (P::CAUSAL) weights.show(at.w(slot), at.b(slot), gradient.first);

        auto work_out = [&](int m) { return gradient.work_out(exchange, n, m, keep); };
        const OfTokens<P, decltype(work_out)> of_tokens(at, warp, work_out);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            float4 of[2];
            of_tokens.get(m, of);
            uint32_t step[2][2], seen[2][2];
            gradient.finish(of, at.lr(stage), n, m, z[m], rest[m], step, seen, keep);
            weights.add(step, xk, 16 * m);
            if (P::CAUSAL) gradient.show(at.g(slot), m, seen);
        }
        if (!P::CAUSAL) {
            weights.add_bias(gradient.bias);
            weights.round();
            weights.show(at.w(slot), at.b(slot), gradient.first);
        }
        P::hand_over(slot);
    }
    if (P::CAUSAL) weights.add_bias(gradient.bias);
}

// The same for causal mini-batches of 16 tokens, with less on the way from one to the next: as
//   z1_{n+1} = xk_{n+1} w1_{n+1} + b1_{n+1} = xk_{n+1} w1_n - (xk_{n+1} xk_n^T) (eta_last lr g_z1_n) + b1_{n+1},
// one product follows g_z1_n; the update of w1, its rounding and xk_{n+1} w1_n come a mini-batch later, and fill the time
// that sums take to cross the warps. lm-1.3b-long: 1.79 -> 1.63 ms.
template <typename P, typename Keep>
TTT_INLINE void recurrence_ahead(const P& at, Weights<P>& weights, int warp, int mini_batches, Keep& keep) {
    using T = typename P::T;
    constexpr int D = P::D;
    static_assert(P::CAUSAL && P::TILES == 1, "a slot is filled before the weights are updated, and by one tile");
    static_assert(P::APART || P::GROUPS * P::SLOTS > 1, "the next tokens come before a slot is full");
    Gradient<P> gradient(at, warp);
    Place<P> place;
    uint32_t step_before[4] = {};  // -(eta_last lr g_z1)^T of the mini-batch before, an A operand
    Tile<T, D> before = at.xk(0);
    float z[1][2][4], rest[2][4];
    Operand<P> x;
    P::wait_for_tokens(0, 0);
    x.load(before, 0);
    gradient.columns.less_target(at, 0, 0, gradient.first, rest);
    weights.round();
    through(weights, before, x, z);
    add_bias(z[0], weights);

    for (int n = 0; n < mini_batches; n++) {
        const int slot = place.slot(), stage = place.stage();
        const Tile<T, D> xk = at.xk(stage);
        float4* exchange = at.exchange(n & 1);
        gradient.put(exchange, 0, z[0], rest);
        weights.add(step_before, before, 0);
        named_sync(P::BETWEEN, 32 * P::WARPS);

        // What does not wait for this mini-batch's gradient; at the last one, for nothing.
        place.next();
        const bool more = n + 1 < mini_batches;
        if (more) P::wait_for_tokens(n + 1, place.slot());
        const int next = more ? place.stage() : stage;
        x.load(at.xk(next), 0);
        weights.round();
        float base[1][2][4], attn[2][4], next_rest[2][4];
        through(weights, before, x, base);
        product_16(attn, x.x, xk, 0);
        uint32_t keys[4];  // xk_{n+1} xk_n^T
#pragma unroll
        for (int i = 0; i < 4; i++) keys[i] = pack<T>(attn[i / 2][i % 2 * 2], attn[i / 2][i % 2 * 2 + 1]);
        gradient.columns.less_target(at, next, 0, gradient.first, next_rest);
        P::wait_for_slot(n, slot);
        weights.show(at.w(slot), at.b(slot), gradient.first);

        auto work_out = [&](int m) { return gradient.work_out(exchange, n, m, keep); };
        const OfTokens<P, decltype(work_out)> of_tokens(at, warp, work_out);
        float4 of[2];
        of_tokens.get(0, of);
        uint32_t step[2][2], seen[2][2];
        gradient.finish(of, at.lr(stage), n, 0, z[0], rest, step, seen, keep);
#pragma unroll
        for (int i = 0; i < 4; i++) step_before[i] = movmatrix(step[i % 2][i / 2]);
        float rise[2][4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) mma<T>(rise[h], keys, step_before[h], step_before[2 + h]);
        sum_over_rows(gradient.bias);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                z[0][h][i] = base[0][h][i] + (rise[h][i] + (weights.b[h][i % 2] + gradient.bias[h][i % 2])) / P::SCALE;
                rest[h][i] = next_rest[h][i];
            }
        gradient.show(at.g(slot), 0, seen);
        P::hand_over(slot);
        keep.start(n, weights, warp);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < 2; j++) weights.b[h][j] += gradient.bias[h][j];
        before = xk;
    }
    weights.add(step_before, before, 0);
}

// More than 8 warps have 168 registers a thread, in which the second one spills.
template <typename P, typename Keep>
TTT_INLINE void run_recurrence(const P& at, Weights<P>& weights, int warp, int mini_batches, Keep& keep) {
    if constexpr (P::CAUSAL && P::TILES == 1 && P::THREADS <= 256)
        recurrence_ahead(at, weights, warp, mini_batches, keep);
    else
        recurrence(at, weights, warp, mini_batches, keep);
}

// Puts what all mini-batches share into shared memory: gamma, beta, token_eta and eps.
template <typename P>
TTT_INLINE void load_shared(const P& at, const float* ln_weight, const float* ln_bias, const float* token_eta, double eps) {
    if (threadIdx.x == 0) *at.eps() = float(eps);
    for (int i = threadIdx.x; i < P::D / 2; i += P::THREADS)
        at.ln()[i] = make_float4(ln_weight[2 * i], ln_weight[2 * i + 1], ln_bias[2 * i], ln_bias[2 * i + 1]);
    for (int i = threadIdx.x; i < P::M; i += P::THREADS) at.token_eta()[i] = token_eta[i];
}

// 16 rows of D numbers by a warp, of which lane i copies every 32nd 16 bytes.
template <int D, typename Copy> TTT_INLINE void by_chunks(Copy copy) {
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int chunk = lane_id() + 32 * i;
        copy(chunk / (D / 8), chunk % (D / 8) * 8);
    }
}
template <typename T, int D> TTT_INLINE void load_rows(const Tile<T, D>& tile, int row, const T* from, int64_t stride) {
    if constexpr (256 % D == 0) {  // then a lane's columns are the same in every row
        const int r = lane_id() / (D / 8), column = lane_id() % (D / 8) * 8;
        from += r * stride + column;
#pragma unroll
        for (int i = 0; i < D / 16; i++, from += 256 / D * stride)
            copy_async_16(tile.at(row + r + 256 / D * i, column), from);
    } else {
        by_chunks<D>([&](int r, int column) { copy_async_16(tile.at(row + r, column), from + r * stride + column); });
    }
}
template <typename T, int D> TTT_INLINE void store_rows(const Tile<T, D>& tile, int row, T* to, int64_t stride) {
    auto store = [](T* to, const T* from) { *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from); };
    if constexpr (256 % D == 0) {
        const int r = lane_id() / (D / 8), column = lane_id() % (D / 8) * 8;
        to += r * stride + column;
#pragma unroll
        for (int i = 0; i < D / 16; i++, to += 256 / D * stride) store(to, tile.at(row + r + 256 / D * i, column));
    } else {
        by_chunks<D>([&](int r, int column) { store(to + r * stride + column, tile.at(row + r, column)); });
    }
}

template <typename T> struct Rows {  // of one tensor in one chain, from a token on
    T* p;
    int64_t token;
    TTT_INLINE Rows(const View& view, int64_t chain, int64_t heads, int64_t first = 0)
        : p(static_cast<T*>(view.p) + chain / heads * view.batch + chain % heads * view.head + first * view.token),
          token(view.token) {}
    TTT_INLINE T* at(int64_t row) const { return p + row * token; }
};

// A reader's work apart from what it computes: loading tokens ahead, and taking over and giving back slots.
// `work.load(step, stage, row)` issues the copies of 16 tokens, `work.lr(step, row)` gives the lr of one;
// `work.early(stage)` may start on them before the slot is full, and `work.read(step, slot, stage, i, row)` follows.
template <typename P, typename Work> TTT_INLINE void reader(const P& at, int index, int steps, Work& work) {
    const int group = index / P::TEAM, member = index % P::TEAM;
    const int turns = (steps - group + P::GROUPS - 1) / P::GROUPS;
    auto row = [&](int i) { return 16 * (member + P::TEAM * i); };  // first token of this reader's tile i
    auto stage_of = [&](int turn) { return group * P::STAGES + turn % P::STAGES; };
    auto slot_of = [&](int turn) { return group * P::SLOTS + turn % P::SLOTS; };
    auto load = [&](int turn) {
        if (turn < turns)
            for (int i = 0; i < P::TURN / 16; i++) work.load(turn * P::GROUPS + group, stage_of(turn), row(i));
        copy_async_commit();
    };
    const int lr_row = row(lane_id() / 16) + lane_id() % 16;
    auto load_lr = [&](int turn) {
        return lane_id() < P::TURN && turn < turns ? work.lr(turn * P::GROUPS + group, lr_row) : 0.0f;
    };
    auto hand_over = [&](int turn, float lr) {  // the tokens have come
        if (turn >= turns) return;
        if (lane_id() < P::TURN) at.lr(stage_of(turn))[lr_row] = lr;
        named_arrive(P::come(turn, slot_of(turn)), P::HAND_OVER);
    };
    constexpr int LEAD = P::APART ? 1 : P::SLOTS;  // turns that tokens are handed over before
    for (int turn = 0; turn < P::STAGES - P::SLOTS; turn++) load(turn);
    copy_async_wait<P::STAGES - P::SLOTS - LEAD>();
    for (int turn = 0; turn < LEAD; turn++) hand_over(turn, load_lr(turn));

    float lr = load_lr(LEAD);
    for (int turn = 0; turn < turns; turn++) {
        if (P::APART) {
            copy_async_wait<P::AHEAD>();
            hand_over(turn + LEAD, lr);
            lr = load_lr(turn + LEAD + 1);
        }
        if (P::TEAM == 1) {
            sync_warp();  // every lane's copies have come
            work.early(stage_of(turn));
        }
        named_sync(P::full(slot_of(turn)), P::HAND_OVER);
        load(turn - P::SLOTS + P::STAGES);  // all of the team have left turn - SLOTS
        for (int i = 0; i < P::TURN / 16; i++)
            work.read(turn * P::GROUPS + group, slot_of(turn), stage_of(turn), i, row(i));
        if (P::APART) {
            if (turn + P::SLOTS < turns) named_arrive(P::free(slot_of(turn)), P::HAND_OVER);
        } else {
            copy_async_wait<P::AHEAD>();
            hand_over(turn + LEAD, lr);
            lr = load_lr(turn + LEAD + 1);
        }
    }
}

// --- What readers are made of; z [16 tokens, D] are accumulators, x [16, D] and so on A operands ---

template <typename T, int D> TTT_INLINE void load_operand(uint32_t (&x)[D / 16][4], const Tile<T, D>& tile, int row) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) ldmatrix_x4(x[k], tile.by_columns(row, 16 * k));
}

// z += x rows^T, where `rows` are rows [D, D] of a tile.
template <typename T, int D>
TTT_INLINE void add_product(float (&z)[D / 8][4], const uint32_t (&x)[D / 16][4], const Tile<T, D>& rows) {
#pragma unroll
    for (int j = 0; j < D / 16; j++)
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t r[4];
            ldmatrix_x4(r, rows.by_rows(16 * j, 16 * k));
            mma<T>(z[2 * j], x[k], r[0], r[1]);
            mma<T>(z[2 * j + 1], x[k], r[2], r[3]);
        }
}

// z += s rows, with s [16, 16] an A operand and the 16 rows from `row`.
template <typename T, int D>
TTT_INLINE void add_product_16(float (&z)[D / 8][4], const uint32_t (&s)[4], const Tile<T, D>& rows, int row) {
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, rows.by_columns(row, 8 * j));
        mma<T>(z[j], s, r[0], r[1]);
        mma<T>(z[j + 1], s, r[2], r[3]);
    }
}

// z1_bar = xq w1 + b1 - (eta * (tril(xq xk^T) + tril(1))) g_z1 of 16 tokens; not causal, w1 and b1 are the updated ones.
template <typename P> struct ReadOut {
    using T = typename P::T;
    static constexpr int D = P::D;
    const P& at;
    uint32_t xq[D / 16][4];
    float attn[2][4];  // xq xk^T + 1 of 16 tokens and 16 keys

    TTT_INLINE void attend(int stage, int row, int key) {
        product_16(attn, xq, at.xk(stage), key);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = row + row_in_tile() + i / 2 * 8, column = key + 8 * h + column_in_tile() + i % 2;
                attn[h][i] = column <= query ? attn[h][i] + 1.0f : 0.0f;
            }
    }
    TTT_INLINE void early(int stage) {
        load_operand(xq, at.xq(stage), 0);
        if (P::CAUSAL) attend(stage, 0, 0);
    }
    // z becomes x_hat of the read-out's LayerNorm, and rstd its 1 / std, of both rows.
    TTT_INLINE void normalised(int slot, int stage, int row, float (&z)[D / 8][4], float (&rstd)[2]) {
        if (P::TEAM > 1) load_operand(xq, at.xq(stage), row);
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            const float2 b = *reinterpret_cast<const float2*>(at.b(slot) + 8 * j + column_in_tile());
            z[j][0] = z[j][2] = b.x, z[j][1] = z[j][3] = b.y;
        }
        add_product(z, xq, at.w(slot));
        if (P::CAUSAL)
            for (int key = 0; key <= row; key += 16) {
                if (P::TEAM > 1) attend(stage, row, key);
                const float *eta = at.token_eta() + row + row_in_tile(), *lr = at.lr(stage) + key + column_in_tile();
                uint32_t scores[4];
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        scores[2 * h + r] = pack<T>(-eta[8 * r] * lr[8 * h] * attn[h][2 * r],
                                                    -eta[8 * r] * lr[8 * h + 1] * attn[h][2 * r + 1]);
                add_product_16(z, scores, at.g(slot), key);
            }
        // A row is in the four lanes of a quad.
        float mean[2] = {};
        rstd[0] = rstd[1] = 0.0f;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) mean[i / 2] += z[j][i];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            mean[r] += shuffle_xor(mean[r], 1);
            mean[r] = (mean[r] + shuffle_xor(mean[r], 2)) / D;
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                z[j][i] -= mean[i / 2];
                rstd[i / 2] += z[j][i] * z[j][i];
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            rstd[r] += shuffle_xor(rstd[r], 1);
            rstd[r] = rsqrt((rstd[r] + shuffle_xor(rstd[r], 2)) / D + *at.eps());
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) z[j][i] *= rstd[i / 2];
    }
};

// Accumulators [16, D] to memory, over rows of a tile that nobody else needs, so that they leave 16 bytes at a time.
template <typename T, int D>
TTT_INLINE void store_accumulators(const float (&z)[D / 8][4], const Tile<T, D>& tile, int row, T* to, int64_t stride) {
    sync_warp();
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            tile.set(row + row_in_tile() + 8 * r, 8 * j + column_in_tile(), pack<T>(z[j][2 * r], z[j][2 * r + 1]));
    sync_warp();
    store_rows(tile, row, to, stride);
    sync_warp();
}

}  // namespace ttt
