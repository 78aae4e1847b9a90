// The functions that a linear layer may end in. Their vectors are in activation_body.h.
#pragma once

namespace lmk {

// gelu is x Phi(x), with Phi the normal distribution; gelu_tanh its approximation by tanh; silu is x sigmoid(x).
enum class Activation : int { none, gelu, gelu_tanh, silu, relu, tanh };

}  // namespace lmk
