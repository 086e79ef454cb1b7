// Sizes, warps, shared memory and barriers of a chain in one pass of TTT-Linear's tensor-core kernels.
#pragma once
#include "linear_tiles.cuh"

namespace ttt {

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

// Puts what all mini-batches share into shared memory: gamma, beta, token_eta and eps; and makes the named barriers.
template <typename P>
TTT_INLINE void load_shared(const P& at, const float* ln_weight, const float* ln_bias, const float* token_eta, double eps) {
    if (threadIdx.x == 0) {
        *at.eps() = float(eps);
        for (int i = 1; i < 16; i++) named_init(i, i == P::BETWEEN ? 32 * P::WARPS : P::HAND_OVER);
    }
    for (int i = threadIdx.x; i < P::D / 2; i += P::THREADS)
        at.ln()[i] = make_float4(ln_weight[2 * i], ln_weight[2 * i + 1], ln_bias[2 * i], ln_bias[2 * i + 1]);
    for (int i = threadIdx.x; i < P::M; i += P::THREADS) at.token_eta()[i] = token_eta[i];
}

}  // namespace ttt
