// The fast weights of TTT-Linear in the registers of the recurrence's warps, and products with them.
#pragma once
#include "linear_plan.cuh"

namespace ttt {

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

template <typename P> TTT_INLINE void add_bias(float (&z)[2][4], const Weights<P>& weights) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) z[h][i] += weights.b[h][i % 2] / P::SCALE;
}

}  // namespace ttt
