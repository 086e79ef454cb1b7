// What both forward kernels of TTT-MLP take.
#pragma once
#include "mlp.cuh"

namespace ttt {

struct ForwardArguments {
    View xq, xk, xv, lr;
    const float *token_eta, *ln_weight, *ln_bias, *w1, *b1, *w2, *b2;
    void* out;
    float *final_w1, *final_b1, *final_w2, *final_b2;
    float* saved;              // [chain, group of mini-batches, RECORD]
    void *x_hat, *x_hat_bar;   // [chain, T, D] fp16, of the inner LayerNorm and the output's
    float *rstd, *rstd_bar;    // [chain, T]
    int64_t heads, mini_batches, group, aligned;
    double eps;
};

}  // namespace ttt
