// Sums over the columns of a warp's tile, and across the warps of TTT-Linear's recurrence.
#pragma once
#include "linear_plan.cuh"

namespace ttt {

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

}  // namespace ttt
