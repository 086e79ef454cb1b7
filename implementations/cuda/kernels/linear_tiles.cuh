// What TTT-Linear's tensor-core kernels do with tiles of tokens and weights: rows in shared memory, products with them,
// and their way from and to memory.
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

// z [16 tokens, D] are accumulators, x [16, D] and so on A operands.
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

template <typename T> struct Rows {  // of one tensor in one chain, from a token on
    T* p;
    int64_t token;
    TTT_INLINE Rows(const View& view, int64_t chain, int64_t heads, int64_t first = 0)
        : p(static_cast<T*>(view.p) + chain / heads * view.batch + chain % heads * view.head + first * view.token),
          token(view.token) {}
    TTT_INLINE T* at(int64_t row) const { return p + row * token; }
};

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
