// What the plain kernels are made of: tiles of fp32 numbers, products of them by FMA, and LayerNorm a warp for a row.
#pragma once

#include "device.cuh"

namespace ttt {
namespace plain {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int SHARED_FLOATS = TTT_SHARED_BYTES / 4;  // as many as the card has, or all tiles need

// A tensor with a token axis, any strides, D innermost.
template <typename T> struct View {
    T* p;
    int64_t b, t, h;
    TTT_INLINE T* token(int64_t batch, int64_t head, int64_t token) const { return p + batch * b + head * h + token * t; }
};

// The number as a product takes it: rounded to the dtype of the problem.
template <typename T> TTT_INLINE float rounded(float x) { return to_float(from_float<T>(x)); }

// --- Tiles: in shared memory while there is room, then in the chain's scratch, which the L2 cache holds ---

// A column more than it holds, so that neither a row nor a column lies in one bank.
template <int WIDTH> struct Tile {
    float* p;
    TTT_INLINE float& operator()(int i, int j) const { return p[i * (WIDTH + 1) + j]; }
    TTT_INLINE float* row(int i) const { return p + i * (WIDTH + 1); }
};
template <int WIDTH> struct Transposed {
    Tile<WIDTH> tile;
    TTT_INLINE float& operator()(int i, int j) const { return tile(j, i); }
};
template <int WIDTH> TTT_INLINE Transposed<WIDTH> transpose(Tile<WIDTH> tile) { return {tile}; }

struct Arena {
    float *shared, *scratch;
    int room = SHARED_FLOATS;
    TTT_INLINE float* take(int size) {
        float*& from = size <= room ? shared : scratch;
        if (size <= room) room -= size;
        from += size;
        return from - size;
    }
    template <int ROWS, int WIDTH> TTT_INLINE Tile<WIDTH> tile() { return {take(ROWS * (WIDTH + 1))}; }
};

template <int ROWS, int D, typename T> TTT_INLINE void load(Tile<D> tile, const T* p, int64_t stride) {
    for (int at = threadIdx.x; at < ROWS * D; at += THREADS) tile(at / D, at % D) = to_float(p[at / D * stride + at % D]);
}

// The weights as products take them; and as they are to `keep`, if that is not null.
template <typename T, int ROWS, int WIDTH> TTT_INLINE void load_weights(Tile<WIDTH> tile, const float* p, float* keep) {
    for (int at = threadIdx.x; at < ROWS * WIDTH; at += THREADS) {
        tile(at / WIDTH, at % WIDTH) = rounded<T>(p[at]);
        if (keep) keep[at] = p[at];
    }
}
template <int WIDTH> TTT_INLINE void load_bias(float* row, const float* p, float* keep) {
    for (int j = threadIdx.x; j < WIDTH; j += THREADS) {
        row[j] = p[j];
        if (keep) keep[j] = p[j];
    }
}

// --- Products ---

// A thread's SIDE x SIDE numbers of a product: rows that follow each other, and columns COLUMNS / SIDE apart, so that
// the threads of a warp read one row of b side by side.
template <int ROWS, int COLUMNS> struct Part {
    static constexpr int SIDE = ROWS * COLUMNS >= 16 * THREADS ? 4 : 2;
    static constexpr int STEP = COLUMNS / SIDE, COUNT = ROWS / SIDE * STEP;
    int i0, j0;
    float sum[SIDE][SIDE];

    // += a b, a sum of K terms, 16 at a time for the sake of fp32; a and b are called with their indices.
    template <int K, typename A, typename B> TTT_INLINE void add(const A& a, const B& b) {
#pragma unroll 1
        for (int first = 0; first < K; first += 16) {
            float some[SIDE][SIDE] = {};
#pragma unroll 4
            for (int k = first; k < min(first + 16, K); k++) {
                float r_a[SIDE], r_b[SIDE];
                for (int u = 0; u < SIDE; u++) r_a[u] = a(i0 + u, k);
                for (int v = 0; v < SIDE; v++) r_b[v] = b(k, j0 + v * STEP);
                for (int u = 0; u < SIDE; u++)
                    for (int v = 0; v < SIDE; v++) some[u][v] += r_a[u] * r_b[v];
            }
            for (int u = 0; u < SIDE; u++)
                for (int v = 0; v < SIDE; v++) sum[u][v] += some[u][v];
        }
    }
    TTT_INLINE void scale(float factor) {
        scale_rows([&](int) { return factor; });
    }
    template <typename F> TTT_INLINE void scale_rows(F factor) {
        for (int u = 0; u < SIDE; u++)
            for (int v = 0; v < SIDE; v++) sum[u][v] *= factor(i0 + u);
    }
    template <typename F> TTT_INLINE void each(F f) const {
        for (int u = 0; u < SIDE; u++)
            for (int v = 0; v < SIDE; v++) f(i0 + u, j0 + v * STEP, sum[u][v]);
    }
};

// body(part) for this thread's parts of a matrix [ROWS COLUMNS].
template <int ROWS, int COLUMNS, typename F> TTT_INLINE void product(F body) {
    using P = Part<ROWS, COLUMNS>;
    static_assert(ROWS % P::SIDE == 0 && COLUMNS % P::SIDE == 0, "a multiple of SIDE");
    for (int at = threadIdx.x; at < P::COUNT; at += THREADS) {
        P part{at / P::STEP * P::SIDE, at % P::STEP, {}};
        body(part);
    }
}

// --- Columns: sums over tokens, and the rounding that has to come after them ---

// The sum of the ROWS numbers of a column, each times its row's factor; they are rounded after.
template <typename T, int ROWS, int WIDTH, typename F>
TTT_INLINE float sum_and_round(Tile<WIDTH> tile, int j, F factor) {
    float sum = 0;
    for (int i = 0; i < ROWS; i++) {
        sum += factor(i) * tile(i, j);
        tile(i, j) = rounded<T>(tile(i, j));
    }
    return sum;
}
template <typename T, int ROWS, int WIDTH> TTT_INLINE float sum_and_round(Tile<WIDTH> tile, int j) {
    return sum_and_round<T, ROWS>(tile, j, [](int) { return 1.0f; });
}

// --- Rows: each of a warp's lanes has every 32nd number of a token ---

template <int ROWS, typename F> TTT_INLINE void for_rows(F f) {
    for (int i = threadIdx.x / 32; i < ROWS; i += WARPS) f(i);
}
template <int WIDTH, typename F> TTT_INLINE void for_lane(F f) {
    for (int d = threadIdx.x % 32; d < WIDTH; d += 32) f(d);
}
TTT_INLINE float warp_sum(float x) {
    for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
template <int WIDTH, typename F> TTT_INLINE float row_sum(F f) {
    float sum = 0;
    for_lane<WIDTH>([&](int d) { sum += f(d); });
    return warp_sum(sum);
}

// Makes z its x_hat = (z - mean) rstd; returns rstd.
template <int D> TTT_INLINE float normalise(float* z, float eps) {
    const float mean = row_sum<D>([&](int d) { return z[d]; }) / D;
    for_lane<D>([&](int d) { z[d] -= mean; });
    const float rstd = 1 / sqrtf(row_sum<D>([&](int d) { return z[d] * z[d]; }) / D + eps);
    for_lane<D>([&](int d) { z[d] *= rstd; });
    return rstd;
}

// Makes d_x its rstd (d_x - mean(d_x) - x_hat mean(d_x x_hat)), the derivative of `normalise`.
template <int D> TTT_INLINE void project(float* d_x, const float* x_hat, float rstd) {
    const float mean = row_sum<D>([&](int d) { return d_x[d]; }) / D;
    const float along = row_sum<D>([&](int d) { return d_x[d] * x_hat[d]; }) / D;
    for_lane<D>([&](int d) { d_x[d] = rstd * (d_x[d] - mean - x_hat[d] * along); });
}

// Makes z its x_hat, and g the gradient of 1/2 ||LN(z) - target||^2 with respect to z; returns rstd.
template <int D>
TTT_INLINE float inner_gradient(float* z, const float* target, const float* gamma, const float* beta, float* g, float eps) {
    const float rstd = normalise<D>(z, eps);
    for_lane<D>([&](int d) { g[d] = (gamma[d] * z[d] + beta[d] - target[d]) * gamma[d]; });
    project<D>(g, z, rstd);
    return rstd;
}

// The second order, as in implementations/torch/blocks.py: d_g becomes d_z, target becomes d_target, d_gamma is written.
template <int D>
TTT_INLINE void inner_gradient_backward(float* d_g, const float* g, const float* x_hat, float rstd, float* target,
                                        const float* gamma, const float* beta, float* d_gamma) {
    auto error = [&](int d) { return gamma[d] * x_hat[d] + beta[d] - target[d]; };
    const float mean = row_sum<D>([&](int d) { return d_g[d]; }) / D;
    const float along_d_g = row_sum<D>([&](int d) { return d_g[d] * x_hat[d]; }) / D;
    const float along_p = row_sum<D>([&](int d) { return gamma[d] * error(d) * x_hat[d]; }) / D;
    const float through_rstd = row_sum<D>([&](int d) { return d_g[d] * g[d]; }) / D;
    for_lane<D>([&](int d) {
        const float e = error(d), d_p = rstd * (d_g[d] - mean - x_hat[d] * along_d_g), d_error = gamma[d] * d_p;
        d_gamma[d] = d_p * e + d_error * x_hat[d];
        target[d] = -d_error;
        d_g[d] = gamma[d] * d_error - rstd * (along_p * d_g[d] + along_d_g * gamma[d] * e);  // d_x_hat
    });
    project<D>(d_g, x_hat, rstd);
    for_lane<D>([&](int d) { d_g[d] -= rstd * x_hat[d] * through_rstd; });
}

}  // namespace plain
}  // namespace ttt
