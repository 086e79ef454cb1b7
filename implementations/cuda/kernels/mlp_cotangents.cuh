// What the backward of TTT-MLP is made of beside mlp.cuh: its memory, rounded weights in memory, squares of scores.
#pragma once
#include "mlp.cuh"

namespace ttt {

struct BackwardArguments {
    View xq, xk, xv, lr;
    const float *token_eta, *ln_weight, *ln_bias;
    View d_out;
    const float *d_final_w1, *d_final_b1, *d_final_w2, *d_final_b2;
    const float* saved;
    const void *x_hat, *x_hat_bar;
    const float *rstd, *rstd_bar;
    void *d_xq, *d_xk, *d_xv, *d_lr;
    float *d_w1, *d_b1, *d_w2, *d_b2;
    float *d_token_eta, *d_ln_weight, *d_ln_bias;  // parts: [block, M], [chain, D]
    unsigned char* work;                           // [block, work_size]
    int64_t work_size, heads, mini_batches, group, aligned;
    double eps;
};

enum Kept { X2, SLOPE, Z1, G_X2, G_Z1, X2_BAR, D_Z1_BAR };  // Z1: what of d_z1 is known, then d_z1; G_X2: d_g_x2

// Where a chain's tensors start; in shared memory, since as registers they would spill.
template <typename T> struct Bases {
    const T *xq, *xk, *xv, *lr, *d_out;
    T *d_xq, *d_xk, *d_xv, *d_lr;
    const fp16 *x_hat, *x_hat_bar;
    const float *rstd, *rstd_bar;
    unsigned char* work;
};

template <typename T, int D, int M, bool CAUSAL> struct BackwardShared {
    using S = Sizes<D>;
    static constexpr int CHUNKS = M / CHUNK, TILE = M * S::ROW, STAGES = CHUNKS < 4 ? 2 : 1;
    static constexpr int KEPT = CAUSAL ? 7 : 5;
    static constexpr int ROOM = CHUNKS < 2 ? 7 : CHUNKS < 4 ? 5 : CAUSAL ? 3 : 4;
    static constexpr int KEPT_SHARED = KEPT < ROOM ? KEPT : ROOM;  // the others in global memory
    static constexpr int SQUARES = CAUSAL ? CHUNKS * (CHUNKS + 1) / 2 : 0;
    static constexpr bool WIDE = CHUNKS < 4;                                // squares in fp32
    // One chunk, causal: what the read-out computes of z1 is kept for the update; and up to D = 64 there is room for
    // all that a mini-batch reads, copied while the one before it is computed.
    static constexpr bool BEND = CHUNKS == 1 && CAUSAL, AHEAD = BEND && D <= 64;
    static constexpr int SUMS = CHUNKS == 2 ? 2 : 1;  // buffers of partial sums
    Bases<T> base;
    float gamma[D], beta[D];
    Values<D> d_gamma[S::PLACES], d_beta[S::PLACES];  // of each thread's place
    T xq[STAGES][TILE], xk[STAGES][TILE];
    T xv[AHEAD ? STAGES : 1][AHEAD ? TILE : 8], d_out[AHEAD ? STAGES : 1][AHEAD ? TILE : 8];
    fp16 x_hat[AHEAD ? STAGES : 1][AHEAD ? TILE : 8], x_hat_bar[AHEAD ? STAGES : 1][AHEAD ? TILE : 8];
    uint32_t weights[S::WARPS][AHEAD ? 32 * D / SPLIT : 4];     // of w1 and w2, 8 x 8 blocks of this warp
    uint32_t bend[S::WARPS][BEND ? SLOT_WORDS : 4];  // g_x2 gelu''(z1)
    static constexpr int NORMS = AHEAD ? 2 : 1;  // mini-batches whose LayerNorms are done
    T g_z2[NORMS][TILE], d_z2_bar[NORMS][TILE];
    T d_z2[TILE];  // `again`: -eta_last lr g_z2
    float partials[SUMS][S::WARPS * S::PARTIAL];
    // Of a cluster: what this block summed of a chunk, and what the other sent: of d_g_z2, and of d_xq and d_xk, which
    // go to the block that writes the chunk.
    static constexpr int HALF = (CHUNKS + 1) / 2;
    Values<D> mine[SPLIT == 1 ? 1 : CHUNKS + HALF][SPLIT == 1 ? 1 : S::PLACES];
    // With one chunk only one block waits for d_xk, and the other may be a mini-batch ahead: then d_g_z2 and d_xq come
    // in turns.
    static constexpr int TURNS = SPLIT == 2 && CHUNKS == 1 ? 2 : 1;
    Values<D> sent[TURNS][SPLIT == 1 ? 1 : CHUNKS + HALF][SPLIT == 1 ? 1 : S::PLACES];
    Values<D> sent_d_xk[SPLIT == 1 ? 1 : HALF][SPLIT == 1 ? 1 : S::PLACES];
    float sent_along[TURNS][SPLIT == 1 ? 4 : M], sent_lr[TURNS][SPLIT == 1 ? 4 : M];
    uint32_t kept[KEPT_SHARED][CHUNKS][S::WARPS][SLOT_WORDS];
    uint32_t attn1[SQUARES + 1][WIDE ? 256 : 128], d_scores2[SQUARES + 1][WIDE ? 256 : 128];
    float lr[STAGES][M], rstd[STAGES][M], rstd_bar[STAGES][M], token_eta[M], b1[S::OWN], d_b1[S::OWN],
        b2_part[S::PLACE_WARPS][D];
    float along[S::WARPS][M], along_b2[M];
    float lr_part[CAUSAL ? S::WARPS : 1][M], eta_part[CAUSAL ? S::WARPS : 1][M];
    Mbarrier there[TURNS], d_xk_there;  // what was sent: d_g_z2, d_xq and sums; d_xk
};

// What a block has in global memory.
template <int D, int M> struct Work {
    using S = Sizes<D>;
    static constexpr int WEIGHTS = 16 * D * D / SPLIT;  // bytes of both layers, rounded
    static constexpr int SLOT = WEIGHTS + 4 * S::OWN;
    static constexpr int KEPT = M / CHUNK * S::WARPS * 4 * SLOT_WORDS;
    static constexpr int D_WEIGHTS = 32 * D * D / SPLIT, HELD = 4 * M * D,
                         ATTN = M / CHUNK * (M / CHUNK + 1) / 2 * S::WARPS * 512;
    static constexpr int FIXED = D_WEIGHTS + HELD + 7 * KEPT + ATTN;  // then group + 1 slots
};

// Rounded weights in global memory, 16 bytes of each lane after another. Word q of `First` and `Second`:
template <int D> TTT_INLINE uint32_t& word(First<D>& w, int q) { return w.x[q / (D / 4)][q / 2 % (D / 8)][q % 2]; }
template <int D> TTT_INLINE uint32_t& word(Second<D>& w, int q) { return w.x[q / (2 * FT)][q / 2 % FT][q % 2]; }

template <int D, typename W> TTT_INLINE void save_words(Words* to, W w, int thread) {
    to += thread;
#pragma unroll
    for (int k = 0; k < D / 8 / SPLIT; k++)
        to[k * Sizes<D>::THREADS] = {
            word<D>(w, 4 * k), word<D>(w, 4 * k + 1), word<D>(w, 4 * k + 2), word<D>(w, 4 * k + 3)};
}
template <int D, typename W> TTT_INLINE W restore_words(const Words* from, int thread) {
    W w;
    from += thread;
#pragma unroll
    for (int k = 0; k < D / 8 / SPLIT; k++) {
        Words y = from[k * Sizes<D>::THREADS];
#pragma unroll
        for (int i = 0; i < 4; i++) word<D>(w, 4 * k + i) = y.x[i];
    }
    return w;
}
// The same read where they are used, as they lie or with every block transposed.
template <int D, bool TRANSPOSED> struct Far {
    const Words* p;
    TTT_INLINE void quad(uint32_t (&r)[4], int q) const {
        const Words y = p[q * Sizes<D>::THREADS];
#pragma unroll
        for (int i = 0; i < 4; i++) r[i] = TRANSPOSED ? movmatrix(y.x[i]) : y.x[i];
    }
};
// The same as 8 x 8 blocks one after another, which ldmatrix gives as they are or transposed.
template <int D> TTT_INLINE void save_blocks(uint32_t* to, First<D> w1, Second<D> w2, int lane) {
    constexpr int BLOCKS = D / 2 / SPLIT;
    to += lane;
#pragma unroll
    for (int q = 0; q < BLOCKS; q++) to[32 * q] = word<D>(w1, q), to[32 * (BLOCKS + q)] = word<D>(w2, q);
}

// A square of scores of 16 x 16 tokens, in the places of an accumulator: x[e] is row g + 8 (e / 2 % 2), column
// 8 (e / 4) + 2t + e % 2.
struct Square { float x[8]; };

template <typename T, bool WIDE> TTT_INLINE void store_square(uint32_t* slot, const Square& s, int lane) {
    if (WIDE) {
        reinterpret_cast<Four*>(slot)[lane] = {s.x[0], s.x[1], s.x[2], s.x[3]};
        reinterpret_cast<Four*>(slot)[32 + lane] = {s.x[4], s.x[5], s.x[6], s.x[7]};
    } else
        reinterpret_cast<Words*>(slot)[lane] = {
            pack<T>(s.x[0], s.x[1]), pack<T>(s.x[2], s.x[3]), pack<T>(s.x[4], s.x[5]), pack<T>(s.x[6], s.x[7])};
}
template <typename T, bool WIDE> TTT_INLINE Square load_square(const uint32_t* slot, int lane) {
    Square s;
    if (WIDE) {
        Four a = reinterpret_cast<const Four*>(slot)[lane], b = reinterpret_cast<const Four*>(slot)[32 + lane];
        for (int i = 0; i < 4; i++) s.x[i] = a.x[i], s.x[4 + i] = b.x[i];
    } else {
        Words w = reinterpret_cast<const Words*>(slot)[lane];
        for (int i = 0; i < 4; i++) {
            float2 y = unpack<T>(w.x[i]);
            s.x[2 * i] = y.x, s.x[2 * i + 1] = y.y;
        }
    }
    return s;
}
template <typename T> TTT_INLINE void square_as_a(uint32_t (&a)[4], const Square& s) {
    for (int i = 0; i < 4; i++) a[i] = pack<T>(s.x[2 * i], s.x[2 * i + 1]);
}
TTT_INLINE void transpose_a(uint32_t (&a)[4]) {
    const uint32_t upper = movmatrix(a[2]);
    a[0] = movmatrix(a[0]), a[2] = movmatrix(a[1]), a[1] = upper, a[3] = movmatrix(a[3]);
}

// Keeps what is computed from `w` in a loop in that loop, instead of in registers all the time.
template <int A, int B> TTT_INLINE void pin(float (&w)[A][B][4]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < A; i++)
#pragma unroll
        for (int j = 0; j < B; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) asm volatile("" : "+f"(w[i][j][e]));
#endif
}

template <int D> TTT_INLINE void pin(First<D>& w) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < FK; i++)
#pragma unroll
        for (int j = 0; j < D / 8; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) asm volatile("" : "+r"(w.x[i][j][h]));
#endif
}
TTT_INLINE void pin(int& x) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(x));
#endif
}

template <int D> TTT_INLINE NormOf<D> norm_of_saved(const Values<D>& x_hat, float rstd) {
    NormOf<D> norm;
    for (int i = 0; i < Sizes<D>::EACH; i++) norm.x_hat[i] = x_hat.x[i];
    norm.rstd = rstd;
    return norm;
}

TTT_INLINE void add_columns(float (&sums)[2 * FT], const float (&z)[FT][4]) {
#pragma unroll
    for (int k = 0; k < FT; k++) sums[2 * k] += z[k][0] + z[k][2], sums[2 * k + 1] += z[k][1] + z[k][3];
}

}  // namespace ttt
