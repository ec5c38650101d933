// The layers of a Llama-like decoder, one after the other, without going back to Python between.
#include "kernels.h"

void run_stack(Team& team, int me, const Layer* layers, int count, const Stack& s) {
  const int32_t width = s.rope.heads * s.rope.dim;
  const Output add = {s.hidden, TYPE_ADD_F32, s.size};
  for (int i = 0; i < count; i++) {
    const Layer& layer = layers[i];
    const Input normed = {s.hidden, TYPE_F32, s.size, layer.input_norm, s.eps};
    linear(team, me, layer.qkv, normed, {s.qkv, TYPE_BF16, s.rope.stride}, s.tokens, s.path);

    Rope rope = s.rope;
    rope.qkv = s.qkv;
    rope.q_norm = layer.q_norm;
    rope.k_norm = layer.k_norm;
    rope.keys = layer.keys;
    rope.values = layer.values;
    rope_store(team, me, rope, s.tokens);

    Attention a = s.plans[layer.plan];
    a.q = s.qkv;
    a.q_stride = s.rope.stride;
    a.out = s.seen;
    a.out_stride = width;
    a.keys = layer.keys;
    a.values = layer.values;
    attention(team, me, a);
    linear(team, me, layer.out, {s.seen, TYPE_BF16, width, nullptr, 0}, add, s.tokens, s.path);

    const Input after = {s.hidden, TYPE_F32, s.size, layer.post_norm, s.eps};
    const int32_t inner = layer.gate_up.n_out;
    linear(team, me, layer.gate_up, after, {s.inner, TYPE_BF16, inner}, s.tokens, s.path);
    linear(team, me, layer.down, {s.inner, TYPE_BF16, inner, nullptr, 0}, add, s.tokens, s.path);
  }
  if (s.norm)
    rms_norm(team, me, {s.hidden, TYPE_F32, s.size, s.norm, s.eps}, nullptr,
             {s.hidden, TYPE_F32, s.size}, s.tokens, s.size);
}
